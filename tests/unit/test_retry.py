"""A request that its replica loses before it answers goes to another one, once, within a budget."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import FakeEngineConfig, FakeFaults
from serving.metering.answers import is_server_error
from serving.routing.ejection import FAILURES
from serving.routing.replicas import Endpoint
from serving.routing.retry_budget import LEAST, RetryBudget, allowed
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, Rig, rig

STREAM = CHAT | {"stream": True}
BROKEN = FakeEngineConfig(decode_ms=1, faults=FakeFaults(error_rate=1.0))
HANGS = FakeEngineConfig(decode_ms=1, faults=FakeFaults(hang_rate=1.0))

Wrap = Callable[[Any], Any]


def dies(first: int, event: bytes = b"") -> tuple[Wrap, list[int]]:
    """The first engine loses its first requests; returns the engines' request counts too."""
    served: list[int] = []

    def wrap(app: Any) -> Any:
        index = len(served)
        served.append(0)

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            served[index] += 1
            if index == 0 and served[0] <= first:
                while (await receive()).get("more_body"):
                    pass
                headers = [(b"content-type", b"text/event-stream")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                return  # the server closes the connection on the unfinished answer
            await app(scope, receive, send)

        return wrapped

    return wrap, served


async def until_used(made: Rig, served: list[int], body: dict[str, Any]) -> list[httpx.Response]:
    """Ask until the first engine has had a request."""
    answers = []
    while not served[0]:
        answers.append(await made.http.post(COMPLETIONS, headers=AUTH, json=body))
        assert len(answers) < 50
    return answers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_lost_before_its_first_byte_goes_to_another_replica(stream: bool) -> None:
    wrap, served = dies(1)
    async with rig(FAST, FAST, wrap=wrap) as made:
        answers = await until_used(made, served, CHAT | {"stream": stream})
        assert {a.status_code for a in answers} == {200}
        assert "engine" not in answers[-1].text
        assert made.total("galerne_retries_total", kind="broken", end="sent") == 1
        assert made.total("galerne_upstream_errors_total", kind="broken") == 1
        assert made.total("galerne_requests_finished_total", outcome="completed") == len(answers)


async def test_an_engines_error_as_the_first_event_is_its_failure() -> None:
    # As vLLM sends it when its core is dead: the head went out before.
    event = b'data: {"error": {"message": "EngineCore /opt/x", "type": "InternalServerError", "code": 500}}\n\n'
    wrap, served = dies(1, event=event)
    async with rig(FAST, FAST, wrap=wrap) as made:
        answers = await until_used(made, served, STREAM)
        assert "EngineCore" not in answers[-1].text
        assert answers[-1].text.endswith("data: [DONE]\n\n")
        assert made.total("galerne_retries_total", kind="server_error", end="sent") == 1
    wrap, _ = dies(1, event=event.replace(b"500", b"400"))
    async with rig(FAST, wrap=wrap) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=STREAM)
        # It refuses: no stream has begun, so the answer is a plain one.
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert "/opt/x" not in answer.text
        assert made.total("galerne_retries_total") == 0


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("code", [500, 400])
async def test_an_engine_that_fails_in_the_middle_of_a_stream_has_cut_it(
    include_usage: bool, apart: bool, code: int
) -> None:
    # As vLLM goes on when its core is killed.
    token = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    error = b'data: {"error": {"message": "EngineCore /opt/x", "code": %d}}\n\n' % code

    def wrap(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            rest = [token, error + b"data: [DONE]\n\n"]
            for body in (token, *(rest if apart else [b"".join(rest)])):
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0.05)
            await send({"type": "http.response.body", "body": b""})

        return wrapped

    async with rig(FAST, wrap=wrap) as made:
        body = STREAM | {"stream_options": {"include_usage": include_usage}}
        text = (await made.http.post(COMPLETIONS, headers=AUTH, json=body)).text
        await made.settled()
        failed = code >= 500
        shown = (token[:-3] + b',"usage":null}\n\n' if include_usage else token) * 2
        assert text.startswith(shown.decode())
        assert text.removeprefix(shown.decode()).count("data: ") == 1
        assert ("stream_cut" in text, "invalid_request_error" in text) == (failed, not failed)
        assert "/opt/x" not in text
        assert "[DONE]" not in text
        assert made.total("galerne_requests_finished_total", outcome="failed" if failed else "completed") == 1
        assert made.total("galerne_streams_cut_total") == failed
        assert made.total("galerne_upstream_errors_total", kind="server_error") == failed
        assert made.total("galerne_retries_total") == 0


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (b'data: {"error": {"code": 500}}\n\ndata: [DONE]\n\n', True),
        (b'data: {"error": {"code": 404}}\n\n', False),
        (b'data: {"error": {"code": "stream_cut"}}\n\n', False),
        (b'data: {"error"', False),
        (b'data: {"error": null}\n\n', False),
    ],
)
def test_which_events_are_an_engines_failure(chunk: bytes, expected: bool) -> None:
    assert is_server_error(chunk) is expected


