"""A shared store of quotas that goes away and comes back: what passes meanwhile, and that everything is charged once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.admission.estimates import Cost
from serving.admission.quota_store import Demand, MemoryStore, StoreDown
from serving.admission.quotas import Quotas, part_in_outage, part_of
from serving.admission.redis_link import RedisLink
from serving.config import QuotaConfig
from serving.errors import RateLimited, Unavailable
from tests.redis_server import PASSWORD, RedisServer, redis_server
from tests.unit.test_quotas import Told, Wall, admit, connected, ended, tenants


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.mark.parametrize("where", ["variable", "URL"])
async def test_the_password_of_a_store(where: str, server: RedisServer) -> None:
    without = server.url.replace(f":{PASSWORD}@", "")
    url, password = (without, PASSWORD) if where == "variable" else (server.url, "of another store")
    link = RedisLink(url, password=password)
    try:
        assert await link.probe()
        assert PASSWORD not in repr(link)
    finally:
        await link.close()
    stranger = RedisLink(without, password="wrong")
    try:
        assert not await stranger.probe()
    finally:
        await stranger.close()


@pytest.mark.parametrize("policy", ["open", "closed", "local"])
async def test_an_outage_and_its_end(policy: Any, tmp_path: Path) -> None:
    with redis_server(tmp_path) as own:
        told, states = Told(), list[bool]()
        link = RedisLink(own.url, states.append)
        limits = {"requests_per_minute": 4, "tokens_per_day": 1000}
        quotas = Quotas(tenants(**limits), MemoryStore(time.time), link, on_outage=policy, metrics=told)
        quotas.divide(2)
        before, _ = await admit(quotas)
        assert before is not None
        own.stop()
        for number in range(5):
            if policy == "closed":
                with pytest.raises(Unavailable) as closed:
                    await admit(quotas)
                assert (closed.value.status, closed.value.code) == (503, "limits_unavailable")
            elif policy == "open":
                charge, headers = await admit(quotas)
                assert charge is not None
                assert headers == {}
                quotas.settle(charge, ended(100, 50))
            elif number < 2:  # its part of four
                charge, _ = await admit(quotas)
                assert charge is not None
                quotas.settle(charge, ended(100, 50))
            else:
                with pytest.raises(RateLimited):
                    await admit(quotas)
        quotas.settle(before, ended(60, 40))
        await quotas.settled()
        assert states == [False]
        with pytest.raises(StoreDown):  # nobody waits for it again
            await link.call(lambda redis: redis.ping())
        own.start()
        looks = 0

        async def sleep(_: float) -> None:
            nonlocal looks
            looks += 1
            await asyncio.sleep(0)
            if looks > 20:
                raise asyncio.CancelledError

        with contextlib.suppress(asyncio.CancelledError):
            await quotas.watch(sleep)
        assert states == [False, True]
        again, _ = await admit(quotas, Cost(0, 0, 1))
        assert again is not None
        # The server forgot everything, and no ledger knows it; what was used meanwhile was charged once it was back.
        assert again.verdict.day_used == {"local": 2 * 150 + 100, "open": 5 * 150 + 100}.get(policy, 100)
        assert PASSWORD not in repr(link)
        quotas.close()
        await link.close()


@contextlib.asynccontextmanager
async def counted(
    server: RedisServer, policy: Any = "local", wall: Wall | None = None, **limits: int
) -> AsyncIterator[tuple[Quotas, RedisLink]]:
    """Quotas over this server, emptied; `wall` says which day it is."""
    async with connected(server) as link:
        quotas = Quotas(tenants(**limits), MemoryStore(wall or time.time), link, on_outage=policy, metrics=Told())
        if wall is not None and quotas._shared is not None:
            quotas._shared.wall_s = wall
        yield quotas, link


async def used(quotas: Quotas) -> dict[str, int]:
    _, standing = await quotas.standing("acme")
    assert standing is not None
    return dict(standing.used)


async def came_back(quotas: Quotas) -> None:
    await quotas.settled()
    await quotas._look(renew=True)


def late(work: Callable[..., Awaitable[Any]], link: RedisLink) -> Callable[..., Awaitable[Any]]:
    """The store does what it is asked, and its answer comes too late: once."""
    times = itertools.count()

    async def call(*args: Any, **named: Any) -> Any:
        found = await work(*args, **named)
        if next(times):
            return found
        link._set(up=False)
        raise StoreDown(asked=True)

    return call


async def test_what_ends_while_debts_are_paid_is_not_forgotten(server: RedisServer) -> None:
    async with counted(server, tokens_per_day=10**6) as (quotas, link):
        link._set(up=False)
        charges = [(await admit(quotas))[0] for _ in range(2)]
        assert charges[0] is not None
        assert charges[1] is not None
        quotas.settle(charges[0], ended(500, 500))
        await quotas.settled()
        assert quotas._shared is not None
        owe, second = quotas._shared.owe, charges[1]

        async def slowly(*args: Any) -> None:
            await owe(*args)
            # The answer is on its way, while another request ends that was let through in the outage.
            quotas.settle(second, ended(500, 500))
            await quotas.settled()

        quotas._shared.owe = slowly  # type: ignore[method-assign]
        await came_back(quotas)
        quotas._shared.owe = owe  # type: ignore[method-assign]
        await came_back(quotas)
        assert await used(quotas) == {"day": 2000}
        await came_back(quotas)
        assert await used(quotas) == {"day": 2000}


async def test_what_ended_in_an_outage_holds_nothing_after_it(server: RedisServer) -> None:
    limits = {"concurrent_requests": 2, "tokens_per_minute": 1000, "tokens_per_day": 10**6}
    async with counted(server, **limits) as (quotas, link):
        charges = [(await admit(quotas))[0] for _ in range(2)]
        assert await used(quotas) == {"concurrent": 2, "tokens": 60, "day": 60}
        link._set(up=False)
        for charge in charges:
            assert charge is not None
            quotas.settle(charge, ended(50, 5))
        await came_back(quotas)
        assert await used(quotas) == {"concurrent": 0, "tokens": 110, "day": 110}
        assert (await admit(quotas))[0] is not None


@pytest.mark.parametrize("policy", ["open", "closed", "local"])
async def test_a_reservation_whose_answer_came_late_counts_for_nothing(policy: Any, server: RedisServer) -> None:
    limits = {"requests_per_minute": 50, "tokens_per_minute": 5000, "concurrent_requests": 5, "tokens_per_day": 10**6}
    async with counted(server, policy, **limits) as (quotas, link):
        assert quotas._shared is not None
        quotas._shared.reserve_at = late(quotas._shared.reserve_at, link)  # type: ignore[method-assign]
        if policy == "closed":
            with pytest.raises(Unavailable):
                await admit(quotas, Cost(100, 200, 1))
        else:
            charge, _ = await admit(quotas, Cost(100, 200, 1))
            assert charge is not None
            quotas.settle(charge, ended(100, 150))
        await came_back(quotas)
        day = 0 if policy == "closed" else 250
        assert await used(quotas) == {"requests": 0, "tokens": 0, "concurrent": 0, "day": day}


async def test_a_settlement_or_a_debt_whose_answer_came_late_is_charged_once(server: RedisServer) -> None:
    async with counted(server, "open", concurrent_requests=5, tokens_per_day=10**6) as (quotas, link):
        shared = quotas._shared
        assert shared is not None
        charge, _ = await admit(quotas)
        assert charge is not None
        shared.settle = late(shared.settle, link)  # type: ignore[method-assign]
        quotas.settle(charge, ended(500, 500))
        await quotas.settled()
        charge, _ = await admit(quotas)  # let through uncounted
        assert charge is not None
        quotas.settle(charge, ended(100, 100))
        shared.owe = late(shared.owe, link)  # type: ignore[method-assign]
        await came_back(quotas)
        assert not link.up
        await came_back(quotas)
        assert await used(quotas) == {"concurrent": 0, "day": 1200}


async def test_a_client_that_leaves_while_the_store_is_asked_holds_nothing(server: RedisServer) -> None:
    async with counted(server, concurrent_requests=5, tokens_per_day=10**6) as (quotas, _):
        shared = quotas._shared
        assert shared is not None
        reserve, reached = shared.reserve_at, asyncio.Event()

        async def slowly(*args: Any) -> Any:
            await reserve(*args)
            reached.set()
            await asyncio.sleep(60)

        shared.reserve_at = slowly  # type: ignore[method-assign]
        asking = asyncio.create_task(admit(quotas))
        await reached.wait()
        asking.cancel()
        await asyncio.wait({asking})
        await came_back(quotas)
        assert await used(quotas) == {"concurrent": 0, "day": 0}


@pytest.mark.parametrize("policy", ["open", "local"])
async def test_tokens_of_an_outage_are_charged_to_the_days_they_were_used_on(policy: Any, server: RedisServer) -> None:
    wall = Wall()
    wall.now_s = 1_798_761_599.0  # a second before the year ends
    async with counted(server, policy, wall, tokens_per_day=10**6, tokens_per_month=10**7) as (quotas, link):
        link._set(up=False)
        for tokens in (100, 1000):
            charge, _ = await admit(quotas)
            assert charge is not None
            quotas.settle(charge, ended(tokens, 0))
            wall.now_s += 2
        await came_back(quotas)
        assert await used(quotas) == {"day": 1000, "month": 1000}
        wall.now_s -= 4
        assert await used(quotas) == {"day": 100, "month": 100}


async def test_one_gateways_part_of_a_limit_refuses_nobody_for_good() -> None:
    quota = QuotaConfig(tokens_per_minute=1000, tokens_per_day=10_000)
    assert part_in_outage(Demand("a", quota, "l", 600), 4) == Demand("a", part_of(quota, 4), "l", 250)
    # What is beyond the whole limit is so in an outage too.
    assert part_in_outage(Demand("a", quota, "l", 1600), 4).tokens == 1600
