"""A removal that hangs on KubeRay's finalizers: what is said of it, what is taken away, and what is left to the operator."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.cluster.kubernetes.removal import EMPTIES_REDIS, WAITS_FOR_CLUSTERS
from tests.unit.kubernetes.kuberay import NAME, NAMESPACE, pod
from tests.unit.kubernetes.release import Run, being_removed, populate
from tests.unit.kubernetes.server import ApiServer

Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def free(server: ApiServer, kubeconfig: Path, galerne: Run) -> Answer:
    """`galerne cluster free`: exit code, output, errors."""
    return lambda *arguments: galerne("free", *arguments, "--kubeconfig", str(kubeconfig))


def there(server: ApiServer, kind: str) -> set[str]:
    return {name for _, name in server.objects.get(("ray.io", kind), {})}


def written(server: ApiServer) -> list[tuple[str, str, str]]:
    return [(s.verb, s.resource, s.name) for s in server.seen if s.verb in {"update", "patch", "delete", "create"}]


def test_what_hangs_is_told_and_freed(server: ApiServer, free: Answer) -> None:
    being_removed(server)
    code, out, _ = free("--dry-run")
    assert code == 3
    assert "RayCluster c-1: asked to go 60 min ago, waits for ray.io/gcs-ft-redis-cleanup-finalizer: " in out
    assert 'cannot run: c-1-redis-cleanup-x: CreateContainerConfigError, secret "galerne-redis" not found' in out
    assert "keys in Redis that begin with RAYuid-of-c-1@" in out
    assert "RayService galerne: asked to go 60 min ago, waits for ray.io/rayservice-finalizer" in out
    assert written(server) == []
    code, out, _ = free("--yes")
    assert code == 0
    # The cluster first: the service waits for it.
    assert written(server) == [("update", "rayclusters", "c-1"), ("update", "rayservices", NAME)]
    assert (there(server, "rayclusters"), there(server, "rayservices")) == (set(), set())
    assert free()[:2] == (
        0,
        f"nothing hangs: no RayCluster or RayService of namespace {NAMESPACE} waits for a finalizer\n",
    )


def test_finalizers_of_others_stay(server: ApiServer, free: Answer) -> None:
    being_removed(server)
    server.change("ray.io", "rayclusters", NAMESPACE, "c-1", lambda d: d["metadata"]["finalizers"].append("other/keep"))
    assert free("--yes")[0] == 0
    assert server.find("ray.io", "rayclusters", NAMESPACE, "c-1")["metadata"]["finalizers"] == ["other/keep"]


def test_nothing_is_done_without_a_yes(server: ApiServer, free: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    being_removed(server)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, _, err = free()
    assert code == 1
    assert "Take 2 finalizer(s) away?" in err
    assert written(server) == []


def test_what_the_operator_may_still_do_is_left_to_it(server: ApiServer, free: Answer) -> None:
    being_removed(server, seconds=100)
    code, out, _ = free("--yes")
    assert code == 3
    assert "left to the operator" in out
    assert written(server) == []
    assert free("--yes", "--after-s", "60")[0] == 0


def test_a_cluster_whose_pods_are_there_is_not_freed(server: ApiServer, free: Answer) -> None:
    # A head that comes back would write to the Redis that is taken for emptied.
    being_removed(server)
    server.put("", "pods", pod("c-1-head", "c-1", "headgroup", "10.0.1.9"))
    code, out, _ = free("--yes")
    assert code == 3
    assert "its pods are still there" in out
    assert "c-1-head" in out
    assert written(server) == []
    assert there(server, "rayservices") == {NAME}


def test_what_nobody_asked_to_go_is_never_touched(server: ApiServer, free: Answer) -> None:
    populate(server)
    server.change("ray.io", "rayclusters", NAMESPACE, "c-1", lambda d: d["metadata"].update(finalizers=[EMPTIES_REDIS]))
    server.change(
        "ray.io", "rayservices", NAMESPACE, NAME, lambda d: d["metadata"].update(finalizers=[WAITS_FOR_CLUSTERS])
    )
    assert free("--yes", "--after-s", "0")[0] == 0
    assert written(server) == []


def test_what_goes_by_itself_meanwhile_is_no_error(server: ApiServer, free: Answer) -> None:
    being_removed(server)
    server.on_write = lambda seen: (
        server.delete("ray.io", "rayservices", NAMESPACE, NAME)
        if seen.resource == "rayclusters" and NAME in there(server, "rayservices")
        else None
    )
    code, out, _ = free("--yes")
    assert code == 0
    assert "RayService galerne: gone by itself" in out


JOB_ENDED: tuple[tuple[dict[str, Any] | None, str], ...] = (
    (None, "there is no Job that empties Redis: does the operator run?"),
    ({"conditions": [{"type": "Failed", "status": "True", "message": "deadline"}]}, "is failed (deadline)"),
    ({"conditions": [{"type": "Complete", "status": "True"}]}, "is complete: does the operator run?"),
    ({}, "has no pod"),
)


@pytest.mark.parametrize(("status", "says"), JOB_ENDED, ids=[says[:20] for _, says in JOB_ENDED])
def test_why_it_hangs_is_said(server: ApiServer, free: Answer, status: dict[str, Any] | None, says: str) -> None:
    being_removed(server)
    server.delete("", "pods", NAMESPACE, "c-1-redis-cleanup-x")
    if status is None:
        server.delete("batch", "jobs", NAMESPACE, "c-1-redis-cleanup")
    else:
        server.change("batch", "jobs", NAMESPACE, "c-1-redis-cleanup", lambda d: d.update(status=status))
    assert says in free("--dry-run")[1]


def test_as_json(server: ApiServer, free: Answer) -> None:
    being_removed(server)
    code, out, _ = free("--json", "--yes")
    assert code == 0
    document = json.loads(out)
    assert document["freed"] == 2
    assert [(one["kind"], one["may_go"]) for one in document["removals"]] == [
        ("RayCluster", True),
        ("RayService", True),
    ]
