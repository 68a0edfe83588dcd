"""Status: everything joined, and each source missing in turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.prometheus import Prometheus, reach
from serving.cluster.kubernetes.status import Status, read
from serving.errors import ClusterError
from tests.unit.kubernetes import kuberay
from tests.unit.kubernetes.conftest import NAMESPACE
from tests.unit.kubernetes.kuberay import NAME, pod
from tests.unit.kubernetes.release import PROMETHEUS, Run, populate
from tests.unit.kubernetes.server import ApiServer, Document, Fault, Seen


def status(server: ApiServer, client: Client, prometheus: Prometheus | None) -> Status:
    service = server.find("ray.io", "rayservices", NAMESPACE, NAME)
    return read(client, NAMESPACE, service, prometheus)


def test_everything_joined(server: ApiServer, client: Client) -> None:
    populate(server)
    found = status(server, client, reach(PROMETHEUS, client))
    assert found.notes == ()
    assert found.healthy()
    assert found.summary == "ready, 2 endpoints"
    model, gateway = found.models
    assert model.model == "m-v1.5", "the id, not the deployment's name"
    assert (model.state, model.ready, model.wanted, model.decision) == ("HEALTHY", 2, 3, "demand")
    assert (model.pods, model.restarts, model.gpus, model.images) == (2, 2, 2.0, ("galerne:1",))
    assert model.ttft == pytest.approx(0.987)
    assert model.itl == pytest.approx(0.998)
    assert model.cluster == "c-1 (active)"
    assert (gateway.model, gateway.pods) == ("gateway", 2)
    assert [(g.group, g.ready, g.pods, g.wanted, g.most) for g in found.groups] == [
        ("headgroup", 1, 1, 1, 1),
        ("gateway", 2, 2, 2, 4),
        ("h100", 2, 2, 2, 4),
    ]


def test_without_prometheus(server: ApiServer, client: Client) -> None:
    populate(server)
    found = status(server, client, None)
    model = found.models[0]
    assert model.state == "HEALTHY"
    assert (model.ready, model.wanted, model.pods, model.ttft, model.decision) == (None, None, None, None, "")
    assert found.groups[2].ready == 2
    assert any("Prometheus was not asked" in note for note in found.notes)


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b'{"status":"error","error":"boom"}', b'{"status":"success","warnings":["x"],"data":{"result":[]}}'],
)
def test_with_a_prometheus_that_cannot_be_believed(server: ApiServer, client: Client, answer: bytes) -> None:
    populate(server)
    server.proxy["prometheus:9090"] = lambda *_: answer
    found = status(server, client, reach(PROMETHEUS, client))
    assert found.models[0].ready is None
    assert any("not known" in note for note in found.notes)


def test_with_a_prometheus_that_is_down(server: ApiServer, client: Client, slept: list[float]) -> None:
    populate(server)
    server.proxy.clear()
    found = status(server, client, reach(PROMETHEUS, client))
    assert any("does not answer" in note for note in found.notes)
    assert found.models[0].state == "HEALTHY"


def test_without_serve(server: ApiServer, client: Client) -> None:
    populate(server)
    server.change(
        "ray.io",
        "rayservices",
        NAMESPACE,
        NAME,
        lambda d: d["status"]["activeServiceStatus"].pop("applicationStatuses"),
    )
    found = status(server, client, reach(PROMETHEUS, client))
    assert found.models == ()
    assert found.groups
    assert not found.healthy()
    assert any("Serve on c-1 reports no application" in note for note in found.notes)


def test_without_pods_the_rule_is_named(server: ApiServer, client: Client) -> None:
    populate(server)
    server.allow([("ray.io", "rayclusters", "list", NAMESPACE), ("", "services/proxy", "get", None)])
    found = status(server, client, reach(PROMETHEUS, client))
    assert found.models[0].ready == 2
    assert any('resources: ["pods"]' in note for note in found.notes)


def test_an_upgrade_under_way_shows_both(server: ApiServer, client: Client) -> None:
    populate(server)

    def upgrade(document: Document) -> None:
        document["status"]["pendingServiceStatus"] = {
            "rayClusterName": "c-2",
            "trafficRoutedPercent": 20,
            "applicationStatuses": {
                "galerne": {
                    "serveDeploymentStatuses": {"engine-m-v1-5": {"status": "UPDATING", "message": "1 of 2 started"}}
                }
            },
        }
        kuberay.set_condition(document["status"], "UpgradeInProgress", True)

    server.change("ray.io", "rayservices", NAMESPACE, NAME, upgrade)
    waiting = pod("c-2-h100-1", "c-2", "h100", "10.0.2.1")
    waiting["status"] = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}],
    }
    server.put("", "pods", waiting)
    found = status(server, client, reach(PROMETHEUS, client))
    assert "20% of the traffic on the new cluster" in found.summary
    assert [(m.model, m.cluster, m.state) for m in found.models] == [
        ("m-v1.5", "c-1 (active)", "HEALTHY"),
        ("gateway", "c-1 (active)", "HEALTHY"),
        ("m-v1.5", "c-2 (pending)", "UPDATING"),
    ]
    group = next(g for g in found.groups if (g.cluster, g.group) == ("c-2", "h100"))
    assert (group.ready, group.pods) == (0, 1)
    assert group.waiting == ("Unschedulable: 0/3 nodes",)
    assert not found.healthy()


def test_the_command(server: ApiServer, kubeconfig: Path, galerne: Run) -> None:
    populate(server)
    code, out, _ = galerne("status", "--kubeconfig", str(kubeconfig), "--prometheus", PROMETHEUS)
    assert code == 0
    assert "m-v1.5" in out
    assert "98.7%" in out
    code, out, _ = galerne("status", "--kubeconfig", str(kubeconfig), "--json")
    assert json.loads(out)["models"][0]["state"] == "HEALTHY"
    kind = server.change
    kind("ray.io", "rayservices", NAMESPACE, NAME, lambda d: kuberay.set_condition(d["status"], "Ready", False))
    server.change("ray.io", "rayservices", NAMESPACE, NAME, lambda d: d["status"].pop("serviceStatus"))
    assert galerne("status", "--kubeconfig", str(kubeconfig))[0] == 3


def test_the_command_follows_changes(
    server: ApiServer, kubeconfig: Path, galerne: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    populate(server)
    printed: list[dict[str, object]] = []

    def note(document: dict[str, object]) -> None:
        printed.append(document)
        if len(printed) == 3:
            raise KeyboardInterrupt

    def change_once_watched(seen: Seen) -> bool:
        if seen.verb == "watch" and len(printed) == 1:
            for ready in (False, True):
                server.change(
                    "ray.io",
                    "rayservices",
                    NAMESPACE,
                    NAME,
                    lambda d, ready=ready: (
                        kuberay.set_condition(d["status"], "Ready", ready)
                        or d["status"].update(serviceStatus="Running" if ready else "")
                    ),
                )
        return False

    server.faults.append(Fault(change_once_watched))
    monkeypatch.setattr("serving.cli.cluster._print_json", note)
    code, _, _ = galerne("status", "--kubeconfig", str(kubeconfig), "--json", "--watch")
    assert [document["ready"] for document in printed] == [True, False, True]
    assert code == 3, "the last state that was shown whole"


@pytest.mark.parametrize("where", ["prometheus:9090", "service:x", "service:/p:1", "service:n/p", "ftp://x"])
def test_where_prometheus_may_be(client: Client, where: str) -> None:
    with pytest.raises(ClusterError, match="service:NAMESPACE/NAME:PORT"):
        reach(where, client)


def test_no_service_and_several(server: ApiServer, kubeconfig: Path, galerne: Run) -> None:
    code, _, err = galerne("status", "--kubeconfig", str(kubeconfig))
    assert code == 1
    assert "not exactly one RayService (none)" in err
    for name in ("a", "b"):
        server.put("ray.io", "rayservices", kuberay.service() | {"metadata": {"name": name, "namespace": NAMESPACE}})
    code, _, err = galerne("status", "--kubeconfig", str(kubeconfig))
    assert "(a, b)" in err
    code, _, err = galerne("status", "--kubeconfig", str(kubeconfig), "--service", "c")
    assert "no RayService c" in err
