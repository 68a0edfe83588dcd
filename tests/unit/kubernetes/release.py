"""A cluster with a release on it: what a real one would show `galerne cluster`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.kubernetes import kuberay
from tests.unit.kubernetes.kuberay import NAMESPACE, pod
from tests.unit.kubernetes.server import ApiServer, Document

OPERATOR_IMAGE = "registry.example/kuberay/operator:v1.7.0"
DISCOVERY = {
    "ray.io/v1": ["rayservices", "rayclusters", "rayjobs"],
    "monitoring.coreos.com/v1": ["podmonitors", "prometheusrules", "servicemonitors"],
    "monitoring.coreos.com/v1alpha1": ["scrapeconfigs"],
    "external-secrets.io/v1": ["externalsecrets"],
    "gateway.networking.k8s.io/v1": ["gateways", "httproutes"],
    "keda.sh/v1alpha1": ["scaledobjects", "triggerauthentications"],
}
PROMETHEUS = "service:monitoring/prometheus:9090"


def deployment(name: str, namespace: str, labels: dict[str, str], image: str = "x:1", args: Any = ()) -> Document:
    container = {"name": "main", "image": image, "args": list(args)}
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"template": {"spec": {"containers": [container]}}},
        "status": {"availableReplicas": 1},
    }


def node(
    name: str, gpus: int = 0, labels: dict[str, str] | None = None, taints: Any = (), **allocatable: str
) -> Document:
    sizes = {"cpu": "64", "memory": "500Gi", "pods": "110"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": list(taints)},
        "status": {
            "allocatable": sizes | {k.replace("__", "/"): v for k, v in allocatable.items()},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def populate(server: ApiServer) -> None:
    server.discovery = dict(DISCOVERY)
    server.put(
        "",
        "namespaces",
        {"metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
    )
    gpu = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    server.put("", "nodes", node("node-1", 4, {"galerne/pool": "h100"}, [gpu]))
    server.put("", "nodes", node("node-2", 4, {"galerne/pool": "h100"}, [gpu]))
    server.put("", "nodes", node("system-1"))
    for kind, document in (
        (
            "deployments",
            deployment(
                "kuberay-operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}, OPERATOR_IMAGE
            ),
        ),
        ("deployments", deployment("coredns", "kube-system", {"k8s-app": "kube-dns"})),
        ("daemonsets", {"metadata": {"name": "calico-node", "namespace": "kube-system"}}),
        ("daemonsets", {"metadata": {"name": "nvidia-device-plugin-daemonset", "namespace": "gpu-operator"}}),
    ):
        server.put("apps", kind, document)
    server.put(
        "storage.k8s.io",
        "storageclasses",
        {
            "metadata": {"name": "managed-csi", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
            "provisioner": "disk.csi.azure.com",
        },
    )
    server.put("networking.k8s.io", "ingressclasses", {"metadata": {"name": "nginx"}})
    server.put(
        "",
        "persistentvolumeclaims",
        {"metadata": {"name": "galerne-weights", "namespace": NAMESPACE}, "status": {"phase": "Bound"}},
    )
    server.put("ray.io", "rayservices", kuberay.service())
    groups = kuberay.service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    server.put(
        "ray.io",
        "rayclusters",
        {"metadata": {"name": "c-1", "namespace": NAMESPACE}, "spec": {"workerGroupSpecs": groups}},
    )
    for name, group, ip, where in (
        ("c-1-head", "headgroup", "10.0.1.9", "system-1"),
        ("c-1-gw-1", "gateway", "10.0.1.1", "system-1"),
        ("c-1-gw-2", "gateway", "10.0.1.2", "node-2"),
        ("c-1-h100-1", "h100", "10.0.1.3", "node-1"),
        ("c-1-h100-2", "h100", "10.0.1.4", "node-2"),
    ):
        server.put("", "pods", pod(name, "c-1", group, ip, where))
        server.logs[name, "ray", False] = b"2026-11-25T10:00:00Z started\n"
    server.put(
        "",
        "events",
        {
            "metadata": {"name": "e1", "namespace": NAMESPACE},
            "reason": "Unhealthy",
            "message": "Readiness probe failed",
            "involvedObject": {"kind": "Pod", "name": "c-1-gw-1"},
        },
    )
    server.proxy["prometheus:9090"] = answer


def being_removed(server: ApiServer, seconds: float = 3600, now_s: float | None = None) -> None:
    """The release after `helm uninstall`, without its RayService having been deleted first: Redis' password is gone."""
    populate(server)
    asked_s = (time.time() if now_s is None else now_s) - seconds
    asked = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(asked_s))
    for name in [name for _, name in server.objects["", "pods"]]:
        server.delete("", "pods", NAMESPACE, name)
    made = {"ray.io/originated-from-cr-name": kuberay.NAME}
    for kind, name, finalizer, labels in (
        ("rayclusters", "c-1", "ray.io/gcs-ft-redis-cleanup-finalizer", made),
        ("rayservices", kuberay.NAME, "ray.io/rayservice-finalizer", {}),
    ):
        asked_to_go = {"finalizers": [finalizer], "deletionTimestamp": asked, "labels": labels, "uid": f"uid-of-{name}"}
        server.change("ray.io", kind, NAMESPACE, name, lambda d, more=asked_to_go: d["metadata"].update(more))  # type: ignore[misc]
    labels = {"ray.io/cluster": "c-1", "ray.io/node-type": "redis-cleanup"}
    server.put("batch", "jobs", {"metadata": {"name": "c-1-redis-cleanup", "namespace": NAMESPACE, "labels": labels}})
    waits = {"reason": "CreateContainerConfigError", "message": 'secret "galerne-redis" not found'}
    server.put(
        "",
        "pods",
        {
            "metadata": {"name": "c-1-redis-cleanup-x", "namespace": NAMESPACE, "labels": labels},
            "status": {"phase": "Pending", "containerStatuses": [{"name": "ray-head", "state": {"waiting": waits}}]},
        },
    )


