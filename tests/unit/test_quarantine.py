"""A request that engines die of is not sent to the next ones; those that were only there are."""

from __future__ import annotations

from typing import Any

import pytest

from serving.api.quarantine import ENDED_CROWDED, KEEP_S, MOST, Quarantine
from serving.config import FakeEngineConfig
from serving.errors import BadRequest
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, rig

KILLER = CHAT | {"messages": [{"role": "user", "content": "the end"}]}
FAST = FakeEngineConfig(decode_ms=1)


def dying(app: Any, ended: list[int]) -> Any:
    """An engine whose connection breaks off on one request."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            body, more = b"", True
            while more:
                event = await receive()
                body, more = body + event.get("body", b""), event.get("more_body", False)
            if b"the end" in body:
                ended.append(1)
                await send({"type": "http.response.start", "status": 200, "headers": []})
                return  # the server closes the connection on the unfinished answer
            events = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def again() -> Any:
                return next(events, None) or await receive()

            await app(scope, again, send)
            return
        await app(scope, receive, send)

    return wrapped


async def test_a_client_that_sends_it_again_ends_no_third_replica() -> None:
    ended: list[int] = []
    async with rig(FAST, FAST, FAST, wrap=lambda app: dying(app, ended)) as made:
        first = await made.http.post(COMPLETIONS, headers=AUTH, json=KILLER)
        assert first.status_code == 502
        assert len(ended) == 2
        for _ in range(3):
            again = await made.http.post(COMPLETIONS, headers=AUTH, json=KILLER)
            assert again.status_code == 400
            assert again.json()["error"]["code"] == "request_quarantined"
        assert len(ended) == 2
        assert made.total("galerne_requests_refused_total", code="request_quarantined") == 3
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        await made.settled()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def refused(quarantine: Quarantine, body: bytes, *gone: str) -> bool:
    try:
        quarantine.check("m", body, lambda replica: replica in gone)
    except BadRequest:
        return True
    return False


def test_it_takes_two_replicas_that_have_ended() -> None:
    quarantine = Quarantine(b"k", Clock())
    quarantine.lost("m", b"x", "a", "broken")
    quarantine.lost("m", b"x", "a", "broken")
    assert not refused(quarantine, b"x", "a")
    # Answers of 500 of replicas that live on are no end.
    quarantine.lost("m", b"x", "b", "server_error")
    assert not refused(quarantine, b"x")
    assert refused(quarantine, b"x", "b")
    assert not refused(quarantine, b"y", "b")
    quarantine.check("another model", b"x", lambda _: True)


@pytest.mark.parametrize("kind", ["timeout", "stalled", "connect"])
def test_what_is_late_is_no_suspect(kind: Any) -> None:
    quarantine = Quarantine(b"k", Clock())
    for replica in "abc":
        quarantine.lost("m", b"x", replica, kind)
    assert not refused(quarantine, b"x", *"abc")


def test_those_that_were_lost_in_a_crowd_need_one_more() -> None:
    # Both engines are killed with 20 requests on each.
    quarantine = Quarantine(b"k", Clock())
    bodies = [f"{i}".encode() for i in range(20)]
    for replica in "ab":
        for body in bodies:
            quarantine.lost("m", body, replica, "broken")
    assert not any(refused(quarantine, body) for body in bodies)
    quarantine.lost("m", bodies[0], "c", "broken")
    assert refused(quarantine, bodies[0])
    assert ENDED_CROWDED == 3
    assert not refused(quarantine, bodies[1])


def test_what_many_send_at_once_is_no_suspect() -> None:
    # A load test of one body, or a probe, when several engines are killed.
    quarantine = Quarantine(b"k", Clock())
    for replica in "abcd":
        for _ in range(5):
            quarantine.lost("m", b"probe", replica, "broken")
    assert not refused(quarantine, b"probe")
    # Nor is one that was alone of its kind among them.
    for replica in "ab":
        quarantine.lost("m", b"x", replica, "broken")
    assert not refused(quarantine, b"x")


def test_an_answer_or_time_clears_it() -> None:
    clock = Clock()
    quarantine = Quarantine(b"k", clock)
    for replica in "ab":
        quarantine.lost("m", b"x", replica, "broken")
        quarantine.lost("m", b"y", replica, "broken")
    assert refused(quarantine, b"x")
    quarantine.answered("m", b"x")
    assert not refused(quarantine, b"x")
    assert refused(quarantine, b"y")
    clock.now_s = KEEP_S + 1
    assert not refused(quarantine, b"y")


def test_it_is_bounded() -> None:
    quarantine = Quarantine(b"k", Clock())
    for replica in "ab":
        quarantine.lost("m", b"first", replica, "broken")
    for i in range(MOST):
        quarantine.lost("m", f"{i}".encode(), f"r{i}", "broken")
    assert not refused(quarantine, b"first")
