"""The fair queue in the gateway: order between tenants, whose fault a refusal is, and what is charged in the end."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serving.admission.bounds import RequestFacts
from serving.admission.hold import ModelHold
from serving.admission.holds import Hold
from serving.admission.ticket import Ticket
from serving.config import FakeEngineConfig, ModelConfig, TenantConfig
from serving.errors import RateLimited, Unavailable
from serving.metering.usage import Usage
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, rig
from tests.unit.test_hold import Clock, Ends, Timers, until

OTHER = {"authorization": "Bearer sk-other"}


class Job:
    """A request as the hold reads it."""

    def __init__(self, *, stream: bool = True, computes: bool = True, max_output: int | None = 100) -> None:
        self.facts = RequestFacts("m", stream, False, 400, max_output, 1)
        self.computes = computes
        self.stream = stream
        self.first_byte_s: float | None = None
        self.later_events = 0
        self.sent_bytes = 0
        self.usage: Usage | None = None
        self.usage_exact = True
        self.outcome = "failed"
        self.client_left = False


def one_hold(clock: Clock, ends: Ends, timers: Timers, tenants: dict[str, Any], **hold: Any) -> ModelHold:
    model = ModelConfig.model_validate({"id": "m", "source": "fake:m", "hold": hold})
    configured = [
        TenantConfig.model_validate({"id": name, "keys": [{"id": "k", "sha256": "0" * 64}]} | fields)
        for name, fields in tenants.items()
    ]
    made = Hold([model], configured, clock=clock, on_need=lambda _: None, metrics=ends, call_later=timers)["m"]
    made.update(1)
    return made


async def test_slots_are_shared_by_weight_and_what_streams_is_charged_while_it_streams() -> None:
    clock, ends = Clock(), Ends()
    hold = one_hold(clock, ends, Timers(), {"a": {}, "b": {"weight": 2}}, sequences_per_replica=4)
    running = [hold.enter("a", 1, clock.now_s, Job()) for _ in range(4)]
    assert all(t.released for t in running)
    waiting = [hold.enter(name, 1, clock.now_s, Job()) for name in "aaabbb"]
    assert hold.held() == {"a": 3, "b": 3}
    # The engine has written for a: b, lifted to where a stood, has had less.
    for ticket in running:
        assert isinstance(ticket.work, Job)
        ticket.work.first_byte_s, ticket.work.later_events = clock.now_s, 49
    clock.now_s += 1
    running.pop().end()
    assert [t.tenant for t in waiting if t.released] == ["b"]
    # Their places among their tenant's own, when they came.
    assert ends.places == [(name, place) for name in "ab" for place in (1, 2, 3)]
    assert hold.queue.lane("a").service == 4 * (100 + 2 * 50)
    # By the books: b's input counts half for its weight.
    assert hold.queue.lane("b").counter - hold.queue.lane("a").counter < 0
    for ticket in running + waiting:
        ticket.end()
    assert (hold.turns, hold.held_bytes, hold.in_flight.tokens) == (0, 0, 0.0)


async def test_what_was_used_is_what_is_charged() -> None:
    clock = Clock()
    hold = one_hold(clock, Ends(), Timers(), {"a": {}})
    lane = hold.queue.lane("a")

    def done(job: Job) -> float:
        before = lane.service
        hold.enter("a", 1, clock.now_s, job).end()
        return lane.service - before

    counted = Job()
    counted.usage, counted.outcome, counted.first_byte_s = Usage(30, 7), "completed", clock.now_s
    assert done(counted) == pytest.approx(30 + 2 * 7)
    streamed = Job()
    streamed.first_byte_s, streamed.later_events = clock.now_s, 9
    expected = hold.expect("a", streamed, 0).input_tokens
    assert done(streamed) == pytest.approx(expected + 2 * 10)
    assert done(Job()) == pytest.approx(0.0)  # no engine answered
    gone = Job()
    gone.client_left = True  # the engine may have read it
    assert done(gone) > 50
    assert done(Job(computes=False)) == 0.0


async def test_what_costs_nothing_passes_those_who_wait() -> None:
    clock = Clock()
    hold = one_hold(clock, Ends(), Timers(), {"a": {}}, sequences_per_replica=1)
    tickets = [hold.enter("a", 1, clock.now_s, Job()) for _ in range(2)]
    assert [t.released for t in tickets] == [True, False]
    free = hold.enter("a", 1, clock.now_s, Job(computes=False))
    assert free.released
    for ticket in [free, *tickets]:
        ticket.end()
    assert hold.turns == 0


async def test_whose_fault_a_refusal_is() -> None:
    clock, timers, ends = Clock(), Timers(), Ends()
    hold = one_hold(
        clock,
        ends,
        timers,
        {"a": {"queue": {"requests": 2, "wait_s": 7}}, "b": {}},
        sequences_per_replica=1,
        requests=4,
    )
    tickets = [hold.enter("a", 1, clock.now_s, Job()) for _ in range(3)]
    clock.now_s += 4
    with pytest.raises(RateLimited) as own:  # its own bound
        hold.enter("a", 1, clock.now_s, Job())
    assert (own.value.status, own.value.code, own.value.retry_after_s) == (429, "rate_limit_exceeded", 4)
    tickets += [hold.enter("b", 1, clock.now_s, Job()) for _ in range(2)]
    assert hold.held() == {"a": 2, "b": 2}
    with pytest.raises(RateLimited):  # the hold's, and nobody has more
        hold.enter("b", 1, clock.now_s, Job())
    hold.update(0)
    with pytest.raises(Unavailable):  # no replica: nobody's
        hold.enter("b", 1, clock.now_s, Job())
    hold.update(1)
    assert timers.fire(7.0) == 2
    with pytest.raises(RateLimited):
        await tickets[1].wait(0)
    for ticket in tickets:
        ticket.end()
    assert hold.turns == 0


async def test_a_wait_that_is_too_long_for_somebody_alone_is_the_clusters() -> None:
    clock, timers = Clock(), Timers()
    hold = one_hold(clock, Ends(), timers, {"a": {}}, sequences_per_replica=1, wait_s=9.0)
    tickets = [hold.enter("a", 1, clock.now_s, Job()) for _ in range(2)]
    timers.fire(9.0)
    with pytest.raises(Unavailable, match="as many requests as it takes"):
        await tickets[1].wait(0)
    for ticket in tickets:
        ticket.end()


async def test_more_capacity_lets_more_go_and_a_reload_changes_the_order() -> None:
    clock = Clock()
    model = ModelConfig.model_validate({"id": "m", "source": "path:/m", "engine": {"max_num_seqs": 2}})
    keys = [{"id": "k", "sha256": "0" * 64}]
    tenants = [TenantConfig.model_validate({"id": name, "keys": keys}) for name in "ab"]
    holds = Hold([model], tenants, clock=clock, on_need=lambda _: None, metrics=Ends(), call_later=Timers())
    hold = holds["m"]
    hold.update(1)

    def released(tickets: list[Ticket]) -> str:
        return "".join(t.tenant for t in tickets if t.released)

    tickets = [hold.enter(name, 1, clock.now_s, Job()) for name in "aaaabb"]
    assert released(tickets) == "aa"
    hold.learn({"sequences": 3, "kv_tokens": 10_000})
    assert released(tickets) == "aab"
    urgent = TenantConfig.model_validate({"id": "b", "keys": keys, "priority": "batch"})
    holds.update([tenants[0], urgent])
    hold.learn({"sequences": 4})
    assert released(tickets) == "aaab"
    holds.divide(4)
    tickets[0].end()
    assert released(tickets) == "aaab"
    for ticket in tickets:
        ticket.end()
    assert hold.turns == 0


# -- through the gateway


async def test_a_flood_does_not_stand_before_another_tenant() -> None:
    """One at a time on the engine; who came late and has sent little is next."""
    order: list[str] = []

    def wrap(app: Any) -> Any:
        async def seen(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            message = await receive()
            order.append(json.loads(message["body"])["messages"][0]["content"])
            messages = [message]

            async def again() -> Any:
                return messages.pop() if messages else await receive()

            await app(scope, again, send)

        return seen

    def post(headers: dict[str, str], word: str) -> asyncio.Task[httpx.Response]:
        body = CHAT | {"messages": [{"role": "user", "content": word}], "stream": True}
        return asyncio.create_task(made.http.post(COMPLETIONS, headers=headers, json=body))

    async with rig(FakeEngineConfig(decode_ms=5), wrap=wrap, chat={"hold": {"sequences_per_replica": 1}}) as made:
        flood = [post(AUTH, "flood") for _ in range(12)]
        await until(lambda: made.total("galerne_requests_held", tenant="press") == 11)
        places = {float(labels["le"]): n for labels, n in made.metrics.counts("galerne_queue_place") if "le" in labels}
        assert (places[1], places[4], places[8], places[16]) == (1, 4, 8, 11)
        light = [post(OTHER, "light") for _ in range(2)]
        assert {(await task).status_code for task in [*flood, *light]} == {200}
    # One of the flood ran; then both take turns, and the light one's two are over before the flood is.
    assert order.index("light") <= 2
    assert [i for i, word in enumerate(order) if word == "light"][-1] <= 6


async def test_a_tenant_at_its_bound_gets_429_and_a_client_that_leaves_frees_its_place() -> None:
    async with rig(FakeEngineConfig(decode_ms=30), chat={"hold": {"sequences_per_replica": 1, "requests": 1}}) as made:
        body = CHAT | {"max_tokens": 40}
        tasks = [asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=body)) for _ in range(2)]
        await until(lambda: made.total("galerne_requests_held") == 1)
        refused = await made.http.post(COMPLETIONS, headers=AUTH, json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        for task in tasks:
            task.cancel()
        await until(lambda: made.total("galerne_requests_held") == 0)
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200


async def test_two_at_one_moment_of_who_sends_little_both_have_what_is_kept() -> None:
    clock, ends = Clock(), Ends()
    hold = one_hold(clock, ends, Timers(), {"flood": {}, "light": {}}, sequences_per_replica=128, requests=400)
    hold.in_flight.turnover(48.0)
    flood = [hold.enter("flood", 1, clock.now_s, Job()) for _ in range(300)]
    sent = sum(ticket.released for ticket in flood)
    assert 126 <= sent < hold.in_flight.sequences_limit()
    first, second = (hold.enter("light", 1, clock.now_s, Job()) for _ in range(2))
    # The first charges its tenant beyond the flood's, so the second's turn has not come; it is theirs all the same.
    assert first.released
    assert hold.queue.lag(hold.queue.lane("light")) >= 0
    assert second.released
    # Whoever has had much more than one request beyond the others waits for its turn.
    hold.queue.charge("light", 0.0, 10_000.0)
    third = hold.enter("light", 1, clock.now_s, Job())
    assert not third.released
    for ticket in [*flood, first, second, third]:
        ticket.end()


async def test_who_has_little_in_flight_is_told_by_sequences_not_by_bodies() -> None:
    clock = Clock()
    hold = one_hold(clock, Ends(), Timers(), {"flood": {}, "light": {}}, sequences_per_replica=128, requests=400)

    def batch() -> Job:
        job = Job()
        job.facts = replace(job.facts, prompts=40)
        return job

    flood = [hold.enter("flood", 1, clock.now_s, batch()) for _ in range(6)]
    assert [ticket.released for ticket in flood] == [True] * 3 + [False] * 3
    # Four bodies of one prompt beside three of forty: it still has less than its part.
    light = [hold.enter("light", 1, clock.now_s, Job()) for _ in range(4)]
    assert all(ticket.released for ticket in light)
    for ticket in [*flood, *light]:
        ticket.end()
    assert (hold.turns, hold.in_flight.sequences) == (0, 0)
    assert {lane.sequences for lane in hold.queue.lanes()} == {0}