async def test_nothing_is_sent_again_after_the_first_byte() -> None:
    wrap, served = dies(1, event=b"data: {}\n\n")
    async with rig(FAST, FAST, wrap=wrap) as made:
        answers = await until_used(made, served, STREAM)
        events = [line for line in answers[-1].text.splitlines() if line]
        assert events[0] == "data: {}"
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "stream_cut"
        assert len(events) == 2
        assert made.total("galerne_retries_total") == 0


async def test_a_request_of_which_two_replicas_die_is_not_given_to_a_third() -> None:
    seen = 0

    def wrap(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            nonlocal seen
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            seen += 1
            await send({"type": "http.response.start", "status": 200, "headers": []})

        return wrapped

    async with rig(FAST, FAST, FAST, wrap=wrap) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert answer.status_code == 502
        assert seen == 2
        assert made.total("galerne_retries_total", end="sent") == 1
        assert made.total("galerne_retries_total", end="no_replica") == 1


async def test_a_request_goes_to_no_replica_that_came_after_its_loss() -> None:
    wrap, served = dies(10**9)
    async with rig(FAST, FAST, FAST, wrap=wrap) as made:
        dying, other, successor = made.endpoints
        made.gateway.update_replicas("chat", (dying, other))
        turns = [await made.gateway.health["chat"].budget.turn(0) for _ in range(LEAST)]
        asked = asyncio.create_task(until_used(made, served, CHAT))
        # Nobody has a turn for a second try before the list has changed.
        while not made.total("galerne_upstream_errors_total", kind="broken"):
            await asyncio.sleep(0.01)
        made.gateway.update_replicas("chat", (successor,))
        for turn in turns:
            assert turn is not None
            turn.end()
        assert (await asked)[-1].status_code == 502
        assert served[2] == 0
        assert made.total("galerne_retries_total", end="no_replica") == 1
        # Others are welcome there.
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200


async def test_a_client_that_leaves_while_it_waits_for_a_turn_gives_its_place_back() -> None:
    wrap, served = dies(10)
    async with rig(FAST, FAST, wrap=wrap) as made:
        budget = made.gateway.health["chat"].budget
        turns = [await budget.turn(0) for _ in range(LEAST)]
        asked = [asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=STREAM)) for _ in range(8)]
        # Those that the second replica has are answered; the others wait.
        while served[0] == 0 or sum(not a.done() for a in asked) > served[0]:
            await asyncio.sleep(0.01)
        for request in asked:
            request.cancel()
        await made.settled()
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == served[0]
        for turn in turns:
            assert turn is not None
            turn.end()
        assert budget.retrying == 0


