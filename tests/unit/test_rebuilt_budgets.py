"""A store that has lost its budgets is told them by the ledger, once, and no budget may be spent twice meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.estimates import Cost
from serving.admission.quota_redis import RedisStore
from serving.admission.quota_store import MemoryStore, periods
from serving.admission.quotas import Charge, Quotas
from serving.admission.redis_link import RedisLink
from serving.config import GalerneConfig, OnOutage
from serving.errors import QuotaExceeded, Unavailable
from serving.metering.ledger import Ledger
from serving.metering.questions import NoAnswer
from serving.metering.settings import LedgerSettings
from tests.redis_server import RedisServer, redis_server
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, Rig, rig
from tests.unit.test_quotas import Bill, Told, admit, connected, tenants

BUDGET = {"tokens_per_day": 1000, "tokens_per_month": 5000}


@dataclass
class Rows:
    """A ledger of rows that are there at once."""

    rows: list[Bill] = field(default_factory=list)
    name: str = "shared"
    lag_s: float = 0.0
    away: bool = False
    asked: int = 0

    async def spent(self, tenant: str, ended_before_s: float) -> dict[str, int]:
        assert tenant == "acme"
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise NoAnswer("away", "it is away")
        found: dict[str, int] = {}
        for row in self.rows:
            if row.started_at + row.duration_s < ended_before_s:
                day, _ = periods(row.started_at)
                found[day] = found.get(day, 0) + row.prompt_tokens + row.completion_tokens
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@contextlib.asynccontextmanager
async def gateways(
    server: RedisServer,
    books: Rows,
    number: int = 1,
    on_outage: OnOutage = "local",
    within_s: float = 2.0,
    **limits: int,
) -> AsyncIterator[tuple[RedisLink, list[Quotas]]]:
    """So many gateways' quotas over an empty Redis."""
    async with connected(server) as link, contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(number):
            own = RedisLink(server.url)
            stack.push_async_callback(own.close)
            quotas = Quotas(
                tenants(**(limits or BUDGET)),
                MemoryStore(time.time),
                own,
                on_outage=on_outage,
                metrics=Told(),
                books=books,
                rebuilt_within_s=within_s,
            )
            stack.callback(quotas.close)
            made.append(quotas)
        yield link, made


def spend(books: Rows, quotas: Quotas, charge: Charge | None, tokens: int) -> None:
    """A request has ended: its row is there, and charged."""
    assert charge is not None
    row = Bill(tokens, 0)
    quotas.ended(charge)
    books.rows.append(row)
    quotas.settle(charge, row)


async def used(quotas: Quotas) -> dict[str, int] | None:
    await quotas.settled()
    _, standing = await quotas.standing("acme")
    return None if standing is None else dict(standing.used)


async def known(quotas: Quotas) -> dict[str, int]:
    """The budgets, when they are the ledger's."""
    async with asyncio.timeout(10):
        while quotas.rebuilding:
            await asyncio.sleep(0.01)
        found = await used(quotas)
        assert found is not None
        return found


async def looked(quotas: Quotas) -> None:
    """Let it look after its store once."""
    slept = 0

    async def sleep(_: float) -> None:
        nonlocal slept
        slept += 1
        if slept > 1:
            raise asyncio.CancelledError

    with contextlib.suppress(asyncio.CancelledError):
        await quotas.watch(sleep)


async def test_what_was_spent_is_spent_after_flushall(server: RedisServer) -> None:
    books = Rows()
    async with gateways(server, books, 2) as (link, (one, other)):
        spend(books, one, (await admit(one))[0], 990)
        assert await used(one) == {"day": 990, "month": 990}
        await link.redis.flushall()
        # Whoever has seen what was used refuses at once, whoever has not waits for the ledger.
        for quotas in (one, other):
            with pytest.raises(QuotaExceeded) as refused:
                await admit(quotas)
            assert "used 990, requested 30" in refused.value.message
        assert await known(one) == await known(other) == {"day": 990, "month": 990}
        assert books.asked >= 2  # at the first start, and now


async def test_several_gateways_tell_it_once(server: RedisServer) -> None:
    books = Rows([Bill(100, 100) for _ in range(3)])
    async with gateways(server, books, 5) as (link, made):
        for _ in range(3):
            await link.redis.flushall()
            await asyncio.gather(*(admit(quotas, Cost(0, 0, 1)) for quotas in made for _ in range(4)))
            for quotas in made:
                assert await known(quotas) == {"day": 600, "month": 600}
        # One asks, and the others hear of it.
        assert books.asked <= 6


