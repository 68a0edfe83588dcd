"""Requests that wait for a replica: bounds, order, shares, keep-alives, and that none of them is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.hold import ModelHold
from serving.admission.holds import Hold
from serving.admission.slow_start import RAMP_S, RELEASED_PER_REPLICA
from serving.admission.ticket import Ticket
from serving.admission.waking import ASK_AGAIN_S, OVERDUE_RETRY_S
from serving.config import FakeEngineConfig, FakeFaults, ModelConfig
from serving.errors import Unavailable
from tests.unit.test_billing import Kept, complete
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, Rig, rig

SLEEPS: dict[str, Any] = {"replicas": {"min": 0, "max": 2}, "autoscaling": {"start_s": 30.0}}
STREAM = CHAT | {"stream": True}


class Ends:
    """Records what ends in a hold."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.places: list[tuple[str, int]] = []

    def hold_began(self, model: str, tenant: str, place: int) -> None:
        self.places.append((tenant, place))

    def hold_ended(self, model: str, tenant: str, end: str, seconds: float) -> None:
        self.rows.append((tenant, end))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Timers:
    """Calls to come, made when a test says that their time has."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> Timers.Handle:
        self.calls.append((seconds, call))
        return Timers.Handle(self, (seconds, call))

    @dataclass
    class Handle:
        timers: Timers
        row: tuple[float, Callable[[], None]]

        def cancel(self) -> None:
            if self.row in self.timers.calls:
                self.timers.calls.remove(self.row)

    def fire(self, seconds: float) -> int:
        """Make the calls that were to come after so long; returns how many."""
        due = [row for row in self.calls if row[0] == seconds]
        for row in due:
            self.calls.remove(row)
            row[1]()
        return len(due)


def one_hold(clock: Clock, ends: Ends, asked: list[str], timers: Timers | None = None, **hold: Any) -> ModelHold:
    model = ModelConfig.model_validate({"id": "m", "source": "fake:m", "hold": hold} | SLEEPS)
    return Hold([model], clock=clock, on_need=asked.append, metrics=ends, call_later=timers or Timers())["m"]


async def ended(ticket: Ticket) -> bool:
    return await ticket.wait(0)


async def test_a_ready_model_is_open_and_its_queue_is_met_in_order_and_in_turns() -> None:
    clock, ends, asked = Clock(), Ends(), list[str]()
    hold = one_hold(clock, ends, asked)
    assert not hold.is_open
    tickets = [hold.enter("a", 10, clock.now_s) for _ in range(RELEASED_PER_REPLICA + 3)]
    assert asked == ["m"]
    assert hold.held() == {"a": len(tickets)}
    hold.update(1)
    assert [await ended(t) for t in tickets] == [True] * RELEASED_PER_REPLICA + [False] * 3
    assert not hold.is_open  # who comes now stands behind those who wait
    tickets[0].answered()
    tickets[0].answered()
    assert [await ended(t) for t in tickets[-3:]] == [True, False, False]
    hold.update(2)
    assert all([await ended(t) for t in tickets])
    assert hold.is_open
    for ticket in tickets:
        ticket.end()
        ticket.end()
    assert (hold.turns, hold.held_bytes) == (0, 0)
    hold.update(0)
    assert not hold.is_open


async def test_requests_that_are_answered_late_hold_nobody_up() -> None:
    timers = Timers()
    hold = one_hold(Clock(), Ends(), [], timers, requests=200)
    tickets = [hold.enter("a", 1, 1000.0) for _ in range(10 * RELEASED_PER_REPLICA)]
    hold.update(1)
    released = []
    while sum(hold.held().values()):
        released.append(hold.turns)
        assert timers.fire(RAMP_S) == 1
    # Not one of them was answered; each quarter of a second lets twice as many under way.
    assert released == [RELEASED_PER_REPLICA * n for n in (1, 2, 4, 8)]
    assert hold.is_open
    assert timers.fire(RAMP_S) == 0
    for ticket in tickets:
        ticket.end()
    assert {seconds for seconds, _ in timers.calls} <= {ASK_AGAIN_S}


async def test_a_sleeping_model_is_asked_for_until_it_comes() -> None:
    timers, asked = Timers(), list[str]()
    hold = one_hold(Clock(), Ends(), asked, timers)
    first, second = hold.enter("a", 1, 1000.0), hold.enter("a", 1, 1000.0)
    assert asked == ["m"]
    timers.fire(ASK_AGAIN_S)
    assert asked == ["m"] * 2
    hold.update(1)
    timers.fire(ASK_AGAIN_S)
    assert asked == ["m"] * 2
    for ticket in (first, second):
        ticket.end()


async def test_who_waits_too_long_is_refused() -> None:
    timers, ends = Timers(), Ends()
    hold = one_hold(Clock(), ends, [], timers, wait_s=9.0)
    ticket = hold.enter("a", 1, 998.0)  # two seconds were spent before
    assert timers.fire(7.0) == 1
    with pytest.raises(Unavailable, match="none came within 9 s"):
        await ticket.wait(None)
    assert ends.rows == [("a", "late")]
    assert hold.held() == {}


async def test_a_budget_holds_what_replicas_are_not_to_have() -> None:
    hold = one_hold(Clock(), Ends(), [], in_flight_per_replica=2)
    hold.update(1)
    first, second, third = (hold.enter("a", 1, 1000.0) for _ in range(3))
    assert [await ended(t) for t in (first, second, third)] == [True, True, False]
    first.answered()
    assert not await ended(third)
    first.end()
    assert await ended(third)
    for ticket in (second, third):
        ticket.end()
    assert hold.turns == 0


async def test_an_ejected_replica_is_no_capacity() -> None:
    hold = one_hold(Clock(), Ends(), [], in_flight_per_replica=2)
    hold.update(3)
    hold.ejected(1)
    tickets = [hold.enter("a", 1, 1000.0) for _ in range(7)]
    assert hold.turns == 4
    # The list is renewed while one is out, and it is still out.
    hold.update(3)
    assert hold.turns == 4
    hold.ejected(0)
    assert hold.turns == 6
    # Never fewer than none, whoever is told first.
    hold.ejected(2)
    hold.update(1)
    for ticket in tickets[:5]:
        ticket.end()
    assert hold.turns == 1
    hold.ejected(0)
    assert hold.turns == 2
    for ticket in tickets[5:]:
        ticket.end()
    assert (hold.turns, hold.held()) == (0, {})


async def test_a_gateway_gives_its_engines_what_those_that_are_not_ejected_compute() -> None:
    async with rig(FAST, dead=1) as made:

        def limit() -> float:
            return made.total("galerne_in_flight_tokens_limit", model="chat")

        both = limit()
        while not made.gateway.health["chat"].ejections.out:
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert limit() == both / 2
        # With the ejected one off the list, what is left computes.
        made.gateway.update_replicas("chat", made.endpoints[:1])
        assert limit() == both / 2
        made.gateway.update_replicas("chat", made.endpoints)
        assert limit() == both


async def test_retry_after_is_what_is_left_of_a_measured_start() -> None:
    clock = Clock()
    hold = one_hold(clock, Ends(), [], requests=1)

    def refused() -> int | None:
        with pytest.raises(Unavailable) as caught:
            hold.enter("a", 1, clock.now_s)
        return caught.value.retry_after_s

    ticket = hold.enter("a", 1, clock.now_s)
    assert refused() == 30  # the configured guess
    clock.now_s += 12.5
    assert refused() == 18
    hold.measured(15.0)
    assert refused() == 3
    clock.now_s += 10
    assert refused() == OVERDUE_RETRY_S
    ticket.end()


async def test_a_tenant_that_fills_the_hold_makes_room_for_others() -> None:
    ends = Ends()
    hold = one_hold(Clock(), ends, [], requests=4)
    greedy = [hold.enter("a", 1, 0) for _ in range(4)]
    with pytest.raises(Unavailable):
        hold.enter("a", 1, 0)
    other = [hold.enter("b", 1, 0), hold.enter("b", 1, 0)]
    assert hold.held() == {"a": 2, "b": 2}
    with pytest.raises(Unavailable):  # equal shares: nobody is displaced any more
        hold.enter("b", 1, 0)
    with pytest.raises(Unavailable):
        hold.enter("a", 1, 0)
    # The latest of the greedy tenant went; who came first waits on.
    assert [t.end_of_wait.done() for t in greedy] == [False, False, True, True]
    with pytest.raises(Unavailable):
        await greedy[3].wait(0)
    for ticket in greedy + other:
        ticket.end()
    assert ends.rows.count(("a", "displaced")) == 2


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.sampled_from("abc"), st.integers(1, 60)),
            st.tuples(st.just("leave"), st.integers(0, 40), st.just(0)),
            st.tuples(st.just("end"), st.integers(0, 40), st.just(0)),
            st.tuples(st.just("ready"), st.integers(0, 3), st.just(0)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_bounds_hold_and_the_books_balance(steps: list[tuple[Any, Any, int]]) -> None:
    async def play() -> None:
        ends = Ends()
        hold = one_hold(Clock(), ends, [], requests=8, bytes=200)
        tickets: list[Ticket] = []
        for what, which, size in steps:
            if what == "enter":
                try:
                    tickets.append(hold.enter(which, size, 1000.0))
                except Unavailable:
                    assert sum(hold.held().values()) == 8 or hold.held_bytes + size > 200
            elif what == "ready":
                hold.update(which)
            elif tickets:
                ticket = tickets[which % len(tickets)]
                ticket.leave() if what == "leave" else ticket.end()
            waiting = [t for t in tickets if not t.end_of_wait.done()]
            assert sum(hold.held().values()) == len(waiting) <= 8
            assert hold.held_bytes == sum(t.size_bytes for t in waiting) <= 200
            assert not (hold.is_open and waiting)
        for ticket in tickets:
            ticket.end()
        assert (hold.held(), hold.held_bytes, hold.turns) == ({}, 0, 0)

    asyncio.run(play())


# -- through the gateway


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def held(made: Rig) -> float:
    return made.total("galerne_requests_held", model="chat")


async def waiting(made: Rig, count: int, **request: Any) -> list[asyncio.Task[httpx.Response]]:
    tasks = [asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | request)) for _ in range(count)]
    await until(lambda: held(made) == count)
    return tasks


async def test_held_requests_wake_the_model_and_are_answered_when_it_comes() -> None:
    asked: list[str] = []
    async with rig(FAST, hidden=True, wake=asked.append, chat=SLEEPS) as made:
        tasks = await waiting(made, 40)
        assert asked == ["chat"]
        assert made.total("galerne_held_oldest_seconds", model="chat") > 0
        assert made.total("galerne_held_bytes", model="chat") > 40 * 50
        made.gateway.update_replicas("chat", made.endpoints)
        assert {(await task).status_code for task in tasks} == {200}
        assert made.total("galerne_requests_finished_total", outcome="completed") == 40
        assert made.total("galerne_holds_total", end="released") == 40
        assert held(made) == 0
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert made.total("galerne_holds_total") == 40  # the ready replica's way passes no hold
        assert asked == ["chat"]


async def test_beyond_its_bounds_a_hold_refuses() -> None:
    async with rig(FAST, hidden=True, chat=SLEEPS | {"hold": {"requests": 3}}) as made:
        tasks = await waiting(made, 3)
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_ready"
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        made.gateway.update_replicas("chat", made.endpoints)
        assert {(await task).status_code for task in tasks} == {200}
        assert made.total("galerne_requests_finished_total", outcome="rejected") == 1
        assert made.total("galerne_holds_total", end="full") == 1


async def test_a_wait_ends_in_time() -> None:
    async with rig(chat=SLEEPS | {"hold": {"wait_s": 0.2}}) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=STREAM)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert made.total("galerne_holds_total", end="late") == 1
        assert made.total("galerne_requests_finished_total", outcome="rejected") == 1


async def test_a_held_stream_hears_that_it_is_held() -> None:
    quick = SLEEPS | {"hold": {"keep_alive_s": 0.05}}
    async with rig(FAST, hidden=True, chat=quick) as made:
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=STREAM) as stream:
            assert stream.status_code == 200
            assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = stream.aiter_lines()
            assert [await anext(lines) for _ in range(4)] == [": keep-alive", ""] * 2
            made.gateway.update_replicas("chat", made.endpoints)
            rest = [line async for line in lines if line and not line.startswith(":")]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 6
        assert made.total("galerne_time_to_first_token_seconds_count") == 1


@pytest.mark.parametrize(
    ("engine", "body", "code", "outcome"),
    [
        (None, {}, "model_not_ready", "rejected"),
        (FakeEngineConfig(faults=FakeFaults(error_rate=1.0)), {}, "engine_failed", "failed"),
        # The engine itself refuses: longer than its context.
        (
            FakeEngineConfig(max_model_len=4),
            {"max_tokens": 4000, "ignore_eos": True},
            "context_length_exceeded",
            "completed",
        ),
        (
            FakeEngineConfig(decode_ms=1, faults=FakeFaults(cut_after_bytes=2000)),
            {"max_tokens": 500, "ignore_eos": True},
            "stream_cut",
            "failed",
        ),
    ],
)
async def test_after_the_head_an_error_is_an_event(
    engine: FakeEngineConfig | None, body: dict[str, Any], code: Any, outcome: str
) -> None:
    config = SLEEPS | {"hold": {"keep_alive_s": 0.05, "wait_s": 0.3 if engine is None else 60}}
    async with rig(*([engine] if engine else []), hidden=True, chat=config) as made:
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=STREAM | body) as stream:
            assert stream.status_code == 200
            lines = stream.aiter_lines()
            assert await anext(lines) == ": keep-alive"
            if engine is not None:
                made.gateway.update_replicas("chat", made.endpoints)
            rest = [line async for line in lines if line and not line.startswith(":")]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["code"] == code
        await made.settled()
        assert made.total("galerne_requests_finished_total", outcome=outcome) == 1


async def test_what_the_engine_refuses_costs_nothing_and_is_told_as_refused_though_it_was_held(tmp_path: Path) -> None:
    config = SLEEPS | {"hold": {"keep_alive_s": 0.05}}
    ledger = Kept(tmp_path)
    engine = FakeEngineConfig(decode_ms=1, max_model_len=100)
    quota = {"quota": {"tokens_per_day": 10**6}}
    async with rig(engine, hidden=True, chat=config, ledger=ledger, tenant=quota) as made:
        body = STREAM | {"max_tokens": 50, "messages": [{"role": "user", "content": "word " * 400}]}
        task = asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=body))
        # Its head went out: what comes is an event.
        await asyncio.sleep(0.2)
        made.gateway.update_replicas("chat", made.endpoints)
        answer = (await task).text
        assert '"code":"context_length_exceeded"' in answer
        assert "[DONE]" not in answer
        await made.settled()
        (row,) = await complete(ledger, 1)
        assert (row.status, row.outcome, row.exact) == (400, "completed", True)
        assert row.prompt_tokens == row.completion_tokens == 0
        await made.gateway.quotas.settled()
        standing = (await made.gateway.quotas.standing("press"))[1]
        assert standing is not None
        assert standing.used["day"] == 0
        assert made.gateway.hold["chat"].queue.lane("press").service == 0
        assert made.total("galerne_requests_total", route=COMPLETIONS, status="400") == 1


async def test_a_held_stream_that_gets_no_replica_is_told_as_refused(tmp_path: Path) -> None:
    ledger = Kept(tmp_path)
    async with rig(chat=SLEEPS | {"hold": {"keep_alive_s": 0.05, "wait_s": 0.2}}, ledger=ledger) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=STREAM)
        assert answer.status_code == 200
        assert "model_not_ready" in answer.text
        (row,) = await complete(ledger, 1)
        assert (row.status, row.outcome, row.exact) == (503, "rejected", True)
        assert made.total("galerne_requests_total", route=COMPLETIONS, status="503") == 1


async def test_a_client_that_leaves_leaves_the_hold() -> None:
    async with rig(FAST, hidden=True, chat=SLEEPS) as made:
        tasks = await waiting(made, 2)
        tasks[0].cancel()
        await until(lambda: held(made) == 1)
        made.gateway.update_replicas("chat", made.endpoints)
        assert (await tasks[1]).status_code == 200
        await made.settled()
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == 1
        assert made.total("galerne_holds_total", end="left") == 1


async def test_replicas_that_cannot_be_reached_hold_until_others_come() -> None:
    async with rig(FAST, dead=1, chat={}, hidden=True) as made:
        alive, dead = made.endpoints
        made.gateway.update_replicas("chat", (dead,))
        task = asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=CHAT))
        await until(lambda: held(made) == 1)
        made.gateway.update_replicas("chat", (alive,))
        assert (await task).status_code == 200


async def test_a_gateway_of_sleeping_models_is_ready_once_the_cluster_has_spoken() -> None:
    async with rig(chat=SLEEPS) as made:
        assert (await made.http.get("/health/ready")).status_code == 503
        made.gateway.update_replicas("chat", ())
        assert (await made.http.get("/health/ready")).status_code == 200
        listed = (await made.http.get("/v1/models", headers=AUTH)).json()["data"]
        assert [(m["id"], m["ready_replicas"]) for m in listed] == [("chat", 0), ("acme/vectors", 0)]


async def test_a_budget_keeps_requests_off_a_busy_engine() -> None:
    most = 0

    def wrap(app: Any) -> Any:
        under_way = 0

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            nonlocal most, under_way
            under_way += scope["type"] == "http"
            most = max(most, under_way)
            try:
                await app(scope, receive, send)
            finally:
                under_way -= scope["type"] == "http"

        return counted

    async with rig(FAST, wrap=wrap, chat={"hold": {"in_flight_per_replica": 2}}) as made:
        answers = await asyncio.gather(
            *(made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"stream": i % 2 == 0}) for i in range(12))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert most == 2
        assert made.total("galerne_holds_total", end="released") == 10
