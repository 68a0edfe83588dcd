"""What a shared store of quotas is still to be told, because it was away when it happened.

Requests that ended meanwhile are settled: what they held is free, and their tokens are charged to the days they were
admitted on. Reservations that nobody heard of are undone, so they are not counted beside what the request was admitted
by instead. Tokens of requests that the store never knew are owed: one sum for each tenant, day and minute, because a
store that comes back empty is told by the ledger what had ended before.

Promise: nothing is told twice and nothing is left out, also where the store goes away again while it is told, or does
what it was asked and its answer comes too late (each part has a name that the store remembers). Memory: requests that
ran, or were being admitted, when the store went away (a store that comes and goes leaves the last MOST_LATE of them),
and a sum for each tenant and minute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from serving.admission.quota_redis import RedisStore
from serving.admission.quota_store import Demand, StoreDown, Verdict

MOST_LATE: Final = 65_536
MINUTE_S: Final = 60


@dataclass(frozen=True, slots=True)
class _Late:
    """A request that the store counted, or may have: what it used in the end."""

    demand: Demand
    verdict: Verdict
    used_tokens: int
    ended_s: float
    refund: bool
    # It may have been told already.
    again: bool


@dataclass(frozen=True, slots=True)
class _Debt:
    """Tokens that a tenant used on a day, of requests that the store never knew, of which the last ended then."""

    name: str
    tenant: str
    day: str
    tokens: int
    ended_s: float


class Arrears:
    """Of one store. `pay` is never called twice at once."""

    def __init__(self, store: RedisStore, new_name: Callable[[], str]) -> None:
        """`new_name` gives names that nobody else gives."""
        self._store = store
        self._new_name = new_name
        self._late: deque[_Late] = deque(maxlen=MOST_LATE)
        # Named when they are first told, and the same until the store has heard.
        self._debts: deque[_Debt] = deque()
        # By tenant, day and minute: tokens, and when the last of them were used.
        self._owed: dict[tuple[str, str, int], tuple[int, float]] = {}

    def undo(self, demand: Demand, now_s: float) -> None:
        """A reservation that the store may have made, and that counts for nothing."""
        self._late.append(_Late(demand, Verdict.uncounted(now_s), 0, now_s, refund=True, again=True))

    def settle(
        self, demand: Demand, verdict: Verdict, used_tokens: int, *, ended_s: float, refund: bool, again: bool
    ) -> None:
        """A request that the store counted has ended; `again`: it may have heard so."""
        self._late.append(_Late(demand, verdict, used_tokens, ended_s, refund, again))

    def owe(self, demand: Demand, day: str, tokens: int, ended_s: float) -> None:
        """A request that the store never knew has used so many."""
        if not tokens or not demand.quota.has_budget:
            return
        key = demand.tenant, day, int(ended_s // MINUTE_S)
        before, last_s = self._owed.get(key, (0, ended_s))
        self._owed[key] = before + tokens, max(last_s, ended_s)

    async def pay(self) -> None:
        """Tell the store everything; StoreDown where it is away again, and what is left is told another time."""
        # Whatever is told is taken out before: others are added while the store answers.
        while self._late:
            late = self._late.popleft()
            try:
                await self._store.settle(
                    late.demand,
                    late.verdict,
                    late.used_tokens,
                    ended_s=late.ended_s,
                    refund=late.refund,
                    again=late.again,
                )
            except StoreDown as down:
                self._late.appendleft(replace(late, again=late.again or down.asked))
                raise
        await self._pay_debts()
        owed, self._owed = self._owed, {}
        self._debts.extend(
            _Debt(self._new_name(), tenant, day, tokens, ended_s)
            for (tenant, day, _), (tokens, ended_s) in owed.items()
        )
        await self._pay_debts()

    async def _pay_debts(self) -> None:
        while self._debts:
            debt = self._debts[0]
            await self._store.owe(debt.name, debt.tenant, debt.day, debt.tokens, debt.ended_s)
            self._debts.popleft()
