"""Whether a tenant may use more now: admits a request against its limits, and settles what it is billed.

Promises: no limit is passed by more than what running requests use beyond what was reserved; what a request reserved
stays charged until it has its row in the ledger, and then it is charged what the row says, no more and no less, however
it ended; nobody is told that a request never fits because of a guess; a tenant without limits pays one look-up. While a
shared store does not answer, what happens is the operator's choice (`limits_on_outage`), requests do not wait for it
again and again, and what was used meanwhile is charged to the budgets once it is back, whatever was chosen (`arrears`).
A store that has lost its budgets is told them by the ledger (`rebuild`); until then they are what this gateway last saw
of them, and no budget may be spent twice.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog

from serving.admission.arrears import Arrears
from serving.admission.estimates import Cost
from serving.admission.quota_redis import LEASE_S, RedisStore
from serving.admission.quota_store import (
    BudgetsLost,
    Demand,
    MemoryStore,
    QuotaStanding,
    QuotaStore,
    StoreDown,
    Verdict,
)
from serving.admission.rebuild import Books, Rebuild
from serving.admission.redis_link import RedisLink
from serving.config import MEMORY, GalerneConfig, Limit, OnOutage, QuotaConfig, TenantConfig
from serving.errors import QuotaExceeded, RateLimited, TokensLimited, Unavailable

OUTAGE_RETRY_S = 5
# While the store is away it is looked for so often; while it answers, leases are renewed and budgets written.
LOOK_EVERY_S = 1.0
RENEW_EVERY_S = LEASE_S / 4
# A request of a tenant of whose budgets nothing is known waits so long for the ledger's word.
REBUILT_WITHIN_S = 10.0
Headers = list[tuple[bytes, bytes]]

log = structlog.get_logger("galerne.quotas")

_WORDS: dict[Limit, str] = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "concurrent": "concurrent requests",
    "day": "tokens per day (UTC)",
    "month": "tokens per month (UTC)",
}


class QuotaMetrics(Protocol):
    """What is told of quotas."""

    def quota_refused(self, tenant: str, limit: str) -> None:
        """A request was refused by a limit: requests, tokens, concurrent, day, month, or store."""

    def quota_used(self, tenant: str, limit: str, part: float) -> None:
        """How much of a limit is used, 1: all of it."""


class StoreMetrics(QuotaMetrics, Protocol):
    """What is told of quotas and of their store."""

    def limits_store(self, *, up: bool) -> None:
        """Whether the store of limits answers."""


class Billed(Protocol):
    """What is read of a request's row."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def outcome(self) -> str: ...
    @property
    def started_at(self) -> float: ...
    @property
    def duration_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request was admitted with; `store` None: it was let through uncounted."""

    demand: Demand
    verdict: Verdict
    store: QuotaStore | None


class Quotas:
    """The limits of all tenants of a gateway. Used from one event loop only."""

    def __init__(
        self,
        tenants: Iterable[TenantConfig],
        memory: MemoryStore,
        link: RedisLink | None = None,
        *,
        on_outage: OnOutage = "local",
        metrics: QuotaMetrics,
        books: Books | None = None,
        rebuilt_within_s: float = REBUILT_WITHIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory` counts where there is no `link`, and in an outage of it with `on_outage` local.

        `books`: the ledger, where there is one: requests wait so long for its word on budgets that nobody knows.
        """
        self._rebuilt_within_s = rebuilt_within_s
        self._memory = memory
        self._link = link
        ledger = "" if books is None else books.name
        self._shared = None if link is None else RedisStore(link, ledger=ledger, name=uuid.uuid4().hex)
        self._rebuild = None if books is None else Rebuild(self._shared or memory, books, clock=clock)
        # By tenant, what was last seen used of its present day and month.
        self._remembered: dict[str, dict[str, int]] = {}
        # The store that the budgets of these tenants were looked for in.
        self._which: str | None = None
        self._arrears = None if self._shared is None else Arrears(self._shared, lambda: uuid.uuid4().hex)
        self._on_outage = on_outage
        self._metrics = metrics
        self._limited: dict[str, QuotaConfig] = {}
        self._gateways = 1
        # By tenant, the leases of running requests.
        self._running: dict[str, set[str]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self.update(tenants)

    def update(self, tenants: Iterable[TenantConfig]) -> None:
        """Take the tenants' limits, now or after a reload; running requests are settled by what they came with."""
        self._limited = {tenant.id: tenant.quota for tenant in tenants if tenant.quota.limited}
        # There may be budgets among them of which nobody has asked the ledger yet.
        self._which = None

    def divide(self, gateways: int) -> None:
        """Take how many gateways there are: each one's part of the limits in an outage of the shared store."""
        self._gateways = max(1, gateways)

    @property
    def link(self) -> RedisLink | None:
        """The store that gateways share, where they do."""
        return self._link

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._limited

    async def admit(self, tenant: str, model: str, lease: str, cost: Cost, headers: Headers) -> Charge | None:
        """Reserve what a request is expected to use; None where nothing is counted.

        Adds OpenAI's x-ratelimit headers to `headers`, of a refusal too. Raises RateLimited, TokensLimited or
        QuotaExceeded beyond a limit, Unavailable in an outage with `closed`.
        """
        quota = self._limited.get(tenant)
        if quota is None:
            return None
        demand = Demand(
            tenant, quota, lease, reserved(cost, quota), cost.beside_tokens, self._remembered.get(tenant, {})
        )
        charge = await self._reserve(demand)
        if charge.store is None:
            return charge
        quota, verdict = charge.demand.quota, charge.verdict
        self._show(tenant, quota, verdict)
        headers += headers_of(quota, verdict)
        if verdict.refused is not None:
            self._metrics.quota_refused(tenant, verdict.refused)
            if verdict.wait_s is None or verdict.refused in {"day", "month"}:
                # OpenAI's clients repeat a 429 by themselves; these will be refused again.
                headers.append((b"x-should-retry", b"false"))
            raise refusal(charge.demand, verdict, model)
        self._running.setdefault(tenant, set()).add(lease)
        return charge

    def ended(self, charge: Charge) -> None:
        """A request has ended and may not have its row yet: it is no concurrent request any more. Returns at once."""
        if self._let_go(charge) and charge.store is not None:
            self._beside(self._release(charge.store, charge.demand))

    def settle(self, charge: Charge, row: Billed) -> None:
        """A request has its row: charge what it says, and what was computed beside.

        Returns at once; a shared store is told in the background.
        """
        self._let_go(charge)
        used, refund = row.prompt_tokens + row.completion_tokens, row.outcome in {"rejected", "failed"}
        if used:
            used += charge.demand.beside_tokens
        if charge.store is not None and charge.verdict.known:
            seen = self._remembered.get(charge.demand.tenant, {})
            for period in seen.keys() & {charge.verdict.day, charge.verdict.month}:
                seen[period] += used - charge.demand.tokens
        if self._shared is not None:
            self._beside(self._settle(charge, used, row.started_at + row.duration_s, refund=refund))
        # In this process it is one step, also while the gateway closes.
        elif charge.store is not None:
            self._memory.charge(charge.demand, charge.verdict, used, refund=refund)
        else:
            self._memory.owe(charge.demand, charge.verdict, used)

    async def standing(self, tenant: str) -> tuple[QuotaConfig, QuotaStanding | None]:
        """A tenant's limits and how much of them is used; None while that is not known."""
        quota = self._limited.get(tenant, QuotaConfig())
        store: QuotaStore = self._memory if self._shared is None else self._shared
        with suppress(StoreDown, BudgetsLost):
            return quota, await store.look(tenant, quota, self._remembered.get(tenant, {}))
        return quota, None

    async def settled(self) -> None:
        """Return when all that has its row is charged."""
        while self._settling:
            await asyncio.wait(self._settling)

    @property
    def rebuilding(self) -> frozenset[str]:
        """Tenants of whose budgets the ledger has still to tell."""
        return frozenset() if self._rebuild is None else self._rebuild.wanted

    async def watch(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """For ever: look for a store that is away, renew leases, write budgets."""
        waited_s = 0.0
        while True:
            await sleep(LOOK_EVERY_S)
            waited_s += LOOK_EVERY_S
            try:
                await self._look(renew=waited_s >= RENEW_EVERY_S)
            except Exception:
                log.exception("looking after the store of limits failed")
            if waited_s >= RENEW_EVERY_S:
                waited_s = 0.0

    def close(self) -> None:
        """Write what is kept in this process."""
        if self._rebuild is not None:
            self._rebuild.close()
        self._memory.save()

    # --

    async def _reserve(self, demand: Demand) -> Charge:
        try:
            return await self._counted(demand)
        except BudgetsLost:
            if self._rebuild is not None and await self._rebuild.wait(demand.tenant, self._rebuilt_within_s):
                with suppress(BudgetsLost):
                    return await self._counted(demand)
        # Nothing is known of what its tenant has used, and a part of a budget that is spent already is too much.
        if self._on_outage == "open":
            return Charge(demand, Verdict.uncounted(self._wall_s()), None)
        raise self._uncertain(demand.tenant)

    async def _counted(self, demand: Demand) -> Charge:
        if self._shared is None or self._arrears is None:
            return self._seen(Charge(demand, await self._memory.reserve(demand), self._memory))
        now_s = self._shared.wall_s()
        try:
            return self._seen(Charge(demand, await self._shared.reserve_at(now_s, demand), self._shared))
        except StoreDown as down:
            if down.asked:
                self._arrears.undo(demand, now_s)
        except asyncio.CancelledError:
            self._arrears.undo(demand, now_s)
            raise
        if self._on_outage == "open":
            return Charge(demand, Verdict.uncounted(now_s), None)
        if self._on_outage == "closed":
            raise self._uncertain(demand.tenant)
        own = part_in_outage(demand, self._gateways)
        # Of what is used already each gateway has its part too.
        self._memory.remember(
            demand.tenant, {period: used // self._gateways for period, used in demand.remembered.items()}
        )
        return Charge(own, await self._memory.reserve(own), self._memory)

    def _uncertain(self, tenant: str) -> Unavailable:
        self._metrics.quota_refused(tenant, "store")
        return Unavailable(
            "Usage limits cannot be checked at the moment. Try again shortly.",
            code="limits_unavailable",
            retry_after_s=OUTAGE_RETRY_S,
        )

    def _wall_s(self) -> float:
        return time.time() if self._shared is None else self._shared.wall_s()

    def _seen(self, charge: Charge) -> Charge:
        """Remember what is used of a tenant's budgets, for a store that forgets it."""
        verdict, tenant, quota = charge.verdict, charge.demand.tenant, charge.demand.quota
        if not quota.has_budget:
            return charge
        if verdict.known:
            seen = self._remembered[tenant] = {}
            if quota.tokens_per_day is not None:
                seen[verdict.day] = verdict.day_used
            if quota.tokens_per_month is not None:
                seen[verdict.month] = verdict.month_used
        elif self._rebuild is not None:
            self._rebuild.want((tenant,))
        return charge

    def _let_go(self, charge: Charge) -> bool:
        """Forget the lease of a running request; False where it was forgotten before."""
        running = self._running.get(charge.demand.tenant, set())
        if charge.demand.lease not in running:
            return False
        running.discard(charge.demand.lease)
        return True

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _release(self, store: QuotaStore, demand: Demand) -> None:
        # A store that is away hears of the lease's end when it is told what the request used.
        with suppress(StoreDown):
            await store.release(demand)

    async def _settle(self, charge: Charge, used: int, ended_s: float, *, refund: bool) -> None:
        demand, verdict = charge.demand, charge.verdict
        if charge.store is not None:
            try:
                await charge.store.settle(demand, verdict, used, ended_s=ended_s, refund=refund)
            except StoreDown as down:
                if self._arrears is not None:
                    self._arrears.settle(demand, verdict, used, ended_s=ended_s, refund=refund, again=down.asked)
                return
        if self._arrears is not None and charge.store is not self._shared:
            # To the day it was admitted on, as where the store has not been away.
            self._arrears.owe(demand, verdict.day, used, ended_s)

    async def _look(self, *, renew: bool) -> None:
        self._memory.save()
        if self._link is None or self._shared is None or self._arrears is None:
            self._look_for_budgets("")
            return
        if not await self._link.probe():
            return
        with suppress(StoreDown):
            self._look_for_budgets(await self._shared.which())
            await self._arrears.pay()
            self._memory.forget_budgets()
            if renew:
                await self._shared.renew([(t, list(leases)) for t, leases in self._running.items() if leases])

    def _look_for_budgets(self, which: str) -> None:
        """Rebuild what this store does not know of tenants' budgets; once, until it is another or tenants change."""
        if self._rebuild is not None and which != self._which:
            self._which = which
            self._rebuild.want(tenant for tenant, quota in self._limited.items() if quota.has_budget)

    def _show(self, tenant: str, quota: QuotaConfig, verdict: Verdict) -> None:
        for limit, used, most in _uses(quota, verdict):
            self._metrics.quota_used(tenant, limit, used / most)


def _uses(quota: QuotaConfig, verdict: Verdict) -> Iterable[tuple[Limit, int, int]]:
    """Of each limit that is set: how much is used, and how much there is."""
    used = verdict.used
    return ((limit, used[limit], most) for limit, most in quota.by_limit.items() if most is not None)


def part_of(quota: QuotaConfig, gateways: int) -> QuotaConfig:
    """One gateway's part of a tenant's limits; never nothing."""
    return QuotaConfig(**{name: None if most is None else max(1, most // gateways) for name, most in quota})


def reserved(cost: Cost, quota: QuotaConfig) -> int:
    """Tokens to reserve for a request: what is expected of it, at most all there is.

    An expectation beyond a limit is a guess: such a request gets its turn when nothing else counts. Only where the
    request itself says more than the limit has, it is asked for in full, and so refused for good.
    """
    most = _smallest(quota)
    expected = math.ceil(cost.input_tokens + cost.output_tokens)
    return expected if cost.stated_tokens > most else min(expected, most)


def part_in_outage(demand: Demand, gateways: int) -> Demand:
    """What a request asks of one gateway's part of the limits: what fits the whole is not too large for a part."""
    part = part_of(demand.quota, gateways)
    fits = demand.tokens <= _smallest(demand.quota)
    return replace(demand, quota=part, tokens=min(demand.tokens, _smallest(part)) if fits else demand.tokens)


def _smallest(quota: QuotaConfig) -> int:
    limits = (quota.tokens_per_minute, quota.tokens_per_day, quota.tokens_per_month)
    return min((most for most in limits if most is not None), default=sys.maxsize)


def refusal(demand: Demand, verdict: Verdict, model: str) -> RateLimited:
    """The answer beyond a limit, in OpenAI's words and codes."""
    limit = verdict.refused or "requests"
    most, used = demand.quota.by_limit[limit], verdict.used[limit]
    words = _WORDS[limit]
    if limit in {"day", "month"}:
        return QuotaExceeded(
            f"You exceeded your current quota: limit {most} {words}, used {used}, requested {demand.tokens}.",
            retry_after_s=_seconds(verdict.wait_s),
        )
    kind = TokensLimited if limit == "tokens" else RateLimited
    if verdict.wait_s is None:
        return kind(
            f"Request too large for '{model}' on {words}: limit {most}, requested {demand.tokens}. "
            "Send a shorter prompt or a smaller max_tokens.",
        )
    asked = demand.tokens if limit == "tokens" else 1
    seconds = _seconds(verdict.wait_s)
    return kind(
        f"Rate limit reached for '{model}' on {words}: limit {most}, used {used}, requested {asked}. "
        f"Please try again in {seconds}s.",
        retry_after_s=seconds,
    )


def headers_of(quota: QuotaConfig, verdict: Verdict) -> Headers:
    """OpenAI's headers of the limits of a minute that are set."""
    found: Headers = []
    for name, most, used, reset_s in (
        (b"requests", quota.requests_per_minute, verdict.requests_used, verdict.requests_reset_s),
        (b"tokens", quota.tokens_per_minute, verdict.tokens_used, verdict.tokens_reset_s),
    ):
        if most is not None:
            found += [
                (b"x-ratelimit-limit-" + name, b"%d" % most),
                (b"x-ratelimit-remaining-" + name, b"%d" % max(0, most - used)),
                (b"x-ratelimit-reset-" + name, duration(reset_s).encode()),
            ]
    return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 7.66s, 1m0s."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:.3g}s" if minutes else f"{rest:.4g}s"


def _seconds(wait_s: float | None) -> int:
    return max(1, math.ceil(wait_s or 0.0))


def of(
    config: GalerneConfig,
    metrics: StoreMetrics,
    file: Path | None,
    password: str | None = None,
    books: Books | None = None,
) -> Quotas:
    """The quotas of a configuration; `file` keeps budgets where no shared store and no file of its own is named.

    `password` is the shared store's where its URL has none; `books` the ledger, where there is one.
    """
    parts = urlsplit(config.limits_store)
    metrics.limits_store(up=True)
    if parts.scheme == MEMORY:
        own = Path(parts.path) if parts.path.strip("/") else file
        memory = MemoryStore(time.time, own, ledger=books is not None)
        return Quotas(config.tenants, memory, on_outage=config.limits_on_outage, metrics=metrics, books=books)
    link = RedisLink(config.limits_store, lambda up: metrics.limits_store(up=up), password)
    memory = MemoryStore(time.time)
    return Quotas(config.tenants, memory, link, on_outage=config.limits_on_outage, metrics=metrics, books=books)
