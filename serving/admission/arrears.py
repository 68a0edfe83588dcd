"""What a shared store of quotas is still to be told, because it was away when it happened.

Requests that ended meanwhile are settled: what they held is free, and their tokens are charged to the days they were
admitted on. Reservations that nobody heard of are undone, so they are not counted beside what the request was admitted
by instead. Tokens of requests that the store never knew are owed: one sum for each tenant and day.

Promise: nothing is told twice and nothing is left out, also where the store goes away again while it is told, or does
what it was asked and its answer comes too late (each part has a name that the store remembers). Memory: requests that
ran, or were being admitted, when the store went away (a store that comes and goes leaves the last MOST_LATE of them),
and a sum for each tenant and day.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from serving.admission.quota_redis import RedisStore
from serving.admission.quota_store import Demand, StoreDown, Verdict
from serving.config import QuotaConfig

MOST_LATE: Final = 65_536


@dataclass(frozen=True, slots=True)
class _Late:
    """A request that the store counted, or may have: what it used in the end."""

    demand: Demand
    verdict: Verdict
    used_tokens: int
    refund: bool
    # It may have been told already.
    again: bool


@dataclass(frozen=True, slots=True)
class _Debt:
    """Tokens that a tenant used on a day, of requests that the store never knew."""

    name: str
    tenant: str
    quota: QuotaConfig
    day: str
    tokens: int


class Arrears:
    """Of one store. `pay` is never called twice at once."""

    def __init__(self, store: RedisStore, new_name: Callable[[], str]) -> None:
        """`new_name` gives names that nobody else gives."""
        self._store = store
        self._new_name = new_name
        self._late: deque[_Late] = deque(maxlen=MOST_LATE)
        # Named when they are first told, and the same until the store has heard.
        self._debts: deque[_Debt] = deque()
        self._owed: dict[tuple[str, str], tuple[QuotaConfig, int]] = {}

    def undo(self, demand: Demand, now_s: float) -> None:
        """A reservation that the store may have made, and that counts for nothing."""
        self._late.append(_Late(demand, Verdict.uncounted(now_s), 0, refund=True, again=True))

    def settle(self, demand: Demand, verdict: Verdict, used_tokens: int, *, refund: bool, again: bool) -> None:
        """A request that the store counted has ended; `again`: it may have heard so."""
        self._late.append(_Late(demand, verdict, used_tokens, refund, again))

    def owe(self, demand: Demand, day: str, tokens: int) -> None:
        """A request that the store never knew has used so many."""
        quota = demand.quota
        if not tokens or (quota.tokens_per_day is None and quota.tokens_per_month is None):
            return
        _, before = self._owed.get((demand.tenant, day), (quota, 0))
        self._owed[demand.tenant, day] = quota, before + tokens

    async def pay(self) -> None:
        """Tell the store everything; StoreDown where it is away again, and what is left is told another time."""
        # Whatever is told is taken out before: others are added while the store answers.
        while self._late:
            late = self._late.popleft()
            try:
                await self._store.settle(
                    late.demand, late.verdict, late.used_tokens, refund=late.refund, again=late.again
                )
            except StoreDown as down:
                self._late.appendleft(replace(late, again=late.again or down.asked))
                raise
        await self._pay_debts()
        owed, self._owed = self._owed, {}
        self._debts.extend(
            _Debt(self._new_name(), tenant, quota, day, tokens) for (tenant, day), (quota, tokens) in owed.items()
        )
        await self._pay_debts()

    async def _pay_debts(self) -> None:
        while self._debts:
            debt = self._debts[0]
            await self._store.owe(debt.name, debt.tenant, debt.quota, debt.day, debt.tokens)
            self._debts.popleft()