async def test_it_is_looked_for_without_a_request(server: RedisServer) -> None:
    books = Rows([Bill(500, 0)])
    async with gateways(server, books) as (link, (quotas,)):
        for _ in range(2):
            async with asyncio.timeout(10):
                while await link.redis.hget("galerne:quota:{acme}:budgets", "from:shared") is None:
                    await looked(quotas)
                    await asyncio.sleep(0.01)
            assert await used(quotas) == {"day": 500, "month": 500}
            await link.redis.flushall()


@pytest.mark.parametrize("policy", ["local", "closed", "open"])
async def test_while_the_ledger_is_away_no_budget_is_spent_again(server: RedisServer, policy: Any) -> None:
    books = Rows()
    async with gateways(server, books, 2, policy) as (link, (one, other)):
        spend(books, one, (await admit(one))[0], 900)
        assert await used(one) == {"day": 900, "month": 900}
        books.away = True
        await link.redis.flushall()
        # It goes on from what it has seen.
        charge, _ = await admit(one)
        spend(books, one, charge, 80)
        await one.settled()
        with pytest.raises(QuotaExceeded):
            await admit(one)
        # A gateway that has seen nothing.
        if policy == "open":
            charge, headers = await admit(other)
            assert not headers
            spend(books, other, charge, 7)
        else:
            with pytest.raises(Unavailable) as refused:
                await admit(other)
            assert refused.value.code == "limits_unavailable"
            assert await used(other) is None
        books.away = False
        if policy == "open":
            await known(other)
            await looked(other)
        billed = sum(row.prompt_tokens for row in books.rows)
        assert await known(one) == {"day": billed, "month": billed}


async def test_a_request_that_ran_across_is_charged_once(server: RedisServer) -> None:
    books = Rows()
    async with gateways(server, books, tokens_per_day=10**6) as (link, (quotas,)):
        charges = [(await admit(quotas))[0] for _ in range(4)]
        spend(books, quotas, charges[0], 100)
        await quotas.settled()
        await link.redis.flushall()
        # Nobody has looked since: the ledger's sum will have it.
        spend(books, quotas, charges[1], 20)
        await quotas.settled()
        charge, _ = await admit(quotas)
        # These end when the store counts again, before and after it is told what was.
        spend(books, quotas, charges[2], 3)
        assert await known(quotas) == {"day": 100 + 20 + 3 + 30}
        spend(books, quotas, charges[3], 4)
        spend(books, quotas, charge, 5000)
        assert await known(quotas) == {"day": 5127}


steps = st.lists(
    st.tuples(st.sampled_from(["ask", "row", "row", "flush", "lose", "away", "back"]), st.integers(0, 99)), max_size=40
)


@settings(max_examples=15, deadline=None)
@given(steps)
def test_budget_is_bill_whatever_the_store_forgets(server: RedisServer, plan: list[tuple[str, int]]) -> None:
    async def play() -> None:
        books = Rows()
        async with gateways(server, books, 2, "open", 0.02, tokens_per_day=10**9) as (link, made):
            running: list[tuple[Quotas, Charge]] = []
            for what, pick in plan:
                quotas = made[pick % 2]
                if what == "ask":
                    charge, _ = await admit(quotas, Cost(pick, pick, 1))
                    assert charge is not None
                    running.append((quotas, charge))
                elif what == "flush":
                    await link.redis.flushall()
                elif what == "lose":
                    await link.redis.delete("galerne:quota:{acme}:budgets")
                elif what in {"away", "back"} and running:
                    books.away = what == "away" and bool(books.rows)
                elif running:
                    quotas, charge = running.pop(pick % len(running))
                    spend(books, quotas, charge, pick * 3)
                    await quotas.settled()
            books.away = False
            for quotas, charge in running:
                spend(books, quotas, charge, 7)
                await quotas.settled()
            billed = sum(row.prompt_tokens for row in books.rows)
            async with asyncio.timeout(20):
                while await used(made[0]) != {"day": billed} or await used(made[1]) != {"day": billed}:
                    for quotas in made:
                        await looked(quotas)
                    await asyncio.sleep(0.01)

    asyncio.run(play())


# -- in this process


