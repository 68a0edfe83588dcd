# Galerne: everything a newcomer runs. `make help` lists the targets.

# CPU builds of PyTorch are not on the default package index everywhere. Where they are not, name a directory or
# page of wheels that holds the one in locks/cpu.txt (README, "Installing on a CPU").
TORCH_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTHON_VERSION := 3.11
CONFIG ?= demo
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
export UV_FIND_LINKS := $(TORCH_FIND_LINKS)
# A virtual environment of somebody else must not receive our packages.
unexport VIRTUAL_ENV
# Engines import thousands of modules in several processes: byte code is compiled once, not by each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install run test test-fast check format lock lock-check bench-overhead bench-engine bench-peers bench-peers-engine \
	loadtest loadtest-sweep clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.tools/bin/uv: locks/uv.txt
	python3 -m venv .tools
	.tools/bin/python -m pip install --quiet --require-hashes --no-deps -r locks/uv.txt
	@touch $@

$(VENV)/.installed: locks/cpu.txt pyproject.toml | $(UV)
	@echo "installing the locked packages into $(VENV) (about 4 GB)"
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON_VERSION) $(VENV)
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes locks/cpu.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

install: $(VENV)/.installed ## install the locked packages into .venv

run: install ## serve the demo (CONFIG=… for another) on 127.0.0.1:8000
	@exec $(BIN)/galerne serve $(CONFIG)

test: install ## every test, the real engine included
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: install ## tests without a cluster
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

check: install ## format, lint, types, import layers, locks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory lock-check

format: install ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

COMPILE := pip compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) pyproject.toml
CPU_LOCK := $(COMPILE) --override locks/overrides.txt --extra cpu --group dev
GPU_LOCK := $(COMPILE) --python-platform x86_64-manylinux_2_28 --extra gpu

lock: | $(UV) ## renew the locks from pyproject.toml
	$(UV) $(CPU_LOCK) -o locks/cpu.txt
	$(UV) $(GPU_LOCK) -o locks/gpu.txt
	$(UV) pip compile --quiet --no-header --generate-hashes locks/uv.in -o locks/uv.txt

# The present pins are kept where they satisfy pyproject.toml, so a difference means that they do not.
lock-check: | $(UV)
	@mkdir -p build && cp locks/cpu.txt build/cpu.txt && cp locks/gpu.txt build/gpu.txt
	@$(UV) $(CPU_LOCK) -o build/cpu.txt && $(UV) $(GPU_LOCK) -o build/gpu.txt
	@for l in cpu gpu; do sed "s#build/$$l.txt#locks/$$l.txt#" build/$$l.txt | cmp -s - locks/$$l.txt \
	  || { echo "locks/$$l.txt is not what pyproject.toml asks for: run make lock" >&2; exit 1; }; done
	@echo "locks are up to date"

bench-overhead: install ## the gateway against its engine, fake engine: build/bench/overhead.json
	$(BIN)/python -m loadtest.overhead --start

bench-engine: install ## the gateway against its engine, real vLLM: build/bench/engine.json
	$(BIN)/python -m loadtest.engine --start

PEERS_ARGS ?=

bench-peers: install ## every way to one fake engine, peers installed on demand: build/bench/compare.json
	$(BIN)/python -m loadtest compare $(PEERS_ARGS)

bench-peers-engine: install ## the same in front of the real model: build/bench/compare-engine.json
	$(BIN)/python -m loadtest compare --real --streams 16 --prompt-kib 1 --output-tokens 32 --run-s 20 \
	  --timeout-s 600 --out build/bench/compare-engine.json $(PEERS_ARGS)

SCENARIO ?= smoke
URL ?= http://127.0.0.1:8000

loadtest: install ## a scenario (SCENARIO=…) against a running cluster (URL=…), with a report
	$(BIN)/python -m loadtest run $(SCENARIO) --url $(URL)

loadtest-sweep: install ## the highest rate of a scenario at which its targets are met
	$(BIN)/python -m loadtest sweep $(SCENARIO) --url $(URL)

clean: ## remove what the targets made (caches of models stay)
	rm -rf $(VENV) .tools build *.egg-info .mypy_cache .ruff_cache .pytest_cache
