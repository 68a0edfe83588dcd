"""What the chart tells Serve really starts: on this machine, with simulated engines behind the models' names.

Each values file's configuration is checked as a file, and started as KubeRay hands it to Serve: the whole of `serveConfigV2`,
whose builder runs in a task of the cluster. One is started by `galerne serve`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.api.auth import new_key
from serving.cli.lifecycle import fake_models
from serving.config_file import load, parse
from tests.helm.rendering import VALUES, galerne_config, rayservice
from tests.integration.running import GALERNE, cluster

START_TIMEOUT_S = 180
SERVED = "values-mixed-gpus.yaml"
# The last one, which is drained, too.
DRAINED = "values-aks.yaml"
DEPLOYED = (*(values for values in VALUES if values != DRAINED), DRAINED)
# Of one after another: some seconds each.
DEPLOYED_TIMEOUT_S = START_TIMEOUT_S + 110 + 20 * len(DEPLOYED)
ONE, MANY = (18400, 18410), (18440, 18450)


def on_this_machine(values: str, key_digest: str, ports: tuple[int, int]) -> dict[str, Any]:
    """The rendered configuration with simulated engines, on loopback, known to one key."""
    config = parse(yaml.safe_dump(galerne_config(values)), values)
    given = fake_models(config).model_dump(mode="json", by_alias=True)
    port, metrics = ports
    given["listen"] = {"host": "127.0.0.1", "port": port}
    given["gateway"] |= {"metrics_port": metrics}
    if given["prometheus"]:
        given["prometheus"]["scaler_port"] = metrics + 20
    given["tenants"] = [{"id": "first-tenant", "keys": [{"id": "key-1", "sha256": key_digest}]}]
    for model in given["models"]:
        model["drain_timeout_s"] = 5.0
        # Two processors here have to do for what a cluster has hundreds for.
        model["resources"]["cpus"] = 1.0
    # What others run: a Redis, an issuer of tokens.
    given["limits_store"] = "memory://"
    given["oidc"] = []
    return given


@pytest.mark.parametrize("values", VALUES)
def test_the_configuration_of_every_values_file(values: str, tmp_path: Path) -> None:
    (tmp_path / "galerne.yaml").write_text(yaml.safe_dump(galerne_config(values)))
    config = load(tmp_path / "galerne.yaml")
    assert fake_models(config).models
    if values == VALUES[0]:
        # The command, once: it is the same function.
        done = subprocess.run(
            [GALERNE, "config", "check", tmp_path / "galerne.yaml"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.cluster
def test_galerne_serve_starts_a_rendered_configuration(tmp_path: Path) -> None:
    key, digest = new_key()
    config = on_this_machine(SERVED, digest, ONE)
    (tmp_path / "galerne.yaml").write_text(yaml.safe_dump(config))
    with cluster(tmp_path / "galerne.yaml", tmp_path, START_TIMEOUT_S) as running:
        awake = next(m["id"] for m in config["models"] if m["replicas"]["min"] and m["task"] == "generate")
        assert_answers(running.url, key, awake)
        listed = {model["id"] for model in ask(f"{running.url}/v1/models", key)["data"]}
        assert listed == {model["id"] for model in config["models"]}
        # What Prometheus is told in a cluster is what it reads from a file on one machine.
        state = running.state()
        with urllib.request.urlopen(
            f"http://127.0.0.1:{state['gateways'][0]['metrics_port']}/targets", timeout=10
        ) as told:
            rows = {tuple(row["targets"]): row["labels"] for row in json.load(told)}
        file = Path(f"/tmp/galerne-{os.getuid()}/{ONE[0]}/prometheus-targets.json")
        wanted = {tuple(row["targets"]): row["labels"] for row in json.loads(file.read_text())}
        assert rows == {
            target: labels for target, labels in wanted.items() if labels["job"] in {"galerne-gateway", "vllm"}
        }
        assert rows


def assert_answers(url: str, key: str, model: str) -> None:
    """A chat completion comes back."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = ask(f"{url}/v1/chat/completions", key, body)
    assert answer["choices"][0]["message"]["content"]


def ask(url: str, key: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer of a request with a key."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
        found: dict[str, Any] = json.load(response)
    return found


@pytest.mark.cluster
@pytest.mark.timeout(DEPLOYED_TIMEOUT_S + 60)
def test_serve_deploys_the_rendered_serve_config_of_every_values_file(tmp_path: Path) -> None:
    key, digest = new_key()
    directories = [prepared(tmp_path, values, digest) for values in DEPLOYED]
    # Short: a socket's path ends at 97 characters, and pytest's directories are long.
    with tempfile.TemporaryDirectory(prefix="galerne-") as state:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helm.deploy", state, key, *directories],
            capture_output=True,
            text=True,
            timeout=DEPLOYED_TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    # A thread of the cluster may have logged something between them.
    found = {
        seen["directory"]: seen
        for seen in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    }
    assert list(found) == [directory.name for directory in directories]
    for values, seen in zip(DEPLOYED, found.values(), strict=True):
        config = galerne_config(values)
        assert seen["answer"], values
        assert seen["models"] == sorted(model["id"] for model in config["models"])
        # The gateway ran where its resource is, as in a cluster, and told Prometheus where everything is.
        assert seen["gateway_resources"] == {"galerne_gateway": 1.0}
        targets = [row["labels"] for row in seen["targets"]]
        gateways = parse(yaml.safe_dump(config), values).gateway.bounds.min
        assert sum(labels["job"] == "galerne-gateway" for labels in targets) == gateways
        engines = [labels for labels in targets if labels["job"] == "vllm"]
        assert {labels["model"] for labels in engines} >= {
            model["id"] for model in config["models"] if model.get("replicas", {}).get("min", 1)
        }
        assert all(labels.keys() == {"job", "model", "replica"} for labels in engines)
    # Told that its node goes, Serve took every replica away in time.
    assert found[directories[-1].name]["drained"] is True


def prepared(tmp_path: Path, values: str, key_digest: str) -> Path:
    """A directory with what Serve is told of a values file, and the configuration that this names."""
    directory = tmp_path / values.replace("/", "-").removesuffix(".yaml")
    directory.mkdir()
    told = yaml.safe_load(rayservice(values)["spec"]["serveConfigV2"])
    (app,) = told["applications"]
    path = directory / "galerne.yaml"
    # As in a pod: the revision in the first line, the configuration below it.
    text = yaml.safe_dump(on_this_machine(values, key_digest, MANY))
    path.write_text(f"# revision: {app['args']['revision']}\n{text}")
    app["args"]["config_path"] = str(path)
    told["http_options"] |= {"host": "127.0.0.1", "port": MANY[0]}
    (directory / "serve.json").write_text(json.dumps(told))
    return directory