@asynccontextmanager
async def black_hole() -> AsyncIterator[Endpoint]:
    """A replica that no connection reaches: its backlog is full."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        full = [socket.socket() for _ in range(3)]
        for one in full:
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        try:
            yield Endpoint("hole", *listening.getsockname())
        finally:
            for one in full:
                one.close()


async def test_a_client_that_leaves_while_another_replica_is_sought_gives_its_turn_back() -> None:
    wrap, served = dies(10**9)
    async with rig(FAST, wrap=wrap, connect_timeout_s=0.5) as made, black_hole() as hole:
        budget = made.gateway.health["chat"].budget
        asked = asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=STREAM))
        while not served[0]:
            await asyncio.sleep(0)
        made.gateway.update_replicas("chat", (*made.endpoints, hole))
        while not budget.retrying:
            assert not asked.done()
            await asyncio.sleep(0.01)
        asked.cancel()
        await made.settled()
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == 1
        assert budget.retrying == 0


async def test_a_client_that_leaves_as_its_turn_comes_gives_it_back() -> None:
    wrap, served = dies(1)
    async with rig(FAST, FAST, wrap=wrap) as made:
        budget = made.gateway.health["chat"].budget
        turns = [await budget.turn(0) for _ in range(LEAST)]
        left = asyncio.Event()
        body = json.dumps(STREAM).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": COMPLETIONS,
            "raw_path": COMPLETIONS.encode(),
            "query_string": b"",
            "client": ("127.0.0.1", 1),
            "headers": [(b"authorization", AUTH["authorization"].encode()), (b"content-length", b"%d" % len(body))],
        }
        made.gateway.update_replicas("chat", made.endpoints[:1])
        asked = asyncio.create_task(made.gateway(scope, receive, send))
        while not served[0]:
            await asyncio.sleep(0)
        made.gateway.update_replicas("chat", made.endpoints)
        while not budget._waiting:
            assert not asked.done()
            await asyncio.sleep(0)
        # In one turn of the loop.
        for turn in turns:
            assert turn is not None
            turn.end()
        left.set()
        await asked
        await made.settled()
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == 1
        assert served == [1, 0]
        assert budget.retrying == 0


async def test_a_500_is_tried_elsewhere_and_is_held_against_the_replica_where_that_works() -> None:
    async with rig(BROKEN, FAST) as made:
        for _ in range(200):
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
            if made.gateway.health["chat"].ejections.out:
                break
        assert made.gateway.health["chat"].ejections.out == {"r0"}
        assert made.total("galerne_retries_total", kind="server_error", end="sent") == FAILURES
        assert made.total("galerne_replicas_ejected", model="chat") == 1
        # Out is out.
        for _ in range(20):
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert made.total("galerne_upstream_errors_total", kind="server_error") == FAILURES


async def test_requests_that_fail_everywhere_eject_nobody() -> None:
    async with rig(BROKEN, BROKEN) as made:
        for _ in range(FAILURES * 3):
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 502
        assert made.gateway.health["chat"].ejections.out == frozenset()


async def test_a_timeout_is_not_tried_again_and_ejects_at_once() -> None:
    async with rig(HANGS, FAST, response_timeout_s=0.3) as made:
        statuses = []
        while 504 not in statuses:
            statuses.append((await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code)
        assert made.total("galerne_retries_total") == 0
        assert made.gateway.health["chat"].ejections.out == {"r0"}
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200


async def test_a_stream_whose_head_came_and_no_event_is_a_timeout_too() -> None:
    def wrap(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while (await receive())["type"] != "http.disconnect":
                pass

        return wrapped

    async with rig(FAST, wrap=wrap, response_timeout_s=0.2) as made:
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=STREAM)).status_code == 504


async def test_a_refused_connection_counts_too() -> None:
    async with rig(FAST, dead=1) as made:
        while made.gateway.health["chat"].ejections.out != {"dead0"}:
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert made.total("galerne_upstream_errors_total", kind="connect") == FAILURES


@given(st.integers(0, 10_000), st.floats(0.01, 1))
def test_the_budget_is_a_share_and_never_below_three(active: int, share: float) -> None:
    assert allowed(active, share) >= LEAST
    assert allowed(active, share) <= max(LEAST, active)
    assert allowed(active + 1, share) >= allowed(active, share)


async def test_turns_are_given_in_order_and_every_one_is_given_back() -> None:
    budget = RetryBudget(0.2)
    turns = [await budget.turn(0) for _ in range(LEAST)]
    assert await budget.turn(0) is None
    order: list[int] = []

    async def ask(number: int) -> None:
        turn = await budget.turn(60)
        assert turn is not None
        order.append(number)
        turn.end()
        turn.end()

    asked = [asyncio.create_task(ask(n)) for n in range(20)]
    await asyncio.sleep(0)
    asked[3].cancel()
    await asyncio.sleep(0)
    for turn in turns:
        assert turn is not None
        turn.end()
    await asyncio.gather(*asked, return_exceptions=True)
    assert order == [n for n in range(20) if n != 3]
    assert budget.retrying == 0
    assert await budget.turn(0.001) is not None


async def test_a_turn_that_does_not_come_in_time_leaves_no_place_behind() -> None:
    budget = RetryBudget(0.2)
    turns = [await budget.turn(0) for _ in range(LEAST)]
    assert await budget.turn(0.01) is None
    for turn in turns:
        assert turn is not None
        turn.end()
    assert budget.retrying == 0
