"""Pods run what `galerne serve` runs on one machine: the same variables, HTTP options and application."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.cli import lifecycle
from serving.cluster.environment import ONE_MACHINE, environment
from serving.cluster.haproxy import ENV_HOST
from serving.cluster.names import APP, GATEWAY
from serving.config_file import parse
from tests.helm.rendering import ROOT, VALUES, galerne_config, ray_groups, rayservice

EVERY_INTERFACE = "0.0.0.0"  # noqa: S104 - of a pod
STATE = Path("/run/galerne")
# Depend on the machine; what they are in a pod is asserted one by one below.
OF_THE_MACHINE = {
    "RAY_SERVE_HAPROXY_NBTHREAD",
    "RAY_SERVE_HAPROXY_MAXCONN",
    "RAY_SERVE_HAPROXY_BINARY_PATH",
    "GALERNE_HAPROXY_SOURCE_CONNECTIONS",
}
# What lifecycle adds for one machine, and why pods have it or not.
SET_BY_LIFECYCLE = {
    "RAY_AUTH_MODE": None,  # authOptions: KubeRay sets both in every pod
    "RAY_AUTH_TOKEN": None,
    "RAY_SERVE_HAPROXY_METRICS_PORT": "9101",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "8500",
}
NOT_IN_PODS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",  # would put Ray's own processes on loopback
    "VLLM_LOOPBACK_IP",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",  # other pods' HAProxy has to notice first that a gateway goes
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",  # a pod's processors are its own
}
ONLY_IN_PODS = {
    "GALERNE_ENGINE_TOKEN",
    "GALERNE_CACHE",
    "GALERNE_LEDGER_URL",
    "GALERNE_LIMITS_STORE_PASSWORD",
    "GALERNE_RELEASE",
    "HF_HOME",
    "HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "VLLM_CACHE_ROOT",
    "VLLM_HOST_IP",
}


def variables(group: dict[str, Any]) -> dict[str, Any]:
    """Variables of a group's Ray container."""
    env = group["template"]["spec"]["containers"][0]["env"]
    found = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in env}
    assert len(found) == len(env), "a variable stands twice"
    return found


@pytest.mark.parametrize("values", VALUES)
def test_pods_have_the_variables_of_serve(values: str) -> None:
    config = parse(yaml.safe_dump(galerne_config(values)), values)
    wanted = environment(config, STATE) | {k: v for k, v in SET_BY_LIFECYCLE.items() if v}
    groups = ray_groups(values)
    given = yaml.safe_load((ROOT / "helm" / "galerne" / values).read_text())["workerGroups"]
    for name, group in groups.items():
        found = variables(group)
        for variable in wanted.keys() - OF_THE_MACHINE:
            assert found.get(variable) == wanted[variable], (name, variable)
        # The others of ONE_MACHINE are the same.
        for variable in ONE_MACHINE.keys() - NOT_IN_PODS - ONLY_IN_PODS:
            assert found.get(variable) == ONE_MACHINE[variable], (name, variable)
        assert not found.keys() & NOT_IN_PODS
        own = set((given.get(name) or {}).get("env", {}))
        unknown = found.keys() - wanted.keys() - ONE_MACHINE.keys() - ONLY_IN_PODS - own
        assert not unknown, f"{name}: nothing on one machine sets {unknown}"


def test_every_variable_of_lifecycle_is_accounted_for() -> None:
    # Those it names itself, beyond `environment` and ONE_MACHINE.
    text = Path(str(lifecycle.__file__)).read_text()
    named = set(re.findall(r'os\.environ\["(\w+)"\] =', text)) | set(re.findall(r'"(RAY_\w+|VLLM_\w+)": ', text))
    assert named == SET_BY_LIFECYCLE.keys()


@pytest.mark.parametrize("values", VALUES)
def test_what_depends_on_the_pod(values: str) -> None:
    config = parse(yaml.safe_dump(galerne_config(values)), values)
    for group in ray_groups(values).values():
        found = variables(group)
        cpus = int(float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]))
        assert int(found["RAY_SERVE_HAPROXY_NBTHREAD"]) == min(4, max(1, cpus // 2))
        accepted = config.gateway.bounds.max * config.gateway.max_ongoing_requests
        assert int(found["RAY_SERVE_HAPROXY_MAXCONN"]) >= min(200_000, max(4096, 2 * accepted))
        assert int(found["GALERNE_HAPROXY_SOURCE_CONNECTIONS"]) == int(found["RAY_SERVE_HAPROXY_MAXCONN"]) // 4
        assert found["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("/galerne-haproxy")
        assert found[ENV_HOST] == config.listen.host == EVERY_INTERFACE
        assert found["VLLM_HOST_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert found["GALERNE_ENGINE_TOKEN"]["secretKeyRef"]["key"] == "engine_token"


@pytest.mark.parametrize("values", VALUES)
def test_serve_is_told_what_serve_tells_it(values: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serving.cluster.ray import GATEWAY_KEEP_ALIVE_S

    told = yaml.safe_load(rayservice(values)["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(told)
    assert str(schema.proxy_location.value) == "EveryNode"
    assert (schema.http_options.host, schema.http_options.port) == (EVERY_INTERFACE, 8000)
    assert schema.http_options.keep_alive_timeout_s == GATEWAY_KEEP_ALIVE_S
    # As LocalCluster starts it.
    assert (schema.logging_config.log_level, schema.logging_config.enable_access_log) == ("WARNING", False)
    (app,) = schema.applications
    assert (app.name, app.import_path, app.route_prefix) == (APP, "deployments.app:build", "/")
    assert [deployment.name for deployment in app.deployments] == [GATEWAY]
    mounts = {
        m["name"]: m["mountPath"]
        for m in ray_groups(values)["head"]["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert app.args["config_path"] == f"{mounts['config']}/galerne.yaml"
    assert app.args["revision"]


@pytest.mark.parametrize("values", VALUES)
def test_gateways_find_the_pods_that_are_theirs_and_engines_do_not(values: str) -> None:
    (app,) = yaml.safe_load(rayservice(values)["spec"]["serveConfigV2"])["applications"]
    options = app["deployments"][0]["ray_actor_options"]
    groups = ray_groups(values)
    offered = yaml.safe_load(groups["gateway"]["rayStartParams"]["resources"].strip("'"))
    assert options["resources"].items() <= offered.items()
    assert options["num_cpus"] == 0
    assert groups["gateway"]["rayStartParams"]["num-cpus"] == groups["head"]["rayStartParams"]["num-cpus"] == "0"
    config = parse(yaml.safe_dump(galerne_config(values)), values)
    assert groups["gateway"]["minReplicas"] == config.gateway.bounds.min
    for name in groups.keys() - {"head", "gateway"}:
        assert int(groups[name]["rayStartParams"]["num-cpus"]) >= 1


def test_versions_are_the_products() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((ROOT / "helm" / "galerne" / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    (ray,) = [d for d in project["dependencies"] if d.startswith("ray[")]
    assert rayservice(VALUES[0])["spec"]["rayClusterConfig"]["rayVersion"] == ray.partition("==")[2]
