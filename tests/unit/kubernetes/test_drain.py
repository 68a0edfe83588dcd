"""Drains over HTTP: the order of what is asked, budgets, bounds, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.drain import ANNOTATION, Drain, cluster_with, complete
from serving.errors import ClusterError
from tests.unit.kubernetes.conftest import NAMESPACE
from tests.unit.kubernetes.release import Run, populate
from tests.unit.kubernetes.server import ApiServer, Document, Fault

LABELS = {"ray.io/group": "h100"}


def budget(server: ApiServer, allowed: int) -> None:
    server.put(
        "policy",
        "poddisruptionbudgets",
        {
            "metadata": {"name": "engines", "namespace": NAMESPACE},
            "spec": {"selector": {"matchLabels": LABELS}},
            "status": {"disruptionsAllowed": allowed},
        },
    )


class World:
    """A release, a kubelet that ends evicted pods after a while, and the time."""

    def __init__(self, server: ApiServer, client: Client) -> None:
        populate(server)
        self.server, self.client = server, client
        self.now_s = 0.0
        self.ends_after_s = 60.0
        self.ending: dict[str, float] = {}
        self.told: list[str] = []
        self.on_pause: Callable[[], None] = lambda: None
        server.on_eviction = self.evicted

    def evicted(self, pod: Document) -> None:
        name = pod["metadata"]["name"]
        self.ending[name] = self.now_s + self.ends_after_s
        self.server.change("", "pods", NAMESPACE, name, lambda d: d["metadata"].update(deletionTimestamp="now"))

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        for name, at in list(self.ending.items()):
            if self.now_s >= at:
                del self.ending[name]
                self.server.delete("", "pods", NAMESPACE, name)
        self.on_pause()

    def drain(self, limit_s: float = 3600) -> Drain:
        return Drain(self.client, NAMESPACE, limit_s, clock=lambda: self.now_s, pause=self.pause, tell=self.told.append)

    def group(self, name: str = "h100") -> Document:
        groups = self.server.find("ray.io", "rayclusters", NAMESPACE, "c-1")["spec"]["workerGroupSpecs"]
        return next(g for g in groups if g["groupName"] == name)

    def evictions(self) -> list[str]:
        return [s.name for s in self.server.seen if s.resource == "pods/eviction"]


@pytest.fixture
def world(server: ApiServer, client: Client) -> World:
    return World(server, client)


def test_a_node_is_cordoned_before_anything_is_evicted(world: World) -> None:
    reports = world.drain().node("node-2")
    assert {r.pod: r.outcome for r in reports} == {"c-1-gw-2": "gone", "c-1-h100-2": "gone"}
    assert complete(reports)
    assert world.server.find("", "nodes", "", "node-2")["spec"]["unschedulable"] is True
    writes = [(s.verb, s.resource) for s in world.server.seen if s.method != "GET"]
    assert writes == [("patch", "nodes"), ("create", "pods/eviction"), ("create", "pods/eviction")]
    uids = [s.body["deleteOptions"]["preconditions"]["uid"] for s in world.server.seen if s.method == "POST"]
    assert all(uids)


def test_pods_go_one_at_a_time(world: World) -> None:
    most = [0]

    def count() -> None:
        most[0] = max(most[0], len(world.ending))

    world.on_pause = count
    world.drain().node("node-2")
    assert most == [1]


def test_the_head_stays_unless_asked_for_and_goes_last(world: World) -> None:
    reports = world.drain().node("system-1")
    assert {r.pod: r.outcome for r in reports} == {"c-1-gw-1": "gone", "c-1-head": "skipped"}
    assert complete(reports)
    world.drain().node("system-1", head_too=True)
    assert world.evictions() == ["c-1-gw-1", "c-1-head"]


def test_a_budget_is_waited_for(world: World) -> None:
    budget(world.server, 0)

    def allow() -> None:
        if world.now_s >= 100:
            budget(world.server, 1)

    world.on_pause = allow
    reports = world.drain().node("node-2")
    assert complete(reports)
    assert world.evictions().count("c-1-h100-2") == 5, "from 60 s, when the other pod is gone, to 100 s"
    assert any("budget allows no eviction now" in line for line in world.told)


def test_a_budget_that_allows_none_ends_with_a_report(world: World) -> None:
    budget(world.server, 0)
    reports = world.drain(limit_s=120).node("node-1")
    assert [(r.outcome, r.note) for r in reports] == [("refused", "disruption budget")]
    assert not complete(reports)
    assert world.now_s <= 120
    world.server.find("", "pods", NAMESPACE, "c-1-h100-1")  # untouched


def test_429_of_the_server_itself_is_honoured(world: World) -> None:
    world.server.faults.append(
        Fault(lambda s: s.resource == "pods/eviction", 429, {"message": "slow down"}, {"Retry-After": "17"})
    )
    world.ends_after_s = 0
    assert complete(world.drain().node("node-1"))
    assert world.now_s == pytest.approx(17 + 5, abs=5)


@pytest.mark.parametrize("status", [0])
def test_an_eviction_whose_answer_was_lost_is_asked_again(world: World, status: int) -> None:
    world.server.faults.append(Fault(lambda s: s.resource == "pods/eviction", status))
    assert complete(world.drain().node("node-1"))
    assert len(world.evictions()) == 2


def test_a_pod_that_does_not_end_is_reported(world: World) -> None:
    world.ends_after_s = 1e9
    reports = world.drain().node("node-1")
    assert [r.outcome for r in reports] == ["still-there"]
    assert world.now_s >= 600, "its whole grace"
    assert not complete(reports)


def test_a_pod_without_a_hook_is_named(world: World) -> None:
    world.server.change("", "pods", NAMESPACE, "c-1-h100-1", lambda d: d["spec"]["containers"][0].pop("lifecycle"))
    assert "no preStop hook" in world.drain().node("node-1")[0].note


def test_a_node_back(world: World) -> None:
    world.drain().node("node-1")
    world.drain().node_back("node-1")
    assert "unschedulable" not in world.server.find("", "nodes", "", "node-1")["spec"]


def test_a_group_is_emptied_and_stays_empty(world: World) -> None:
    before = {bound: world.group()[bound] for bound in ("replicas", "minReplicas", "maxReplicas")}
    wished = []

    def note() -> None:
        running = [
            p for p in world.server.objects["", "pods"].values() if p["metadata"]["labels"]["ray.io/group"] == "h100"
        ]
        wished.append((world.group()["replicas"], len(running)))

    world.on_pause = note
    reports = world.drain().group("c-1", "h100")
    assert complete(reports)
    assert [world.group()[bound] for bound in before] == [0, 0, 0]
    # KubeRay starts a pod where it wishes for more than there are, ending ones included.
    assert all(wish <= there for wish, there in wished)
    assert world.group("gateway")["maxReplicas"] == 4
    world.drain().group_back("c-1", "h100")
    assert {bound: world.group()[bound] for bound in before} == before
    assert ANNOTATION not in world.server.find("ray.io", "rayclusters", NAMESPACE, "c-1")["metadata"]["annotations"]


def test_a_pod_that_a_budget_keeps_keeps_its_place(world: World) -> None:
    budget(world.server, 1)
    reports = world.drain(limit_s=200).group("c-1", "h100")
    assert [r.outcome for r in reports] == ["gone", "refused"]
    assert [world.group()[b] for b in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 1]
    assert world.group()["scaleStrategy"]["workersToDelete"] == ["c-1-h100-1"]


def test_a_drain_repeated_still_knows_the_first_bounds(world: World) -> None:
    budget(world.server, 1)
    world.drain(limit_s=200).group("c-1", "h100")
    budget(world.server, 1)
    world.drain(limit_s=500).group("c-1", "h100")
    assert world.group()["replicas"] == 0
    world.drain().group_back("c-1", "h100")
    assert world.group()["maxReplicas"] == 4


def test_the_autoscalers_writes_are_kept(world: World) -> None:
    left = [3]

    def meddle(seen: object) -> bool:
        if getattr(seen, "verb", "") == "update" and left[0]:
            left[0] -= 1
            world.server.change(
                "ray.io",
                "rayclusters",
                NAMESPACE,
                "c-1",
                lambda d: d["metadata"].setdefault("labels", {}).update(n=str(left[0])),
            )
        return False

    world.server.faults.append(Fault(meddle))
    world.drain().group("c-1", "h100")
    assert world.server.find("ray.io", "rayclusters", NAMESPACE, "c-1")["metadata"]["labels"] == {"n": "0"}
    assert world.group()["replicas"] == 0


def test_groups_that_are_not_there_or_of_several_hosts(world: World) -> None:
    with pytest.raises(ClusterError, match="groups: gateway, h100"):
        world.drain().group("c-1", "a100")
    with pytest.raises(ClusterError, match="not drained"):
        world.drain().group_back("c-1", "h100")
    with pytest.raises(ClusterError, match="0 RayClusters have a group a100"):
        cluster_with(world.client, NAMESPACE, "a100")

    def several(document: Document) -> None:
        document["spec"]["workerGroupSpecs"][1]["numOfHosts"] = 2

    world.server.change("ray.io", "rayclusters", NAMESPACE, "c-1", several)
    with pytest.raises(ClusterError, match="drain their nodes"):
        world.drain().group("c-1", "h100")
    assert world.group()["maxReplicas"] == 4, "nothing was changed"


def test_the_command(world: World, kubeconfig: Path, galerne: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(sleep=world.pause, monotonic=lambda: world.now_s)
    monkeypatch.setattr("serving.cli.cluster.time", clock)
    code, out, _ = galerne("drain", "--kubeconfig", str(kubeconfig), "--node", "node-1", "--json")
    assert code == 0
    assert json.loads(out)["pods"][0]["outcome"] == "gone"
    code, _, err = galerne("drain", "--kubeconfig", str(kubeconfig), "--group", "h100")
    assert code == 0
    assert "evicted" in err
    assert galerne("drain", "--kubeconfig", str(kubeconfig), "--group", "h100", "--undo")[0] == 0
    assert world.group()["maxReplicas"] == 4
    assert galerne("drain", "--kubeconfig", str(kubeconfig), "--node", "node-1", "--undo")[0] == 0
    assert galerne("drain", "--kubeconfig", str(kubeconfig))[0] == 2
