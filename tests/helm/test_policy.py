"""Nothing that the chart renders breaks a rule of `policy`; network policies open what is needed and no more."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm import policy
from tests.helm.rendering import HELMS, VALUES, Pod, objects, of_kind, pods, ray_groups, rayservice

CLOSED = tuple(values for values in VALUES if "external-secrets" not in values)  # that one has no network policies
EVERYTHING = "ci/02-everything-values.yaml"
RAY_CONTROL = {"dashboard": 8265, "client": 10001}


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize("values", VALUES)
def test_no_rule_is_broken(values: str, line: str) -> None:
    assert policy.findings(values, line) - policy.EXCEPTIONS.keys() == set()


def test_no_exception_is_left_over() -> None:
    found = set().union(*(policy.findings(values) for values in VALUES))
    assert policy.EXCEPTIONS.keys() <= found


BAD_POD: dict[str, Any] = {
    "hostNetwork": True,
    "securityContext": {"sysctls": []},
    "volumes": [{"name": "a", "hostPath": {"path": "/"}}, {"name": "b", "emptyDir": {}}],
    "containers": [],
}
BAD_CONTAINER: dict[str, Any] = {
    "name": "c",
    "image": "redis:latest",
    "ports": [{"hostPort": 80}],
    "env": [{"name": "API_KEY", "value": "sk-1"}],
}
BAD_THINGS: dict[str, dict[str, Any]] = {
    "wildcard-rbac": {"kind": "Role", "rules": [{"verbs": ["*"]}]},
    "cluster-rbac": {"kind": "ClusterRole"},
    "default-account": {"kind": "ServiceAccount"},
    "ray-ports": {"kind": "Service", "spec": {"ports": [{"port": 8265}]}},
    "named-ray-ports": {"kind": "Service", "spec": {"ports": [{"port": 80, "targetPort": "dashboard"}]}},
    "namespace-set": {"kind": "Service", "metadata": {"namespace": "default"}, "spec": {"ports": []}},
    "unlabelled": {"kind": "Service", "metadata": {}, "spec": {"ports": []}},
    "probes": {"kind": "StatefulSet", "spec": {"template": {"spec": {"containers": [{}]}}}},
    "ingress-without-tls": {"kind": "Ingress", "spec": {}},
    "open-policy": {"kind": "NetworkPolicy", "spec": {"egress": [{"to": []}]}},
}


def test_every_rule_finds_what_it_is_for() -> None:
    pod = Pod("x", {}, copy.deepcopy(BAD_POD))
    for rule, broken in policy.POD_RULES.items():
        assert broken(pod), rule
    for rule, broken in policy.CONTAINER_RULES.items():
        assert broken(BAD_CONTAINER), rule
    assert BAD_THINGS.keys() == policy.THING_RULES.keys()
    for rule, broken in policy.THING_RULES.items():
        assert broken(BAD_THINGS[rule]), rule


@pytest.mark.parametrize("values", CLOSED)
def test_the_namespace_is_closed_in_both_directions(values: str) -> None:
    deny = [p["spec"] for p in of_kind(values, "NetworkPolicy") if p["spec"]["podSelector"] == {}]
    assert deny == [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]


@pytest.mark.parametrize("values", CLOSED)
def test_every_pod_is_named_by_the_policies_that_open_for_it(values: str) -> None:
    for pod in pods(values):
        assert selecting(values, pod.metadata["labels"]), pod.where


def selecting(values: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Specs of the policies that select a pod, the one for all left out."""
    found = []
    for thing in of_kind(values, "NetworkPolicy"):
        selector = thing["spec"]["podSelector"]
        if selector and matches(selector, labels):
            found.append(thing["spec"])
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """As Kubernetes reads a label selector; only what the chart uses."""
    expressions = selector.get("matchExpressions", [])
    assert {part["operator"] for part in expressions} <= {"In", "NotIn"}
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        (labels.get(part["key"]) in part["values"]) is (part["operator"] == "In") for part in expressions
    )


