"""Quotas: exact under concurrency, the same in this process and in Redis, settled by use, and what an outage does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission import redis_link
from serving.admission.estimates import Cost
from serving.admission.quota_redis import RedisStore
from serving.admission.quota_store import (
    SAVE_EVERY_S,
    WINDOW_S,
    Demand,
    MemoryStore,
    QuotaStore,
    Window,
    periods,
    until_next,
)
from serving.admission.quotas import Charge, Quotas, duration, part_of
from serving.admission.redis_link import RedisLink
from serving.config import FakeEngineConfig, QuotaConfig, TenantConfig
from serving.errors import ConfigError, QuotaExceeded, RateLimited, TokensLimited
from tests.redis_server import RedisServer, redis_server
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, rig

NOW_S = 1_800_000_000.5


class Wall:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


class Told:
    """Records what quotas tell."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []
        self.used: dict[tuple[str, str], float] = {}
        self.up: list[bool] = []

    def quota_refused(self, tenant: str, limit: str) -> None:
        self.refused.append((tenant, limit))

    def quota_used(self, tenant: str, limit: str, part: float) -> None:
        self.used[tenant, limit] = part


@dataclass(frozen=True)
class Bill:
    """A row, as far as quotas read it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    outcome: str = "completed"
    started_at: float = field(default_factory=time.time)
    duration_s: float = 0.0


def ended(prompt: int = 0, completion: int = 0, outcome: str = "completed") -> Bill:
    return Bill(prompt, completion, outcome)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@contextlib.asynccontextmanager
async def connected(server: RedisServer) -> AsyncIterator[RedisLink]:
    link = RedisLink(server.url)
    await link.redis.flushall()
    try:
        yield link
    finally:
        await link.close()


@contextlib.asynccontextmanager
async def store_of(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[QuotaStore]:
    if kind == "memory":
        yield MemoryStore(Wall())
        return
    with pytest.MonkeyPatch.context() as patched:
        # What is counted is looked at, not how soon: 128 calls at once may take a busy machine longer than a gateway waits.
        patched.setattr(redis_link, "CALL_S", 60.0)
        async with connected(request.getfixturevalue("server")) as link:
            yield RedisStore(link)


both = pytest.mark.parametrize("kind", ["memory", "redis"])
USUAL = Cost(10, 20, 1)
leases = (f"lease{i}" for i in itertools.count())


def demand(tokens: int = 1, **quota: int) -> Demand:
    return Demand("acme", QuotaConfig(**quota), next(leases), tokens)


@both
@pytest.mark.parametrize(
    ("quota", "tokens", "most", "limit"),
    [
        ({"requests_per_minute": 40}, 1, 40, "requests"),
        ({"tokens_per_minute": 1000}, 30, 33, "tokens"),
        ({"concurrent_requests": 17}, 1, 17, "concurrent"),
        ({"tokens_per_day": 500}, 7, 71, "day"),
        ({"tokens_per_month": 500}, 7, 71, "month"),
    ],
)
async def test_no_limit_is_passed_by_128_at_once(
    kind: str, quota: dict[str, int], tokens: int, most: int, limit: str, request: pytest.FixtureRequest
) -> None:
    async with store_of(kind, request) as store:
        verdicts = await asyncio.gather(*(store.reserve(demand(tokens, **quota)) for _ in range(128)))
        assert [v.refused for v in verdicts].count(None) == most
        assert {v.refused for v in verdicts} == {None, limit}
        assert all(v.wait_s is not None and 0 <= v.wait_s <= 31 * 86400 for v in verdicts)
        # What was refused was counted nowhere.
        again = await store.reserve(demand(tokens, **quota))
        assert (again.refused, again.requests_used + again.tokens_used + again.day_used + again.month_used) == (
            limit,
            0 if limit == "concurrent" else most * tokens,
        )


@both
async def test_settling_gives_back_what_was_not_used_and_charges_what_was(
    kind: str, request: pytest.FixtureRequest
) -> None:
    every = {"requests_per_minute": 9, "tokens_per_minute": 1000, "tokens_per_day": 5000, "tokens_per_month": 9000}
    async with store_of(kind, request) as store:

        async def standing() -> tuple[int, ...]:
            probe = demand(0, **every)
            v = await store.reserve(probe)
            await store.settle(probe, v, 0, ended_s=NOW_S, refund=True)
            return v.requests_used - 1, v.tokens_used, v.day_used, v.month_used

        asked = demand(600, **every, concurrent_requests=1)
        verdict = await store.reserve(asked)
        assert (verdict.refused, verdict.requests_used, verdict.tokens_used, verdict.concurrent) == (None, 1, 600, 1)
        assert 59 < verdict.tokens_reset_s <= WINDOW_S
        assert (await store.reserve(demand(600, **every))).refused == "tokens"
        assert (await store.reserve(demand(1, **every, concurrent_requests=1))).refused == "concurrent"
        await store.settle(asked, verdict, 150, ended_s=NOW_S, refund=False)
        assert await standing() == (1, 150, 150, 150)
        second = demand(100, **every, concurrent_requests=1)
        verdict = await store.reserve(second)
        assert verdict.refused is None
        await store.settle(second, verdict, 700, ended_s=NOW_S, refund=False)  # beyond its estimate: charged now
        assert await standing() == (2, 850, 850, 850)
        third = demand(100, **every)
        await store.settle(third, await store.reserve(third), 0, ended_s=NOW_S, refund=True)
        assert await standing() == (2, 850, 850, 850)


@both
async def test_to_look_counts_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    limits = {"requests_per_minute": 9, "tokens_per_minute": 1000, "concurrent_requests": 5, "tokens_per_day": 5000}
    quota = QuotaConfig(**limits)
    async with store_of(kind, request) as store:
        assert set((await store.look("acme", quota, {})).used.values()) == {0}
        await store.reserve(demand(600, **limits))
        for _ in range(2):
            found = await store.look("acme", quota, {})
            # What is not limited is not among them, and another tenant has used nothing.
            assert found.used == {"requests": 1, "tokens": 600, "concurrent": 1, "day": 600}
            assert (await store.look("other", quota, {})).used == dict.fromkeys(found.used, 0)
        assert 59 < (found.resets_s["tokens"] or 0.0) <= WINDOW_S
        assert 0 < (found.resets_s["day"] or 0.0) <= 86400
        assert found.resets_s["concurrent"] is None


@both
async def test_what_can_never_fit_says_so(kind: str, request: pytest.FixtureRequest) -> None:
    async with store_of(kind, request) as store:
        verdict = await store.reserve(demand(2000, tokens_per_minute=1000))
        assert (verdict.refused, verdict.wait_s) == ("tokens", None)
        assert (await store.reserve(demand(1000, tokens_per_minute=1000))).refused is None
        verdict = await store.reserve(demand(1000, tokens_per_minute=1000))
        assert verdict.wait_s is not None
        assert 59 < verdict.wait_s <= WINDOW_S


async def test_redis_forgets_what_is_over(server: RedisServer) -> None:
    async with connected(server) as link:
        store = RedisStore(link)
        now = (await link.redis.time())[0]
        # A minute ago, and as a gateway left it that died a minute ago.
        await link.redis.hset("galerne:quota:{acme}:requests", mapping={now - 62: 5, now - 59: 1})
        await link.redis.zadd("galerne:quota:{acme}:leases", {"dead": now - 1, "running": now + 50, "old": now - 3700})
        limits = {"requests_per_minute": 2, "concurrent_requests": 2}
        kept = demand(**limits)
        verdict = await store.reserve(kept)
        assert (verdict.refused, verdict.requests_used, verdict.concurrent) == (None, 2, 2)
        await store.renew([("acme", [kept.lease, "gone"])])
        assert await link.redis.zcount("galerne:quota:{acme}:leases", now + 1, "+inf") == 2
        assert await link.redis.zscore("galerne:quota:{acme}:leases", "old") is None
        keys = await link.redis.keys("*")
        assert keys
        assert all([await link.redis.ttl(key) > 0 for key in keys])


steps = st.lists(
    st.tuples(st.sampled_from(["ask", "settle"]), st.floats(0, 25), st.integers(0, 300)),
    max_size=60,
)


@settings(max_examples=150)
@given(steps)
def test_in_no_minute_is_more_let_through_than_the_limit(plan: list[tuple[str, float, int]]) -> None:
    quota = {"requests_per_minute": 6, "tokens_per_minute": 1000}

    async def play() -> None:
        wall = Wall()
        store = MemoryStore(wall)
        passed: list[tuple[float, int]] = []
        running: list[tuple[Demand, Any]] = []
        for what, gap_s, tokens in plan:
            wall.now_s += gap_s
            if what == "ask":
                asked = demand(tokens, **quota)
                verdict = await store.reserve(asked)
                if verdict.refused is None:
                    passed.append((wall.now_s, tokens))
                    running.append((asked, verdict))
                else:
                    recent = [n for at_s, n in passed if at_s > wall.now_s - WINDOW_S]
                    # Nobody is refused who would have fitted.
                    assert len(recent) + 1 > 6 or sum(recent) + tokens > 1000
            elif running:
                asked, verdict = running.pop(0)
                await store.settle(asked, verdict, asked.tokens, ended_s=NOW_S, refund=False)
        for at_s, _ in passed:
            window = [n for other_s, n in passed if at_s <= other_s < at_s + 60]
            assert len(window) <= 6
            assert sum(window) <= 1000

    asyncio.run(play())


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)), max_size=60))
def test_a_window_never_counts_less_than_nothing(rows: list[tuple[int, int, int]]) -> None:
    window, second, added = Window(), 1000, list[tuple[int, int]]()
    for gap, count, back in rows:
        second += gap
        window.advance(second)
        window.add(second, count)
        added.append((second, count))
        at, most = added[back % len(added)]
        window.give_back(at, min(most, back))
        added[back % len(added)] = at, most - min(most, back)
        assert window.total == sum(n for s, n in added if s > second - WINDOW_S)


def test_budgets_are_of_calendar_days_and_months() -> None:
    assert periods(1_798_761_599) == ("2026-12-31", "2026-12")
    assert periods(1_798_761_600) == ("2027-01-01", "2027-01")
    assert until_next(1_798_761_599, "day") == until_next(1_798_761_599, "month") == 1.0
    assert until_next(1_798_761_600, "month") == 31 * 86400


async def test_budgets_outlive_a_restart_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    file, wall = tmp_path / "budgets.json", Wall()
    store = MemoryStore(wall, file)
    await store.reserve(demand(300, tokens_per_day=1000, tokens_per_month=2000))
    wall.now_s += SAVE_EVERY_S / 2
    await store.reserve(demand(300, tokens_per_day=1000))
    store.save()
    again = MemoryStore(wall, file)
    assert (await again.reserve(demand(500, tokens_per_day=1000))).refused == "day"
    assert (await again.reserve(demand(500, tokens_per_day=1100, tokens_per_month=2000))).refused is None
    for _ in range(40):
        wall.now_s += 86400
        assert (await again.reserve(demand(1000, tokens_per_day=1000, tokens_per_month=90_000))).refused is None
    again.save()
    assert len(json.loads(file.read_text())["acme"]) == 4
    file.write_text("{ no")
    with pytest.raises(ConfigError, match="remove it"):
        MemoryStore(wall, file)


async def test_a_disk_in_trouble_stops_no_request(tmp_path: Path) -> None:
    store = MemoryStore(Wall(), tmp_path / "nowhere" / "budgets.json")
    assert (await store.reserve(demand(1, tokens_per_day=1000))).refused is None
    store.save()


# -- admission


def tenants(**quota: int) -> list[TenantConfig]:
    keys = [{"id": "k", "sha256": "0" * 64}]
    return [TenantConfig.model_validate({"id": "acme", "keys": keys, "quota": quota})]


async def admit(quotas: Quotas, cost: Cost = USUAL) -> tuple[Charge | None, dict[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    charge = await quotas.admit("acme", "m", next(leases), cost, headers)
    return charge, dict(headers)


async def test_headers_and_refusals_are_openais() -> None:
    told = Told()
    quotas = Quotas(tenants(requests_per_minute=2, tokens_per_minute=100), MemoryStore(Wall()), metrics=told)
    charge, headers = await admit(quotas)
    assert headers == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"1m0.5s",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"70",
        b"x-ratelimit-reset-tokens": b"1m0.5s",
    }
    assert told.used == {("acme", "requests"): 0.5, ("acme", "tokens"): 0.3}
    assert charge is not None
    quotas.settle(charge, ended(40, 50))
    await quotas.settled()
    with pytest.raises(TokensLimited) as tokens:
        await admit(quotas)
    assert (tokens.value.type, tokens.value.code) == ("tokens", "rate_limit_exceeded")
    assert tokens.value.retry_after_s == WINDOW_S  # half a second of the bucket is over
    await admit(quotas, Cost(5, 5, 1))
    with pytest.raises(RateLimited) as requests:
        await admit(quotas, Cost(0, 0, 0))
    assert (requests.value.type, requests.value.code) == ("requests", "rate_limit_exceeded")
    assert told.refused == [("acme", "tokens"), ("acme", "requests")]
    # Limits are taken anew, and a tenant without any is not counted.
    quotas.update(tenants(tokens_per_month=50))
    await admit(quotas, Cost(10, 10, 1))
    with pytest.raises(QuotaExceeded) as budget:
        await admit(quotas, Cost(30, 30, 1))
    assert (budget.value.status, budget.value.type, budget.value.code) == (429, *["insufficient_quota"] * 2)
    quotas.update(tenants())
    assert "acme" not in quotas
    assert await admit(quotas) == (None, {})


async def test_what_is_never_to_be_repeated_says_so() -> None:
    quotas = Quotas(tenants(tokens_per_minute=20), MemoryStore(Wall()), metrics=Told())
    headers: list[tuple[bytes, bytes]] = []
    with pytest.raises(TokensLimited, match="Request too large") as caught:
        await quotas.admit("acme", "m", "x", Cost(10, 20, 1, stated_tokens=21), headers)
    assert caught.value.retry_after_s is None
    assert (b"x-should-retry", b"false") in headers


@pytest.mark.parametrize(
    ("row", "used", "requests"),
    [
        (ended(7, 5), 12, 2),
        (ended(10, 500), 510, 2),
        (ended(9, 3, "cancelled"), 12, 2),
        # An answer that was cut is charged what it was billed, and counts as no request.
        (ended(7, 5, "failed"), 12, 1),
        (ended(outcome="rejected"), 0, 1),
    ],
)
async def test_a_request_is_charged_what_its_row_says(row: Bill, used: int, requests: int) -> None:
    told = Told()
    limits = {"tokens_per_day": 1000, "requests_per_minute": 5, "concurrent_requests": 1}
    quotas = Quotas(tenants(**limits), MemoryStore(Wall()), metrics=told)
    charge, _ = await admit(quotas)
    assert charge is not None
    quotas.ended(charge)
    await quotas.settled()
    _, standing = await quotas.standing("acme")
    assert standing is not None
    # It runs no more. What it reserved stays charged until it has its row.
    assert standing.used == {"requests": 1, "concurrent": 0, "day": 30}
    quotas.settle(charge, row)
    await quotas.settled()
    await admit(quotas, Cost(0, 0, 1))
    assert told.used["acme", "day"] == used / 1000
    assert told.used["acme", "requests"] == requests / 5


def test_durations_and_parts() -> None:
    assert [duration(s) for s in (0, 0.0204, 1, 7.66, 60, 61.5)] == ["0s", "21ms", "1s", "7.66s", "1m0s", "1m1.5s"]
    assert part_of(QuotaConfig(requests_per_minute=7, concurrent_requests=1), 3) == QuotaConfig(
        requests_per_minute=2, concurrent_requests=1
    )


# -- through the gateway


async def test_a_tenants_quota_through_the_gateway() -> None:
    async with rig(FAST, tenant={"quota": {"requests_per_minute": 2, "tokens_per_minute": 5000}}, chat={}) as made:
        for left in ("1", "0"):
            answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 5000
        refused = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"stream": True})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 55 <= int(refused.headers["retry-after"]) <= 61
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        other = await made.http.post(COMPLETIONS, headers={"authorization": "Bearer sk-other"}, json=CHAT)
        assert other.status_code == 200
        assert not [name for name in other.headers if name.startswith("x-ratelimit")]
        assert made.total("galerne_quota_refusals_total", tenant="press", limit="requests") == 1
        assert made.total("galerne_quota_use", tenant="press", limit="requests") == 1
        assert made.total("galerne_limits_store_up") == 1
        assert made.total("galerne_requests_finished_total", outcome="completed") == 3


async def test_max_tokens_is_a_ceiling_and_no_demand() -> None:
    async with rig(FAST, tenant={"quota": {"tokens_per_minute": 1000, "tokens_per_day": 100_000}}, chat={}) as made:
        # Eight answers to each of eight prompts are expected to take more than there is, and the request allows it.
        large = {"model": "chat", "prompt": ["hello"] * 8, "n": 8, "max_tokens": 1500, "ignore_eos": True}
        refused = await made.http.post("/v1/completions", headers=AUTH, json=large)
        assert refused.status_code == 429, refused.text
        assert "Request too large" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
        assert refused.headers["x-should-retry"] == "false"
        # One answer is expected to be as long as answers are, whatever it may be.
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"max_tokens": 1500, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 500
        # It has written more than the limit all the same: that is paid back within the minute.
        assert answer.json()["usage"]["completion_tokens"] == 1500
        later = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert (later.status_code, later.headers["x-ratelimit-remaining-tokens"]) == (429, "0")
        assert 55 <= int(later.headers["retry-after"]) <= 61


async def test_concurrent_requests_are_given_back_when_they_end_or_their_client_leaves() -> None:
    slow = FakeEngineConfig(decode_ms=20)
    async with rig(slow, tenant={"quota": {"concurrent_requests": 1}}, chat={}) as made:
        body = CHAT | {"stream": True, "max_tokens": 5000, "ignore_eos": True}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            await anext(stream.aiter_bytes())
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 429
        await made.settled()
        await made.gateway.quotas.settled()
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200


@pytest.mark.parametrize("limit", ["requests_per_minute", "concurrent_requests"])
async def test_what_computes_nothing_counts_as_a_request_and_costs_no_tokens(limit: str) -> None:
    quota = {"quota": {limit: 2, "tokens_per_minute": 1000, "tokens_per_day": 1000}}
    async with rig(FAST, tenant=quota) as made:
        bodies = {"/tokenize": {"prompt": "hello there " * 500}, "/detokenize": {"tokens": [1] * 2000}}
        for path, fields in bodies.items():
            answer = await made.http.post(path, headers=AUTH, json={"model": "chat"} | fields)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-ratelimit-remaining-tokens"] == "1000"
        await made.settled()
        await made.gateway.quotas.settled()
        _, standing = await made.gateway.quotas.standing("press")
        assert standing is not None
        assert (standing.used["tokens"], standing.used["day"]) == (0, 0)
        if limit == "requests_per_minute":
            assert standing.used["requests"] == 2
            refused = await made.http.post("/tokenize", headers=AUTH, json={"model": "chat", "prompt": "hello"})
            assert refused.status_code == 429
        else:
            asked = [
                made.http.post("/tokenize", headers=AUTH, json={"model": "chat", "prompt": "hello"}) for _ in range(40)
            ]
            statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
            assert set(statuses) == {200, 429}