@pytest.mark.parametrize("file", ["none", "lost", "behind", "ahead"])
async def test_a_file_of_budgets_is_made_good_by_the_ledger(file: str, tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    day, month = periods(time.time())
    if file in {"behind", "ahead"}:
        tokens = {"behind": 700, "ahead": 990}[file]
        path.write_text(f'{{"acme": {{"{day}": {tokens}, "{month}": {tokens}}}}}')
    books = Rows([Bill(900, 80, started_at=time.time() - 0.01)])
    memory = MemoryStore(time.time, None if file == "none" else path, ledger=True)
    quotas = Quotas(tenants(**BUDGET), memory, metrics=Told(), books=books)
    try:
        if file == "behind":
            # What is known goes until the ledger has told more.
            charge, _ = await admit(quotas)
            spend(books, quotas, charge, 5)
            await looked(quotas)
            total = 985
        else:
            with pytest.raises(QuotaExceeded):
                await admit(quotas)
            await looked(quotas)
            total = {"ahead": 990}.get(file, 980)
        assert await known(quotas) == {"day": total, "month": total}
    finally:
        quotas.close()
    if file != "none":
        assert MemoryStore(time.time, path).budgets("acme") == {day: total, month: total}


async def test_without_a_ledger_budgets_begin_anew(server: RedisServer) -> None:
    async with connected(server) as link:
        quotas = Quotas(tenants(**BUDGET), MemoryStore(time.time), link, metrics=Told())
        charge, _ = await admit(quotas)
        assert charge is not None
        await link.redis.flushall()
        quotas.settle(charge, Bill(40, 0))
        assert await used(quotas) == {"day": 40, "month": 40}


async def test_old_days_are_forgotten(server: RedisServer) -> None:
    async with connected(server) as link:
        now = [time.time()]
        store = RedisStore(link, lambda: now[0])
        (tenant,) = tenants(**BUDGET)
        for _ in range(70):
            now[0] += 86400
            charge = await store.reserve(_demand(tenant.quota))
            assert charge.day_used == 1
        fields = {name.decode() for name in await link.redis.hkeys("galerne:quota:{acme}:budgets")}
        assert len([name for name in fields if name.startswith("2")]) <= 4 + 2
        assert {*periods(now[0])} <= fields


def _demand(quota: Any) -> Any:
    from serving.admission.quota_store import Demand

    return Demand("acme", quota, f"{random.random()}", 1)


# -- a gateway, its ledger's writer and reader, and Redis


@contextlib.asynccontextmanager
async def gateway(url: str, directory: Path) -> AsyncIterator[Rig]:
    ledger = Ledger(
        LedgerSettings(f"sqlite:///{directory}/usage.db", directory / "spill", 0.2, 2**20), f"{time.time_ns():x}"
    )
    ledger.start()

    def change(config: GalerneConfig) -> GalerneConfig:
        return config.model_copy(update={"limits_store": url})

    async with rig(FAST, ledger=ledger, tenant={"quota": BUDGET}, change=change) as made:
        made.gateway.start()
        try:
            yield made
        finally:
            await made.gateway.finish()


async def ask(made: Rig, most: int) -> httpx.Response:
    """An answer; on a busy machine the ledger may not have told in time, and the client comes again."""
    body = CHAT | {"max_tokens": most, "ignore_eos": True}
    async with asyncio.timeout(60):
        while (answer := await made.http.post(COMPLETIONS, headers=AUTH, json=body)).status_code == 503:
            assert answer.json()["error"]["code"] == "limits_unavailable"
        return answer


@pytest.mark.parametrize("kind", ["redis", "memory"])
async def test_a_gateway_asks_its_ledger(kind: str, server: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    url = server.url if kind == "redis" else f"memory://{file}"
    async with connected(server) as link:
        async with gateway(url, tmp_path) as made:
            answer = await ask(made, 980)
            assert answer.status_code == 200, answer.text
            billed = answer.json()["usage"]["total_tokens"]
        # All that the store has is lost, and so is the process that has seen it.
        await link.redis.flushall()
        file.unlink(missing_ok=True)
        async with gateway(url, tmp_path) as made:
            refused = await ask(made, 100)
            assert refused.status_code == 429, refused.text
            assert refused.json()["error"]["code"] == "insufficient_quota"
            assert f"used {billed}, requested" in refused.json()["error"]["message"]
            if kind == "redis":
                await link.redis.flushall()
                again = await ask(made, 100)
                assert again.json()["error"]["code"] == "insufficient_quota"