def may_reach(values: str, source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether a pod of the namespace may open a TCP connection to another: both sides have to open it."""
    return opens(selecting(values, source), "egress", "to", target, port) and opens(
        selecting(values, target), "ingress", "from", source, port
    )


def opens(specs: list[dict[str, Any]], direction: str, peers: str, other: dict[str, str], port: int) -> bool:
    """Whether a rule opens a port for a pod of the same namespace."""
    return any(
        any(
            "podSelector" in p and "namespaceSelector" not in p and matches(p["podSelector"], other)
            for p in rule[peers]
        )
        and any(p["port"] <= port <= p.get("endPort", p["port"]) and p["protocol"] == "TCP" for p in rule["ports"])
        for spec in specs
        for rule in spec.get(direction, [])
    )


# (who, to whom, port, whether)
WAYS = (
    ("head", "redis", 6379, True),
    ("engine", "head", 6379, True),  # control store
    ("gateway", "head", 6379, True),
    ("head", "engine", 6380, True),  # raylet
    ("gateway", "gateway", 30000, True),  # HAProxy to another pod's gateway
    ("gateway", "engine", 32768, True),  # the relay
    ("gateway", "engine", 60999, True),
    ("engine", "engine", 45000, True),  # NCCL
    ("verify", "gateway", 8000, True),
    ("loadtest", "gateway", 8000, True),
    ("gateway", "head", 8265, False),
    ("engine", "head", 8265, False),
    ("engine", "head", 10001, False),
    ("engine", "redis", 6379, False),
    ("gateway", "redis", 6379, False),
    ("engine", "gateway", 8000, False),
    ("verify", "engine", 32768, False),
    ("verify", "head", 6379, False),
    ("verify", "head", 8265, False),
    ("loadtest", "engine", 40000, False),
    ("verify", "redis", 6379, False),
    ("prepare", "gateway", 8000, False),
    ("redis", "head", 6379, False),
)


@pytest.mark.parametrize(("who", "whom", "port", "may"), WAYS)
def test_who_may_reach_whom(who: str, whom: str, port: int, may: bool) -> None:
    labels = {pod.metadata["labels"]["app.kubernetes.io/component"]: pod.metadata["labels"] for pod in pods(EVERYTHING)}
    assert may_reach(EVERYTHING, labels[who], labels[whom], port) is may


def resolves(values: str, labels: dict[str, str]) -> bool:
    """Whether a pod's way to the cluster's DNS is open."""
    return any(
        port["port"] == 53
        for spec in selecting(values, labels)
        for rule in spec.get("egress", [])
        for port in rule["ports"]
    )


def test_the_pod_that_shows_isolation_has_no_dns() -> None:
    # The cluster's DNS asks the outside, so that a name resolves wherever it is open. Others cannot do without.
    found = {p.metadata["labels"]["app.kubernetes.io/component"]: p.metadata["labels"] for p in pods(EVERYTHING)}
    assert {who for who, labels in found.items() if not resolves(EVERYTHING, labels)} == {"verify"}
    assert found.keys() > {"verify", "head", "gateway", "engine", "loadtest", "prepare"}


ADDRESSES = {"tcp://10.0.3.9:8000": "http://10.0.3.9:8000", "tcp://[fd00::9]:8000": "http://[fd00::9]:8000"}


@pytest.mark.parametrize(("variable", "url"), ADDRESSES.items())
def test_the_pod_that_shows_isolation_finds_the_gateways_without_dns(variable: str, url: str, tmp_path: Path) -> None:
    (pod,) = of_kind(EVERYTHING, "Pod")
    assert pod["spec"]["enableServiceLinks"] is True
    (container,) = pod["spec"]["containers"]
    shell, option, script, *rest = container["command"]
    (tmp_path / "galerne").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "galerne").chmod(0o755)
    script = script.replace("/opt/galerne/bin", str(tmp_path))

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        command = [shell, option, script, *rest]
        return subprocess.run(command, env={"PATH": "/usr/bin:/bin"} | env, capture_output=True, text=True, check=False)

    # As the kubelet names it, after the Service that clients use.
    service = next(s for s in of_kind(EVERYTHING, "Service") if s["metadata"]["name"] == "trial-galerne")
    assert service["spec"]["ports"][0]["port"] == 8000
    done = run(TRIAL_GALERNE_PORT=variable)
    assert done.stdout.split() == ["verify", "--url", url, "--key-env", "GALERNE_TEST_KEY", "--isolated", "--json"]
    refused = run()
    assert refused.returncode != 0
    assert "the Service trial-galerne was not there" in refused.stderr


@pytest.mark.parametrize("who", ["head", "gateway"])
def test_who_asks_prometheus_may_reach_it(who: str) -> None:
    labels = {p.metadata["labels"]["app.kubernetes.io/component"]: p.metadata["labels"] for p in pods(EVERYTHING)}

    def asks(component: str) -> bool:
        return any(
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}} in rule["to"]
            and {"port": 9090, "protocol": "TCP"} in rule["ports"]
            for spec in selecting(EVERYTHING, labels[component])
            for rule in spec.get("egress", [])
        )

    assert asks(who)
    assert not asks("engine")


def test_ways_that_are_gateways_alone() -> None:
    labels = {pod.metadata["labels"]["app.kubernetes.io/component"]: pod.metadata["labels"] for pod in pods(EVERYTHING)}
    out = {
        who: {
            peer["ipBlock"]["cidr"]
            for spec in selecting(EVERYTHING, labels[who])
            for rule in spec.get("egress", [])
            for peer in rule["to"]
            if "ipBlock" in peer
        }
        for who in ("gateway", "engine", "head")
    }
    assert out == {"gateway": {"10.9.0.5/32"}, "engine": set(), "head": {"10.0.0.10/32"}}


@pytest.mark.parametrize("values", CLOSED)
def test_only_the_operator_reaches_the_dashboard(values: str) -> None:
    for thing in of_kind(values, "NetworkPolicy"):
        for rule in thing["spec"].get("ingress", []):
            ports = {p for r in rule["ports"] for p in range(r["port"], r.get("endPort", r["port"]) + 1)}
            assert 10001 not in ports
            if 8265 in ports:
                assert rule["from"] == [
                    {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}}
                ]


def test_the_ports_that_policies_name_are_those_that_ray_is_given() -> None:
    for name, group in ray_groups(EVERYTHING).items():
        params = group["rayStartParams"]
        opened = {*range(6379, 6384), *range(10002, 20000)}
        for key in ("node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-grpc-port"):
            assert int(params[key]) in opened, (name, key)
        assert set(range(int(params["min-worker-port"]), int(params["max-worker-port"]) + 1)) <= opened


@pytest.mark.parametrize("values", VALUES)
def test_rays_control_plane_asks_for_a_token(values: str) -> None:
    cluster = rayservice(values)["spec"]["rayClusterConfig"]
    assert cluster["authOptions"]["mode"] == "token"
    made = {s["metadata"]["name"]: s for s in of_kind(values, "Secret")}
    name = cluster["authOptions"]["secretName"]
    if name in made:
        assert {"auth_token", "engine_token"} <= made[name]["data"].keys()
    assert cluster["headGroupSpec"]["enableIngress"] is False
    ports = {p["name"] for p in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
    assert "client" not in ports


@pytest.mark.parametrize("values", VALUES)
def test_no_cache_is_shared_and_no_weights_can_be_written(values: str) -> None:
    for pod in pods(values):
        written = {
            mount["name"] for c in pod.containers for mount in c.get("volumeMounts", []) if not mount.get("readOnly")
        }
        for volume in pod.spec.get("volumes", []):
            if volume["name"] in written and "emptyDir" not in volume:
                component = pod.metadata["labels"]["app.kubernetes.io/component"]
                # The one that fetches models, and a report.
                assert (component, volume["name"]) in {("prepare", "weights"), ("loadtest", "report")}, pod.where
    for group in ray_groups(values).values():
        container = group["template"]["spec"]["containers"][0]
        env = {e["name"]: e.get("value") for e in container["env"]}
        cache = next(m for m in container["volumeMounts"] if str(env["VLLM_CACHE_ROOT"]).startswith(m["mountPath"]))
        volume = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == cache["name"])
        assert "emptyDir" in volume


@pytest.mark.parametrize("values", VALUES)
def test_only_the_autoscaler_sees_the_api_servers_token(values: str) -> None:
    cluster = rayservice(values)["spec"]["rayClusterConfig"]
    for pod in pods(values):
        for container in pod.containers:
            assert "api-token" not in [m["name"] for m in container.get("volumeMounts", [])]
    if cluster["enableInTreeAutoscaling"]:
        assert "api-token" in [m["name"] for m in cluster["autoscalerOptions"]["volumeMounts"]]
        context = cluster["autoscalerOptions"]["securityContext"]
        broken = [
            n for n, rule in policy.CONTAINER_RULES.items() if rule(cluster["autoscalerOptions"] | {"image": "a:1"})
        ]
        assert context["readOnlyRootFilesystem"]
        assert broken == []


def test_the_air_gapped_values_name_no_public_registry() -> None:
    images = {c["image"] for pod in pods("values-airgap.yaml") for c in pod.containers}
    assert {image.partition("/")[0] for image in images} == {"mirror.example.internal"}
    assert all("@sha256:" in image for image in images)
    for thing in of_kind("values-airgap.yaml", "NetworkPolicy"):
        for rule in thing["spec"].get("egress", []):
            assert all(p.get("ipBlock", {}).get("cidr") != "0.0.0.0/0" for p in rule["to"])


@pytest.mark.parametrize("values", VALUES)
def test_pods_get_their_drain(values: str) -> None:
    (app,) = yaml.safe_load(rayservice(values)["spec"]["serveConfigV2"])["applications"]
    assert app["name"] == "galerne"
    from tests.helm.rendering import galerne_config

    longest = max(m.get("drain_timeout_s", 600) for m in galerne_config(values)["models"])
    for name, group in ray_groups(values).items():
        spec = group["template"]["spec"]
        if name == "head":
            continue
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[1:3] == ["-m", "serving.cluster.node_drain"]
        assert int(longest) + 10 <= int(command[3]) < spec["terminationGracePeriodSeconds"]
    assert rayservice(values)["spec"]["rayClusterDeletionDelaySeconds"] >= int(longest)


def test_budgets_are_numbers_that_stay() -> None:
    budgets = {b["metadata"]["name"]: b["spec"] for b in of_kind("values-mig.yaml", "PodDisruptionBudget")}
    assert {name: spec["minAvailable"] for name, spec in budgets.items()} == {
        "trial-galerne-gateway": 1,
        "trial-galerne-mig-2g-20gb": 1,
    }
    for spec in budgets.values():
        assert "maxUnavailable" not in spec  # needs a scale subresource, which RayCluster has not
        assert any(matches(spec["selector"], pod.metadata["labels"]) for pod in pods("values-mig.yaml"))


def test_the_name_of_every_object_is_the_releases() -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in objects("helm4", EVERYTHING)]
    assert len(names) == len(set(names))
    assert all(name.startswith("trial-galerne") for _, name in names)


def test_traffic_that_kuberay_moves_reaches_every_pod_that_it_is_sent_to() -> None:
    # Its Services select workers of every group; others than gateways are closed to clients with the other strategies.
    opened = [
        thing["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for thing in of_kind("values-mixed-gpus.yaml", "NetworkPolicy")
        for rule in thing["spec"].get("ingress", [])
        if any(port["port"] == 8000 for port in rule["ports"])
        and any("istio-system" in str(peer) for peer in rule["from"])
    ]
    assert sorted(opened) == ["engine", "gateway"]
    for name, group in ray_groups("values-mixed-gpus.yaml").items():
        if name not in {"head", "gateway"}:
            probe = group["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
            assert (probe["path"], probe["port"]) == ("/-/healthz", 8000)


def test_a_gateway_is_ready_with_the_first_model_and_stays_so_without_one(tmp_path: Path) -> None:
    from serving.api import routes

    container = ray_groups(EVERYTHING)["gateway"]["template"]["spec"]["containers"][0]
    shell, option, script = container["readinessProbe"]["exec"]["command"]
    mark = tmp_path / "was-ready"
    script = script.replace("/tmp/galerne-was-ready", str(mark))
    asked = tmp_path / "asked"
    # Answers as the server would while `status` says so.
    (tmp_path / "wget").write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {asked}\nexit $STATUS\n')
    (tmp_path / "wget").chmod(0o755)

    def ready(status: int) -> bool:
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STATUS": str(status)}
        return subprocess.run([shell, option, script], env=env, check=False).returncode == 0

    assert [ready(8), ready(0), ready(0), ready(8)] == [False, True, True, False]
    paths = [line.partition(":8000")[2] for line in asked.read_text().splitlines()]
    assert paths == [routes.READY, routes.READY, routes.LIVE, routes.LIVE]
