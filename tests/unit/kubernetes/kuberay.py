"""A release as the chart makes it, and KubeRay 1.7's handling of its upgrades, simulated step by step.

`KubeRay.step` is one reconciliation by the rules of KubeRay's rayservice_controller (incremental upgrade, rollback of it,
blue-green): what is told of shares, capacities and promotions is done in its order. The pods' specification is compared
without replicas and tolerations, as KubeRay's hash is.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from tests.unit.kubernetes.server import ApiServer, Document

NAMESPACE = "galerne"
NAME = "galerne"
RELEASE = "galerne/news"
NAMED = {"name": "GALERNE_RELEASE", "value": RELEASE}
HEALTHY = {
    "galerne": {
        "status": "RUNNING",
        "serveDeploymentStatuses": {"gateway": {"status": "HEALTHY"}, "engine-m-v1-5": {"status": "HEALTHY"}},
    }
}


def pod_spec(image: str, **more: Any) -> Document:
    container = {
        "name": "ray",
        "image": image,
        "volumeMounts": [{"name": "config", "mountPath": "/etc/galerne", "readOnly": True}],
        **more,
    }
    secret = {"secretName": "galerne-config", "items": [{"key": "galerne.yaml", "path": "galerne.yaml"}]}
    return {"containers": [container], "volumes": [{"name": "config", "secret": secret}]}


def service(strategy: str = "NewClusterWithIncrementalUpgrade", image: str = "registry/galerne:1") -> Document:
    upgrade: Document = {"type": strategy}
    if strategy == "NewClusterWithIncrementalUpgrade":
        upgrade["clusterUpgradeOptions"] = {
            "maxSurgePercent": 25,
            "stepSizePercent": 10,
            "intervalSeconds": 60,
            "gatewayClassName": "istio",
        }
    groups = [
        {
            "groupName": name,
            "replicas": 2,
            "minReplicas": 1,
            "maxReplicas": 4,
            "template": {"spec": pod_spec(image)},
        }
        for name in ("gateway", "h100")
    ]
    return {
        "metadata": {"name": NAME, "namespace": NAMESPACE, "annotations": {"meta.helm.sh/release-name": "galerne"}},
        "spec": {
            "upgradeStrategy": upgrade,
            "serveConfigV2": "applications:\n- name: galerne\n  import_path: deployments.app:build\n"
            "  args:\n    config_path: /etc/galerne/galerne.yaml\n    revision: before\n",
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {"template": {"spec": pod_spec(image, env=[NAMED])}},
                "workerGroupSpecs": groups,
            },
        },
        "status": {
            "activeServiceStatus": {"rayClusterName": "c-1", "applicationStatuses": copy.deepcopy(HEALTHY)},
            "pendingServiceStatus": {},
            "serviceStatus": "Running",
            "numServeEndpoints": 2,
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints", "message": ""},
                {"type": "UpgradeInProgress", "status": "False", "reason": "NoPendingCluster", "message": ""},
            ],
        },
    }


def pod(name: str, cluster: str, group: str, ip: str, node: str = "node-1", **spec: Any) -> Document:
    return {
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {
                "ray.io/cluster": cluster,
                "ray.io/group": group,
                "ray.io/node-type": "head" if group == "headgroup" else "worker",
            },
        },
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 600,
            "containers": [
                {
                    "name": "ray",
                    "image": "registry/galerne:1",
                    "lifecycle": {"preStop": {"exec": {"command": ["drain"]}}},
                    "resources": {"limits": {"nvidia.com/gpu": "1"} if group == "h100" else {}},
                }
            ],
            **spec,
        },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "ray", "restartCount": 1 if group == "h100" else 0}],
        },
    }


def hashed(spec: Document) -> str:
    spec = copy.deepcopy(spec)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for field in ("replicas", "minReplicas", "maxReplicas", "scaleStrategy"):
            group.pop(field, None)
        group["template"]["spec"].pop("tolerations", None)
    return json.dumps(spec, sort_keys=True)


class KubeRay:
    """Reconciles one RayService of an ApiServer; `now_s` is the test's clock."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        document = server.find("ray.io", "rayservices", NAMESPACE, NAME)
        self.hashes = {"c-1": hashed(document["spec"]["rayClusterConfig"])}
        self.ready_after_s = 120.0
        self.fails = False
        self.created_s: dict[str, float] = {}
        # (traffic of the new cluster, its capacity, the old one's capacity) at each step.
        self.shares: list[tuple[int, int, int]] = []
        self.deleted: list[str] = []

    def step(self, now_s: float) -> None:
        def change(document: Document) -> None:
            before = json.dumps(document, sort_keys=True)
            self._reconcile(document, now_s)
            self.changed = json.dumps(document, sort_keys=True) != before

        self.changed = False
        with self.server.lock:
            document = self.server.find("ray.io", "rayservices", NAMESPACE, NAME)
            change(document)
            if self.changed:
                self.server.put("ray.io", "rayservices", document)

    def _reconcile(self, document: Document, now_s: float) -> None:
        spec, status = document["spec"], document["status"]
        goal = hashed(spec["rayClusterConfig"])
        active, pending = status["activeServiceStatus"], status["pendingServiceStatus"]
        incremental = spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
        name = pending.get("rayClusterName")
        rolling = condition(status, "RollbackInProgress")
        if name and incremental:
            rolling = goal != self.hashes[name]
            set_condition(status, "RollbackInProgress", rolling)
        cluster = name or active["rayClusterName"]
        if not (incremental and rolling) and goal != self.hashes[cluster]:
            if name:
                self.deleted.append(name)
            name = f"c-{len(self.hashes) + 1}"
            self.hashes[name] = goal
            self.created_s[name] = now_s
            status["pendingServiceStatus"] = pending = {"rayClusterName": name}
            if incremental:
                pending |= {"targetCapacity": 0, "trafficRoutedPercent": 0, "moved": now_s}
                active.setdefault("targetCapacity", 100)
                active.setdefault("trafficRoutedPercent", 100)
        if name:
            ready = now_s - self.created_s[name] >= self.ready_after_s and not self.fails
            state = "RUNNING" if ready else "DEPLOY_FAILED" if self.fails else "DEPLOYING"
            pending["applicationStatuses"] = copy.deepcopy(HEALTHY)
            pending["applicationStatuses"]["galerne"] |= {"status": state, "message": "no such weights"}
            if incremental:
                self._shift(spec["upgradeStrategy"]["clusterUpgradeOptions"], active, pending, rolling, ready, now_s)
                self._finish(status, active, pending, rolling)
            elif ready:
                self.deleted.append(active["rayClusterName"])
                status["activeServiceStatus"], status["pendingServiceStatus"] = pending, {}
        pending = status["pendingServiceStatus"]
        set_condition(status, "UpgradeInProgress", bool(pending))
        if not pending:
            drop_condition(status, "RollbackInProgress")

    def _shift(
        self, options: Document, active: Document, pending: Document, rolling: bool, ready: bool, now_s: float
    ) -> None:
        step, surge, interval = (options[k] for k in ("stepSizePercent", "maxSurgePercent", "intervalSeconds"))
        assert 0 <= step <= surge <= 100, "KubeRay's validation"
        assert interval > 0, "KubeRay's validation"
        a, p = active["trafficRoutedPercent"], pending["trafficRoutedPercent"]
        target = active if rolling else pending
        still = a == active["targetCapacity"] if rolling else p == pending["targetCapacity"]
        if not still and now_s - target.get("moved", 0) >= interval:
            if rolling:
                a = min(100, a + step, active["targetCapacity"])
                p = 100 - a
            elif ready:
                p = min(100, p + step, pending["targetCapacity"])
                a = 100 - p
            if a != active["trafficRoutedPercent"]:
                target["moved"] = now_s
            active["trafficRoutedPercent"], pending["trafficRoutedPercent"] = a, p
        over = active["targetCapacity"] + pending["targetCapacity"] > 100
        if rolling and active["targetCapacity"] == a:
            if over:
                pending["targetCapacity"] = max(0, pending["targetCapacity"] - surge)
            else:
                active["targetCapacity"] = min(100, active["targetCapacity"] + surge)
        elif not rolling and pending["targetCapacity"] == p:
            if over:
                active["targetCapacity"] = max(0, active["targetCapacity"] - surge)
            else:
                pending["targetCapacity"] = min(100, pending["targetCapacity"] + surge)
        self.shares.append((p, pending["targetCapacity"], active["targetCapacity"]))

    def _finish(self, status: Document, active: Document, pending: Document, rolling: bool) -> None:
        if rolling and active["targetCapacity"] == active["trafficRoutedPercent"] == 100:
            if pending["targetCapacity"] == pending["trafficRoutedPercent"] == 0:
                self.deleted.append(pending["rayClusterName"])
                status["pendingServiceStatus"] = {}
        elif not rolling and active["targetCapacity"] == 0 and pending["trafficRoutedPercent"] == 100:
            self.deleted.append(active["rayClusterName"])
            status["activeServiceStatus"], status["pendingServiceStatus"] = pending, {}


def condition(status: Document, kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in status["conditions"])


def set_condition(status: Document, kind: str, value: bool) -> None:
    drop_condition(status, kind)
    status["conditions"].append({"type": kind, "status": str(bool(value)), "reason": "", "message": ""})


def drop_condition(status: Document, kind: str) -> None:
    status["conditions"] = [c for c in status["conditions"] if c["type"] != kind]
