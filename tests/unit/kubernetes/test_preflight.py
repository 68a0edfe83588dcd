"""Preflight: each way in which a cluster may not do, and what is said of it; over HTTP, and the checks by themselves."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.cluster.kubernetes import checks, values
from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.facts import Facts, Unknown, gather
from serving.cluster.kubernetes.findings import Finding
from serving.cluster.kubernetes.quantity import quantity
from serving.errors import ConfigError
from tests.unit.kubernetes.conftest import NAMESPACE, write_kubeconfig
from tests.unit.kubernetes.release import VALUES, Run, deployment, node, populate
from tests.unit.kubernetes.server import ApiServer
from tests.unit.kubernetes.shared import ROOT

POOL = {"galerne/pool": "h100"}


def found(client: Client, document: dict[str, Any] | None = None) -> dict[str, Finding]:
    needs = values.Needs() if document is None else values.needs(document)
    return {f.what: f for f in checks.check(gather(client, NAMESPACE, in_pod=False), needs)}


def test_a_cluster_that_will_do(server: ApiServer, client: Client) -> None:
    populate(server)
    levels = {what: finding.level for what, finding in found(client, VALUES).items()}
    assert set(levels.values()) == {"ok"}, {w: level for w, level in levels.items() if level != "ok"}
    assert len(levels) >= 15


def test_an_empty_cluster(server: ApiServer, client: Client) -> None:
    by_name = found(client, VALUES)
    for what in ("crds ray.io/v1", "kuberay", "gpus nvidia.com/gpu", "group h100", "claim galerne-weights", "ingress"):
        assert by_name[what].level == "fail", what
        assert by_name[what].fix
    assert by_name["pod security"].level == "warn"


Change = Callable[[ApiServer, dict[str, Any]], None]


def _set(path: str, value: Any) -> Change:
    def change(_: ApiServer, document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for step in parents:
            document = document.setdefault(step, {})
        document[last] = value

    return change


def _put(group: str, resource: str, document: dict[str, Any]) -> Change:
    def change(server: ApiServer, _: dict[str, Any]) -> None:
        server.put(group, resource, copy.deepcopy(document))

    return change


def _drop(group: str, resource: str, namespace: str, name: str) -> Change:
    return lambda server, _: server.delete(group, resource, namespace, name)


def _version(version: str) -> Change:
    return lambda server, _: setattr(server, "git_version", version)


def _advertise(address: str) -> Change:
    return lambda server, _: setattr(server, "advertised", address)


def _undiscover(group: str) -> Change:
    def change(server: ApiServer, _: dict[str, Any]) -> None:
        server.discovery.pop(group)

    return change


def _quota(**hard: str) -> Change:
    return _put(
        "",
        "resourcequotas",
        {
            "metadata": {"name": "q", "namespace": NAMESPACE},
            "status": {"hard": {k.replace("__", "."): v for k, v in hard.items()}, "used": {"pods": "1"}},
        },
    )


def _limits(**most: str) -> Change:
    spec = {"limits": [{"type": "Container", "max": most}]}
    return _put("", "limitranges", {"metadata": {"name": "l", "namespace": NAMESPACE}, "spec": spec})


def _nodes(*nodes: dict[str, Any]) -> Change:
    def change(server: ApiServer, _: dict[str, Any]) -> None:
        for name in ("node-1", "node-2", "system-1"):
            server.delete("", "nodes", "", name)
        server.put("", "nodes", node("system-1"))
        for document in nodes:
            server.put("", "nodes", copy.deepcopy(document))

    return change


def _both(*changes: Change) -> Change:
    def change(server: ApiServer, document: dict[str, Any]) -> None:
        for one in changes:
            one(server, document)

    return change


FLANNEL = {"metadata": {"name": "kube-flannel-ds", "namespace": "kube-flannel"}}
CILIUM = {"metadata": {"name": "cilium", "namespace": "kube-system"}}
NODE_DNS = {"metadata": {"name": "node-local-dns", "namespace": "kube-system"}}
CONTROL_PLANE = node("control-1", 0, {}, [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}])
CONTROL_PLANE["status"]["addresses"] = [{"type": "InternalIP", "address": "10.0.0.10"}]
TAINT = {"key": "spot", "value": "true", "effect": "NoSchedule"}
GROUP = {**VALUES["workerGroups"]["h100"]}
OLD_OPERATOR = deployment(
    "kuberay-operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}, "operator:v1.5.1"
)
NO_OPERATOR = {**OLD_OPERATOR, "status": {}}
CLASS = {"metadata": {"name": "managed-csi"}, "provisioner": "disk.csi.azure.com"}


@pytest.mark.parametrize(
    ("change", "what", "level", "says"),
    [
        (_version("v1.31.9"), "version", "fail", "1.31.9"),
        (_version("v1.36.0-eks-1"), "version", "ok", "tested"),
        (_version("v1.40.0"), "version", "warn", "newer"),
        (_version("nonsense"), "version", "warn", "nonsense"),
        (_undiscover("ray.io/v1"), "crds ray.io/v1", "fail", "rayservices"),
        (_undiscover("monitoring.coreos.com/v1alpha1"), "crds monitoring.coreos.com/v1alpha1", "fail", "scrapeconfigs"),
        (_undiscover("keda.sh/v1alpha1"), "crds keda.sh/v1alpha1", "fail", "scaledobjects"),
        (_undiscover("external-secrets.io/v1"), "crds external-secrets.io/v1", "fail", "externalsecrets"),
        (_drop("apps", "deployments", "kuberay-system", "kuberay-operator"), "kuberay", "fail", "no operator"),
        (_put("apps", "deployments", OLD_OPERATOR), "kuberay", "warn", "older than 1.7"),
        (_put("apps", "deployments", NO_OPERATOR), "kuberay", "fail", "not available"),
        (_set("upgrade.strategy", "NewClusterWithIncrementalUpgrade"), "kuberay gate", "fail", "feature gate"),
        (_nodes(), "gpus nvidia.com/gpu", "fail", "GPU operator"),
        (_nodes(node("n", 0, POOL | {"nvidia.com/gpu.present": "true"})), "gpu nodes", "warn", "device-plugin"),
        (_nodes(node("n", 4, {"galerne/pool": "other"})), "group h100", "fail", "galerne/pool=h100"),
        (_nodes(node("n", 4, POOL, [TAINT])), "group h100", "fail", "spot=true:NoSchedule"),
        (_nodes(node("n", 4, POOL, cpu="8")), "group h100", "fail", "16 cpu"),
        (_nodes(node("n", 1, POOL)), "group h100", "warn", "1 place"),
        (_nodes(node("n", 4, POOL) | {"spec": {"unschedulable": True}}), "group h100", "fail", "no node is large"),
        (_put("", "nodes", node("system-1", taints=[TAINT])), "group redis", "fail", "spot=true:NoSchedule"),
        (_put("", "nodes", node("system-1", taints=[TAINT])), "group verify", "warn", "spot=true:NoSchedule"),
        (_set("workerGroups.h100.gpuResource", "nvidia.com/mig-3g.40gb"), "gpus nvidia.com/mig-3g.40gb", "fail", "mig.config"),
        (_set("redis.storageClass", "fast"), "storage for Redis", "fail", "classes here: managed-csi"),
        (
            _both(_put("storage.k8s.io", "storageclasses", CLASS), _set("redis.storageClass", "")),
            "storage for Redis",
            "fail",
            "no default",
        ),
        (_drop("", "persistentvolumeclaims", NAMESPACE, "galerne-weights"), "claim galerne-weights", "fail", "not there"),
        (_drop("apps", "deployments", "kube-system", "coredns"), "dns", "warn", "not found"),
        (_quota(**{"requests.nvidia.com/gpu": "1"}), "quota q", "fail", "2 of 1 left"),
        (_quota(pods="5"), "quota q", "fail", "pods: 6 of 4 left"),
        (_quota(pods="7"), "quota q", "ok", "room"),
        (_quota(**{"requests.memory": "64Gi"}), "quota q", "fail", "requests.memory"),
        (_limits(memory="64Gi"), "limit range l", "fail", "h100 asks for 128Gi memory"),
        (_limits(memory="128Gi"), "limit range l", "ok", "fits"),
        (_put("", "namespaces", {"metadata": {"name": NAMESPACE}}), "pod security", "warn", "not enforced"),
        (_drop("apps", "daemonsets", "kube-system", "calico-node"), "network policy", "warn", "not known"),
        (_set("networkPolicy.enabled", False), "network policy", "warn", "off"),
        (
            _both(_drop("apps", "daemonsets", "kube-system", "calico-node"), _put("apps", "daemonsets", FLANNEL)),
            "network policy",
            "fail",
            "no effect",
        ),
        (_set("networkPolicy.apiServer", []), "api server", "fail", "is empty"),
        (_set("networkPolicy.apiServer", ["10.0.0.0/29"]), "api server", "warn", "10.0.0.10, by its own word"),
        (_set("networkPolicy.apiServer", ["10.0.0.9/32", "10.0.0.8/29"]), "api server", "ok", "10.0.0.10"),
        (_advertise("api.example:443"), "api server", "warn", "says api.example"),
        (_advertise(""), "api server", "warn", "says nothing"),
        (_advertise("[fd00::1]:6443"), "api server", "warn", "fd00::1, by its own word"),
        (
            _both(_put("apps", "daemonsets", CILIUM), _put("", "nodes", CONTROL_PLANE)),
            "api server",
            "warn",
            "10.0.0.10 in networkPolicy.apiServer is a node's",
        ),
        (_put("apps", "daemonsets", CILIUM), "api server", "ok", "10.0.0.10"),
        (_put("", "nodes", CONTROL_PLANE), "api server", "ok", "10.0.0.10"),
        (
            _both(_put("apps", "daemonsets", CILIUM), _put("", "nodes", CONTROL_PLANE), _set("networkPolicy.cilium", True)),
            "api server",
            "ok",
            "entity",
        ),
        (_set("networkPolicy.cilium", True), "crds cilium.io/v2", "fail", "ciliumnetworkpolicies"),
        (_put("apps", "daemonsets", NODE_DNS), "dns on nodes", "warn", "169.254.20.10"),
        (
            _both(_put("apps", "daemonsets", NODE_DNS), _set("networkPolicy.dns", {"cidrs": ["169.254.20.10/32"]})),
            "dns on nodes",
            "ok",
            "169.254.20.10/32 opened",
        ),
        (_set("ingress.className", "traefik"), "ingress", "fail", "classes here: nginx"),
        (_set("image.repository", "galerne/galerne"), "images", "warn", "galerne/galerne"),
        (
            _set("config.models", [{"id": "m", "source": "hf:org/model"}]),
            "egress",
            "fail",
            "hf:org/model",
        ),
    ],
)  # fmt: skip
def test_one_thing_amiss(server: ApiServer, client: Client, change: Change, what: str, level: str, says: str) -> None:
    populate(server)
    document = copy.deepcopy(VALUES)
    change(server, document)
    finding = found(client, document)[what]
    assert finding.level == level
    assert says in " ".join((finding.found, finding.why, finding.fix))
    if level != "ok":
        assert finding.why
        assert finding.fix


def test_a_pool_that_may_grow_from_zero_is_no_failure(server: ApiServer, client: Client) -> None:
    populate(server)
    _nodes()(server, {})
    document = copy.deepcopy(VALUES)
    document["workerGroups"]["h100"]["min"] = 0
    by_name = found(client, document)
    assert by_name["group h100"].level == "warn"
    assert by_name["gpus nvidia.com/gpu"].level == "warn"


def test_what_may_not_be_seen_is_never_ok() -> None:
    hidden = Unknown("may not list nodes", "grant a ClusterRole")
    facts = Facts(
        NAMESPACE, "v1.34.0", hidden, hidden, hidden, hidden, hidden, hidden, hidden, hidden, hidden, hidden, hidden
    )
    findings = checks.check(facts, values.needs(VALUES))
    unseen = [f for f in findings if f.found == "not looked at"]
    assert len(unseen) >= 10
    assert all(f.level == "warn" and f.fix == "grant a ClusterRole" for f in unseen)
    assert {f.what for f in findings if f.level == "ok"} <= {"version", "images"}


def test_a_refusal_hides_nothing_else_and_names_the_rule(server: ApiServer, client: Client) -> None:
    populate(server)
    server.allow([("", "nodes", "list", None), ("", "namespaces", "get", NAMESPACE)])
    by_name = found(client, VALUES)
    assert by_name["group h100"].level == "ok"
    assert by_name["pod security"].level == "ok"
    assert by_name["quota"].level == "warn"
    assert (
        f'a Role in namespace {NAMESPACE} with {{apiGroups: [""], resources: ["resourcequotas"], verbs: ["list"]}}'
        in by_name["quota"].fix
    )
    assert 'a ClusterRole with {apiGroups: ["apps"], resources: ["deployments"]' in by_name["kuberay"].fix


def test_in_a_pod_names_are_resolved(server: ApiServer, client: Client) -> None:
    populate(server)
    facts = gather(client, NAMESPACE, in_pod=True, resolve=lambda name: name != "kubernetes.default.svc")
    by_name = {f.what: f for f in checks.check(facts, values.Needs())}
    assert by_name["dns"].level == "fail"


def test_the_command(server: ApiServer, kubeconfig: Path, tmp_path: Path, galerne: Run) -> None:
    populate(server)
    file, over = tmp_path / "values.yaml", tmp_path / "over.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    over.write_text("redis: {storageClass: fast}\n")
    code, out, _ = galerne("preflight", "--kubeconfig", str(kubeconfig), "--values", str(file))
    assert code == 0
    assert "15 ok" in out or "ok" in out
    code, out, _ = galerne("preflight", "--kubeconfig", str(kubeconfig), "-f", str(file), "-f", str(over), "--json")
    assert code == 3
    document = json.loads(out)
    assert document["worst"] == "fail"
    assert [f["what"] for f in document["findings"] if f["level"] == "fail"] == ["storage for Redis"]
    server.git_version = "v1.99.0"
    assert galerne("preflight", "--kubeconfig", str(kubeconfig), "-f", str(file))[0] == 0
    assert galerne("preflight", "--kubeconfig", str(kubeconfig), "-f", str(file), "--strict")[0] == 3


def test_no_cluster_is_an_error_and_no_finding(tmp_path: Path, galerne: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.cluster.kubernetes.client.FIRST_PAUSE_S", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = write_kubeconfig(tmp_path / "k", f"http://127.0.0.1:{port}")
    code, out, err = galerne("preflight", "--kubeconfig", str(config), "--json")
    assert code == 1
    assert out == ""
    assert f"127.0.0.1:{port} cannot be reached" in err


def test_a_stranger_is_told_so(server: ApiServer, tmp_path: Path, galerne: Run) -> None:
    config = write_kubeconfig(tmp_path / "k", server.url, token="stale")
    code, _, err = galerne("status", "--kubeconfig", str(config))
    assert code == 1
    assert "does not know you" in err


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00"])
def test_what_is_no_values_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        values.read([path])


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"workerGroups": None},
        {"config": {"models": "x", "gateway": None}, "workerGroups": {"a": None, "b": {"cpu": "many"}}},
    ],
)
def test_values_of_any_form_are_read(document: dict[str, Any]) -> None:
    needs = values.needs(document)
    assert {"head", "gateway"} <= {group.name for group in needs.groups}


def test_gateways_and_images_that_nothing_is_said_of() -> None:
    needs = values.needs({"workerGroups": {"a": {"image": {"repository": "registry.example/cpu"}}, "b": {}}})
    (gateway,) = [group for group in needs.groups if group.name == "gateway"]
    assert (gateway.minimum, gateway.maximum) == (2, 2)  # the chart's default
    assert "registry.example/cpu" in needs.images


def test_the_charts_own_values_are_understood() -> None:
    """Held against the chart where it is there: a name that it changes must not silently ask for nothing."""
    file = ROOT / "helm" / "galerne" / "values-aks.yaml"
    if not file.exists():
        pytest.skip("the chart is not in this tree")
    needs = values.read([file.with_name("values.yaml"), file])
    by_name = {group.name: group for group in needs.groups}
    assert by_name["h100"].requests["nvidia.com/gpu"] >= 1
    assert by_name["h100"].node_selector
    assert by_name["h100"].tolerations
    assert by_name["gateway"].minimum >= 2
    assert needs.claims
    assert needs.external_secrets
    assert needs.prometheus_operator
    assert needs.network_policies
    assert {volume.what for volume in needs.volumes} == {"Redis"}


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), (2, 2), ("500m", 0.5), ("16Gi", 16 * 1024**3), ("1k", 1000), ("1e3", 1000), ("1E", 1e18), ("0.5", 0.5)],
)
def test_quantities(text: Any, number: float) -> None:
    assert quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "many", "1 Gi", "1Zi", None])
def test_what_is_no_quantity(text: Any) -> None:
    with pytest.raises(ValueError, match="quantity"):
        quantity(text)