VALUES = {
    "config": {
        "gateway": {"replicas": {"min": 2, "max": 6}},
        "models": [{"id": "m-v1.5", "source": "path:/models/m"}],
    },
    "workerGroups": {
        "h100": {
            "acceleratorType": "H100",
            "cpu": 16,
            "memory": "128Gi",
            "min": 2,
            "max": 8,
            "nodeSelector": {"galerne/pool": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        }
    },
    "weights": {"volume": {"persistentVolumeClaim": {"claimName": "galerne-weights"}}},
    "image": {"repository": "registry.example.com/galerne"},
    "redis": {"storageClass": "managed-csi", "image": "registry.example.com/redis"},
    "ingress": {"enabled": True, "className": "nginx"},
    "metrics": {"enabled": True},
    "networkPolicy": {"apiServer": ["10.0.0.10/32"]},
    "keda": {"models": {"m-v1.5": {}}},
    "tenants": {"externalSecret": {"enabled": True}},
}

# Instant vectors by a part of the query.
ANSWERS: dict[str, list[tuple[dict[str, str], float]]] = {
    "model:galerne_replicas_ready:max": [({"model": "m-v1.5"}, 2)],
    "galerne_autoscaler_target_replicas": [({"model": "m-v1.5"}, 3)],
    "model:galerne_slo_missed:ratio_rate1h": [
        ({"model": "m-v1.5", "objective": "ttft"}, 0.013),
        ({"model": "m-v1.5", "objective": "itl"}, 0.002),
    ],
    "galerne_autoscaler_decisions_total": [
        ({"model": "m-v1.5", "reason": "demand"}, 20),
        ({"model": "m-v1.5", "reason": "hold"}, 4),
    ],
    "vllm:num_requests_running": [
        ({"model": "m-v1.5", "instance": "10.0.1.3:40123"}, 5),
        ({"model": "m-v1.5", "instance": "10.0.1.4:39111"}, 7),
    ],
}


def answer(_: str, query: dict[str, str]) -> bytes:
    """Prometheus. Gateways of 10.0.3.* miss their targets; 500 requests are counted wherever somebody asks."""
    if "increase(galerne_slo" in query["query"] or "increase(galerne_requests" in query["query"]:
        bad = "met=" in query["query"] or "status=" in query["query"]
        share = 0.3 if "10\\\\.0\\\\.3" in query["query"] and "met=" in query["query"] else 0.004
        return _vector([({}, 500 * share if bad else 500)])
    rows = next((rows for part, rows in ANSWERS.items() if part in query["query"]), [])
    return _vector(rows)


def _vector(rows: list[tuple[dict[str, str], float]]) -> bytes:
    result = [{"metric": labels, "value": [1, str(value)]} for labels, value in rows]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()


Run = Callable[..., tuple[int, str, str]]


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """`galerne cluster …` in this process: exit code, output, errors."""
    from serving.cli import main

    monkeypatch.setattr(sys, "argv", ["galerne", "cluster", *arguments])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def operate(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """KubeRay and a kubelet at work, on a clock that goes on when a command waits."""
    operator = kuberay.KubeRay(server)
    for index in (2, 3):
        server.put("", "pods", pod(f"c-{index}-gw", f"c-{index}", "gateway", f"10.0.{index}.1", "system-1"))
        server.logs[f"c-{index}-gw", "ray", False] = b"2026-11-25T10:00:00Z started\n"
    now_s = [1_000_000.0]
    ending: dict[str, float] = {}

    def evicted(document: Document) -> None:
        ending[document["metadata"]["name"]] = now_s[0] + 100

    def passes(_: float) -> None:
        for _ in range(4):
            now_s[0] += 30
            operator.step(now_s[0])
            for name in [name for name, at in ending.items() if now_s[0] >= at]:
                del ending[name]
                server.delete("", "pods", NAMESPACE, name)
        # Whoever watches the service looks at once.
        server.change(
            "ray.io", "rayservices", NAMESPACE, kuberay.NAME, lambda d: d["status"].update(lastUpdateTime=now_s[0])
        )

    server.on_eviction = evicted
    from serving.cli import cluster, cluster_rollout

    made = cluster_rollout.Run.__init__

    def init(self: Any, *arguments: Any, **more: Any) -> None:
        made(self, *arguments, **more, clock=lambda: now_s[0], pause=passes)

    monkeypatch.setattr(cluster_rollout.Run, "__init__", init)
    monkeypatch.setattr(cluster_rollout, "POLL_S", 1)
    clock = SimpleNamespace(
        sleep=passes, monotonic=lambda: now_s[0], time=time.time, strftime=time.strftime, gmtime=time.gmtime
    )
    monkeypatch.setattr(cluster, "time", clock)
