"""Two gateways on one Redis: service is fair over both, engines are divided, and without Redis each is fair by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from random import Random

import pytest

from serving.admission.fair_queue import OUTPUT_WEIGHT
from serving.admission.hold import ModelHold
from serving.admission.holds import Hold
from serving.admission.redis_link import RedisLink
from serving.admission.shared_service import FORGET_S, SILENT_S, SharedService
from serving.admission.ticket import Ticket
from serving.config import ModelConfig
from tests.redis_server import RedisServer, redis_server
from tests.unit.test_fair_hold import Job
from tests.unit.test_fair_queue import jain
from tests.unit.test_hold import Clock, Ends, Timers

SLOTS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


class Gateway:
    """A hold, what it has in flight, and a simulated engine's progress on that: a token a step for each."""

    def __init__(self, name: str, link: RedisLink, clock: Clock) -> None:
        model = ModelConfig.model_validate(
            {"id": "m", "source": "fake:m", "hold": {"sequences_per_replica": SLOTS, "requests": 4000}}
        )
        holds = Hold([model], clock=clock, on_need=lambda _: None, metrics=Ends(), call_later=Timers())
        holds.divide(2)
        self.clock = clock
        self.hold: ModelHold = holds["m"]
        self.hold.update(1)
        self.shared = SharedService(holds, link, name, clock)
        self.tickets: list[Ticket] = []
        self.rng = Random(name)

    def send(self, tenant: str, count: int) -> None:
        for _ in range(count):
            self.tickets.append(self.hold.enter(tenant, 100, self.clock.now_s, Job(max_output=60)))

    def step(self) -> None:
        for ticket in [t for t in self.tickets if t.released]:
            job = ticket.work
            assert isinstance(job, Job)
            job.first_byte_s = job.first_byte_s or self.clock.now_s
            job.later_events += 1
            if job.later_events >= 20 + self.rng.randrange(40):
                job.outcome = "completed"
                ticket.end()
                self.tickets.remove(ticket)

    def end(self, count: int) -> None:
        """So many sequences end."""
        for ticket in [t for t in self.tickets if t.released][:count]:
            self.tickets.remove(ticket)
            ticket.end()

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.end()
        assert self.hold.turns == 0


async def turns(*gateways: Gateway) -> None:
    """As many turns as everything takes that goes step by step."""
    for _ in range(15):
        for gateway in gateways:
            await gateway.shared.share()


@contextlib.asynccontextmanager
async def two(server: RedisServer) -> AsyncIterator[tuple[Gateway, Gateway, Clock]]:
    clock = Clock()
    links = [RedisLink(server.url) for _ in range(2)]
    await links[0].redis.flushall()
    made = [Gateway(name, link, clock) for name, link in zip("ab", links, strict=True)]
    try:
        yield made[0], made[1], clock
    finally:
        for gateway, link in zip(made, links, strict=True):
            gateway.close()
            await link.close()


async def test_service_is_fair_over_two_gateways(server: RedisServer) -> None:
    """`wide` sends through both gateways, `north` and `south` through one each: each gets a third."""
    async with two(server) as (north, south, clock):
        north.send("wide", 700)
        north.send("north", 700)
        south.send("wide", 700)
        south.send("south", 700)
        for _ in range(700):
            clock.now_s += 0.06
            north.step()
            south.step()
            await north.shared.share()
            await south.shared.share()
        assert all(g.hold.held().get(t) for g in (north, south) for t in ("wide",))
        given = {
            tenant: north.hold.queue.lane(tenant).service + south.hold.queue.lane(tenant).service
            for tenant in ("wide", "north", "south")
        }
        assert jain(list(given.values())) >= 0.98, given


async def test_who_was_served_elsewhere_has_no_credit_and_takes_none(server: RedisServer) -> None:
    async with two(server) as (here, there, clock):
        here.send("busy", 200)
        await here.shared.share()
        there.send("other", 1)
        await there.shared.share()  # hears of the first gateway
        for _ in range(200):
            clock.now_s += 0.06
            here.step()
            there.step()
            await here.shared.share()
        await there.shared.share()
        there.send("busy", 40)
        there.send("other", 40)
        # The one that comes is lifted to the one that is served elsewhere: both start level.
        busy, other = (there.hold.queue.lane(t).counter for t in ("busy", "other"))
        assert abs(busy - other) <= 2 * OUTPUT_WEIGHT * SLOTS * 60


async def test_a_gateway_takes_what_others_leave(server: RedisServer) -> None:
    async with two(server) as (here, there, clock):
        here.send("a", 200)
        assert here.hold.turns == SLOTS // 2  # its part
        there.send("b", 2)
        await there.shared.share()
        await here.shared.share()
        # Step by step: the other may have become busy too since it was heard.
        assert SLOTS // 2 <= here.hold.turns < SLOTS - 2
        await turns(here, there)
        assert here.hold.turns == SLOTS - 2
        # The other wants its part: it gets what ends here, and no engine gets more than it computes.
        there.send("b", 50)
        await turns(here, there)
        assert there.hold.turns == 2
        here.end(3)
        await turns(here, there)
        assert (here.hold.turns, there.hold.turns) == (SLOTS - 5, 5)
        here.end(3)
        await turns(here, there)
        assert (here.hold.turns, there.hold.turns) == (SLOTS // 2, SLOTS // 2)
        # One that falls silent leaves all of its own, and is forgotten.
        await here.shared.share()
        clock.now_s += SILENT_S + 1
        await turns(here)
        assert here.hold.turns == SLOTS
        clock.now_s += FORGET_S
        await here.shared.share()
        assert set(await here.shared._link.redis.hgetall("galerne:service:m")) == {b"a"}


async def test_without_redis_each_gateway_gives_its_part(server: RedisServer) -> None:
    async with two(server) as (here, there, _):
        there.send("b", 1)
        await there.shared.share()
        here.send("a", 50)
        await turns(here)
        assert here.hold.turns > SLOTS // 2
        here.shared._link.up = False
        rounds = 0

        async def sleep(_: float) -> None:
            nonlocal rounds
            rounds += 1
            if rounds > 2:
                raise asyncio.CancelledError

        with contextlib.suppress(asyncio.CancelledError):
            await here.shared.run(sleep)
        assert here.hold.in_flight.sequences_limit() == SLOTS // 2
