"""Watching through time limits, drops, forgotten history and refusals, against real HTTP streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.resources import PODS, name_of
from serving.cluster.kubernetes.watch import MOST_BREAKS, Event, Watch
from serving.errors import ApiDenied, ApiUnreachable, KubernetesError
from tests.unit.kubernetes.conftest import NAMESPACE
from tests.unit.kubernetes.server import ApiServer, Fault


def pod(name: str, step: int = 0) -> dict[str, object]:
    labels = {"app": "x"}
    return {"metadata": {"name": name, "namespace": NAMESPACE, "labels": labels}, "spec": {"step": step}}


def put(server: ApiServer, name: str, step: int = 0) -> None:
    server.put("", "pods", pod(name, step))


def told(event: Event | None) -> tuple[str, str, int] | None:
    if event is None:
        return None
    return event.kind, name_of(event.document), event.document["spec"]["step"]


@pytest.fixture
def watch(client: Client, slept: list[float]) -> Watch:
    return Watch(client, PODS, NAMESPACE, labels="app=x", window_s=1, pause=slept.append)


def take(events: Iterator[Event | None], number: int) -> list[tuple[str, str, int] | None]:
    """So many events, quiet windows aside."""
    found: list[tuple[str, str, int] | None] = []
    while len(found) < number:
        if (event := next(events)) is not None:
            found.append(told(event))
    return found


def watches(server: ApiServer) -> list[str]:
    return [s.query["resourceVersion"] for s in server.seen if s.verb == "watch"]


def test_lists_then_follows(server: ApiServer, watch: Watch) -> None:
    put(server, "a")
    events = watch.events()
    assert take(events, 1) == [("ADDED", "a", 0)]
    put(server, "b")
    put(server, "a", 1)
    server.delete("", "pods", NAMESPACE, "b")
    server.put("", "pods", pod("elsewhere") | {"metadata": {"name": "elsewhere", "namespace": "other"}})
    assert take(events, 3) == [("ADDED", "b", 0), ("MODIFIED", "a", 1), ("DELETED", "b", 0)]
    assert sum(s.verb == "list" for s in server.seen) == 1


def test_a_window_that_ends_goes_on_from_its_bookmark(server: ApiServer, watch: Watch) -> None:
    put(server, "a")
    events = watch.events()
    take(events, 1)
    # Changes of other objects move the version on, and only a bookmark tells.
    server.put("", "nodes", {"metadata": {"name": "n"}})
    assert next(events) is None
    newest = server.version
    server.forget()
    put(server, "b")
    assert take(events, 1) == [("ADDED", "b", 0)]
    assert watches(server)[-1] == str(newest)
    assert sum(s.verb == "list" for s in server.seen) == 1, "a bookmark makes a new list needless"


@pytest.mark.parametrize("as_event", [True, False])
def test_410_lists_again_and_tells_the_difference(server: ApiServer, watch: Watch, as_event: bool) -> None:
    for name in ("stays", "changes", "goes", "is-replaced"):
        put(server, name)
    events = watch.events()
    take(events, 4)
    assert next(events) is None
    put(server, "changes", 1)
    server.delete("", "pods", NAMESPACE, "goes")
    server.delete("", "pods", NAMESPACE, "is-replaced")
    put(server, "is-replaced", 7)
    put(server, "comes")
    if as_event:
        server.forget()
    else:
        server.faults.append(Fault(lambda s: s.verb == "watch", 410, {"reason": "Expired", "code": 410}))
    assert sorted(take(events, 5)) == [
        ("ADDED", "comes", 0),
        ("ADDED", "is-replaced", 7),
        ("DELETED", "goes", 0),
        ("DELETED", "is-replaced", 0),
        ("MODIFIED", "changes", 1),
    ]
    assert next(events) is None, "what stayed is not told again"


def test_a_dropped_connection_is_resumed_where_it_broke(server: ApiServer, watch: Watch, slept: list[float]) -> None:
    put(server, "a")
    events = watch.events()
    take(events, 1)
    server.faults.append(Fault(lambda s: s.verb == "watch", after_lines=1))
    for step in range(1, 5):
        put(server, "a", step)
    assert take(events, 4) == [("MODIFIED", "a", step) for step in range(1, 5)]
    assert len(slept) == 1
    assert sum(s.verb == "list" for s in server.seen) == 1


def test_breaks_without_end_are_told(server: ApiServer, watch: Watch, slept: list[float]) -> None:
    server.faults.append(Fault(lambda s: s.verb == "watch", 0, times=99))
    with pytest.raises(ApiUnreachable):
        next(watch.events())
    assert len(slept) == MOST_BREAKS - 1
    assert slept == sorted(slept)


def test_429_on_a_watch_is_waited_for(server: ApiServer, watch: Watch, slept: list[float]) -> None:
    put(server, "a")
    server.faults.append(Fault(lambda s: s.verb == "watch", 429, {}, {"Retry-After": "4"}))
    events = watch.events()
    take(events, 1)
    put(server, "b")
    assert take(events, 1) == [("ADDED", "b", 0)]
    assert slept == [4.0]


def test_a_refusal_is_raised_at_once(server: ApiServer, watch: Watch) -> None:
    server.allow([("", "pods", "list", NAMESPACE)])
    with pytest.raises(ApiDenied) as caught:
        next(watch.events())
    assert caught.value.verb == "watch"


@pytest.mark.parametrize("line", [b"no json\n", b'{"type": 1, "object": {}}\n', b"[]\n", b'{"type": "ADDED", "obj'])
def test_what_is_no_event_is_a_break(server: ApiServer, watch: Watch, slept: list[float], line: bytes) -> None:
    put(server, "a")
    server.faults.append(Fault(lambda s: s.verb == "watch", 200, line))
    events = watch.events()
    take(events, 1)
    put(server, "b")
    assert take(events, 1) == [("ADDED", "b", 0)]
    assert len(slept) == 1


def test_an_error_event_that_is_no_410(server: ApiServer, watch: Watch, slept: list[float]) -> None:
    put(server, "a")
    line = b'{"type": "ERROR", "object": {"code": 500, "message": "etcd"}}\n'
    server.faults.append(Fault(lambda s: s.verb == "watch", 200, line, times=99))
    events = watch.events()
    take(events, 1)
    with pytest.raises(KubernetesError, match="etcd"):
        next(events)
