"""One truth for bill and budget: what a tenant's quota has used is the sum of its rows, whoever left and when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.estimates import Cost
from serving.admission.quota_store import MemoryStore
from serving.admission.quotas import Charge, Quotas
from serving.api.app import Gateway
from serving.config import FakeEngineConfig, FakeFaults, GalerneConfig
from tests.redis_server import RedisServer, redis_server
from tests.unit.test_billing import Kept, complete, counted, request, vectors
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, NO_HOLD, Rig, rig
from tests.unit.test_quotas import Bill, Told, Wall, admit, connected, tenants

ROOM = 10**9
QUOTA = {"tokens_per_minute": ROOM, "tokens_per_day": ROOM, "tokens_per_month": ROOM, "concurrent_requests": 1000}
# Slow enough to be left in the middle, on any machine.
SLOW = FakeEngineConfig(decode_ms=10)
LONG = CHAT | {"max_tokens": 2000, "ignore_eos": True}
TOKENIZE = {"model": "chat", "prompt": "some text"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def ledger(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@contextlib.asynccontextmanager
async def made(kind: str, asked: pytest.FixtureRequest, *engines: FakeEngineConfig, **more: Any) -> AsyncIterator[Rig]:
    """A gateway whose first tenant has a quota, counted in this process or in Redis."""

    def change(config: GalerneConfig) -> GalerneConfig:
        if kind == "memory":
            return config
        return config.model_copy(update={"limits_store": asked.getfixturevalue("server").url})

    async with contextlib.AsyncExitStack() as stack:
        if kind == "redis":
            await stack.enter_async_context(connected(asked.getfixturevalue("server")))
        more.setdefault("tenant", {"quota": QUOTA})
        async with rig(*engines, change=change, **more) as found:
            try:
                yield found
            finally:
                await found.gateway.finish()


async def used(gateway: Gateway) -> dict[str, int]:
    await gateway.quotas.settled()
    _, standing = await gateway.quotas.standing("press")
    assert standing is not None
    return dict(standing.used)


async def balanced(made_rig: Rig, ledger: Kept, number: int) -> int:
    """Hold the quota against so many rows; returns what both say."""
    rows = await complete(ledger, number)
    billed = sum(row.prompt_tokens + row.completion_tokens for row in rows)
    found = await used(made_rig.gateway)
    assert found == {"tokens": billed, "concurrent": 0, "day": billed, "month": billed}, rows
    served = sum(hold.queue.lane("press").service for _, hold in made_rig.gateway.hold.items())
    assert served == pytest.approx(sum(row.prompt_tokens + 2 * row.completion_tokens for row in rows))
    return billed


async def begun(made_rig: Rig, tokens: int) -> None:
    """Return when the first engine has written so many."""
    async with asyncio.timeout(20):
        while (await counted(made_rig.engines[0])).get("generation_tokens", 0) < tokens:
            await asyncio.sleep(0.01)


async def left(made_rig: Rig, body: dict[str, Any], tokens: int, path: str = COMPLETIONS) -> None:
    """A client that leaves when the engine has written so many."""
    asked = asyncio.create_task(made_rig.http.post(path, headers=AUTH, json=body))
    await begun(made_rig, tokens)
    asked.cancel()
    await asyncio.wait({asked})


both = pytest.mark.parametrize("kind", ["memory", "redis"])


@both
@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [
        (COMPLETIONS, LONG, 1),
        (COMPLETIONS, LONG | {"n": 4}, 4),
        (COMPLETIONS, LONG | {"stream": True, "n": 2}, 2),
        ("/v1/completions", {"model": "chat", "prompt": ["one", "two"], "max_tokens": 2000, "ignore_eos": True}, 2),
        ("/v1/responses", {"model": "chat", "input": "hello there", "max_output_tokens": 2000}, 1),
    ],
)
async def test_who_leaves_pays_what_the_engine_computed(
    kind: str, path: str, body: dict[str, Any], sequences: int, ledger: Kept, request: pytest.FixtureRequest
) -> None:
    async with made(kind, request, SLOW, ledger=ledger) as rigged:
        for turn in (1, 2):
            await left(rigged, body, turn * 20 * sequences, path)
            await rigged.settled()
            await complete(ledger, turn)
        billed = await balanced(rigged, ledger, 2)
        assert all(row.exact and row.outcome == "cancelled" for row in ledger.rows)
        assert billed >= 2 * 20 * sequences
        assert (
            sum(row.completion_tokens for row in ledger.rows) == (await counted(rigged.engines[0]))["generation_tokens"]
        )


@both
async def test_a_hundred_that_leave_at_once_pass_no_budget(
    kind: str, ledger: Kept, request: pytest.FixtureRequest
) -> None:
    # Twenty fit by what is expected of them; until the engine has said what they took, that stays charged.
    budget = {"tokens_per_day": 20 * 270}
    async with made(kind, request, SLOW, ledger=ledger, tenant={"quota": budget}) as rigged:

        async def ask() -> int:
            return (await rigged.http.post(COMPLETIONS, headers=AUTH, json=LONG)).status_code

        asked = [asyncio.create_task(ask()) for _ in range(100)]
        await begun(rigged, 200)
        refused = [task.result() for task in asked if task.done()]
        assert set(refused) == {429}
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        await rigged.settled()
        rows = await complete(ledger, 100 - len(refused))
        assert len(rows) <= 20
        billed = sum(row.prompt_tokens + row.completion_tokens for row in rows)
        assert await used(rigged.gateway) == {"day": billed}
        assert 0 < billed < 20 * 270


@both
async def test_what_computed_nothing_or_failed_costs_nothing(
    kind: str, ledger: Kept, request: pytest.FixtureRequest
) -> None:
    broken = FakeEngineConfig(decode_ms=1, faults=FakeFaults(error_rate=1.0))
    async with made(kind, request, broken, ledger=ledger) as rigged:
        for path, body, status in (
            (COMPLETIONS, CHAT, 502),
            ("/tokenize", TOKENIZE, 502),
            (COMPLETIONS, CHAT | {"n": 99}, 400),
        ):
            assert (await rigged.http.post(path, headers=AUTH, json=body)).status_code == status
        assert await balanced(rigged, ledger, 2) == 0
    ledger.rows.clear()
    async with made(kind, request, ledger=ledger) as rigged:
        assert (await rigged.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 503
        assert await balanced(rigged, ledger, 1) == 0
    ledger.rows.clear()
    async with made(kind, request, FAST, ledger=ledger) as rigged:
        for path, body, status in (
            ("/tokenize", TOKENIZE, 200),
            (COMPLETIONS, CHAT | {"stream_options": {"include_usage": True}, "max_tokens": 0}, 400),
        ):
            assert (await rigged.http.post(path, headers=AUTH, json=body)).status_code == status
        assert await balanced(rigged, ledger, 2) == 0


@both
async def test_random_histories(kind: str, ledger: Kept, request: pytest.FixtureRequest) -> None:
    rng, number = Random(5), 200
    engines = (FakeEngineConfig(decode_ms=2), FakeEngineConfig(decode_ms=3, faults=FakeFaults(error_rate=0.2)))
    hedged = NO_HOLD | {"faults": {"hedge_after_s": 0.01}, "hold": {"requests": 512, "sequences_per_replica": 12}}
    async with made(kind, request, *engines, ledger=ledger, chat=hedged) as rigged, vectors(rigged):

        async def ask(path: str, body: dict[str, Any], patience_s: float | None, events: float) -> None:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with (
                    asyncio.timeout(patience_s),
                    rigged.http.stream("POST", path, headers=AUTH, json=body) as answer,
                ):
                    async for part in answer.aiter_bytes():
                        events -= part.count(b"\n\n")
                        if events < 0:
                            return

        async with asyncio.TaskGroup() as tasks:
            for _ in range(number):
                path, body = a_request(rng)
                patience_s, events = None, float("inf")
                if rng.random() < 0.5:
                    patience_s, events = rng.choice([(None, rng.randint(0, 9)), (rng.uniform(0.01, 0.4), events)])
                tasks.create_task(ask(path, body, patience_s, events))
        await rigged.settled()
        accepted = int(rigged.total("galerne_requests_accepted_total"))
        assert await balanced(rigged, ledger, accepted) > 0
        assert {row.outcome for row in ledger.rows} >= {"completed", "cancelled"}
        assert any(row.lost_engine for row in ledger.rows)
        for name, value in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
            assert rigged.total("galerne_tokens_total", kind=name) == sum(getattr(row, value) for row in ledger.rows)


a_request = request


@both
async def test_an_engine_that_is_gone_charges_the_guess_of_the_row(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ledger = Kept(tmp_path, flush_s=0.4)
    async with made(kind, request, SLOW, ledger=ledger) as rigged:
        asked = asyncio.create_task(rigged.http.post(COMPLETIONS, headers=AUTH, json=LONG))
        await begun(rigged, 20)
        await rigged.engines[0].stop()
        # It broke off before a byte of its answer had come: its client waited, and got nothing.
        assert (await asked).status_code == 502
        assert await balanced(rigged, ledger, 1) == 0


async def test_without_a_ledger_the_engine_is_asked_all_the_same() -> None:
    async with rig(SLOW, tenant={"quota": QUOTA}) as rigged:
        await left(rigged, LONG, 50)
        await rigged.settled()
        async with asyncio.timeout(20):
            while (await used(rigged.gateway))["day"] > 200:  # what was expected
                await asyncio.sleep(0.01)
        engine = await counted(rigged.engines[0])
        assert (await used(rigged.gateway))["day"] == engine["prompt_tokens"] + engine["generation_tokens"]
        assert rigged.total("galerne_tokens_total", kind="completion") == engine["generation_tokens"]


@both
async def test_a_gateway_that_goes_charges_what_has_just_ended(
    kind: str, ledger: Kept, request: pytest.FixtureRequest
) -> None:
    async with made(kind, request, SLOW, ledger=ledger) as rigged:
        asked = [asyncio.create_task(rigged.http.post(COMPLETIONS, headers=AUTH, json=LONG)) for _ in range(5)]
        await begun(rigged, 100)
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        while rigged.total("galerne_requests_in_flight"):
            await asyncio.sleep(0)
        await rigged.gateway.finish()
        assert all(row.exact for row in ledger.rows)
        await balanced(rigged, ledger, 5)


async def test_budgets_are_on_disk_when_a_gateway_has_gone(tmp_path: Path) -> None:
    ledger, file = Kept(tmp_path), tmp_path / "budgets.json"

    def kept(config: GalerneConfig) -> GalerneConfig:
        return config.model_copy(update={"limits_store": f"memory://{file}"})

    hangs = FakeEngineConfig(faults=FakeFaults(hang_rate=1.0))
    async with rig(hangs, ledger=ledger, tenant={"quota": QUOTA}, change=kept) as rigged:
        asked = asyncio.create_task(rigged.http.post(COMPLETIONS, headers=AUTH, json=LONG))
        while not rigged.engines[0].gate.in_flight:
            await asyncio.sleep(0.01)
        asked.cancel()
        await rigged.settled()
        # Without waiting for anybody's word.
        rigged.gateway.close()
        (row,) = ledger.rows
        day, _ = (budget for budget in MemoryStore(time.time, file).budgets("press").values())
        assert day == row.prompt_tokens + row.completion_tokens


# -- the store alone

events = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ended", "row", "wait"]),
        st.integers(0, 30),
        st.integers(0, 400),
        st.sampled_from(["completed", "cancelled", "failed", "rejected"]),
    ),
    max_size=80,
)


@settings(max_examples=150)
@given(events)
def test_what_is_used_is_the_sum_of_the_rows(history: list[tuple[str, int, int, str]]) -> None:
    async def play() -> None:
        wall = Wall()
        quotas = Quotas(
            tenants(tokens_per_day=3000, tokens_per_month=9000, concurrent_requests=20),
            MemoryStore(wall),
            metrics=Told(),
        )
        running: list[tuple[Charge, int]] = []
        billed = reserved = 0
        for what, pick, tokens, outcome in history:
            if what == "ask":
                with contextlib.suppress(Exception):
                    charge, _ = await admit(quotas, Cost(tokens / 2, tokens / 2, 1))
                    assert charge is not None
                    running.append((charge, charge.demand.tokens))
                    reserved += charge.demand.tokens
            elif what == "wait":
                wall.now_s += pick / 100
            elif running and what == "ended":
                quotas.ended(running[pick % len(running)][0])
            elif running:
                charge, expected = running.pop(pick % len(running))
                quotas.settle(charge, Bill(tokens // 3, tokens - tokens // 3, outcome))
                billed += tokens
                reserved -= expected
            await quotas.settled()
            _, standing = await quotas.standing("acme")
            assert standing is not None
            assert standing.used["day"] == standing.used["month"] == billed + reserved
        for charge, _ in running:
            quotas.settle(charge, Bill(1, 1))
        _, standing = await quotas.standing("acme")
        assert standing is not None
        assert standing.used == {
            "concurrent": 0,
            "day": billed + 2 * len(running),
            "month": billed + 2 * len(running),
        }

    asyncio.run(play())
