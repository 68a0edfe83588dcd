"""Budgets that their store has lost, or has never had, are rebuilt from the ledger: both are of the same rows.

A store says of a tenant since when it counts. What ended before that moment is in the ledger a few seconds later: it is
summed, over the month of that moment, and added to what has been counted since. One gateway of several does it, and the
store takes it once. Off the request's path: a request waits for it only where nothing at all is remembered of what its
tenant has used, and for a bounded time.

While the ledger does not answer it is asked again, one tenant after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol

import structlog

from serving.admission.quota_store import Lost, StoreDown, month_of
from serving.metering.questions import NoAnswer

# The ledger, or the store, is asked again so often.
AGAIN_S: Final = 0.5
REPEAT_S: Final = 60.0

log = structlog.get_logger("galerne.quotas")


class Books(Protocol):
    """The ledger, as far as budgets go."""

    @property
    def name(self) -> str: ...
    @property
    def lag_s(self) -> float:
        """So long after a request's end its row can be asked for."""

    async def spent(self, tenant: str, ended_before_s: float) -> dict[str, int]:
        """Tokens of requests that had ended by then, by day of that moment's month; raises NoAnswer."""


class Store(Protocol):
    """A store of quotas, as far as budgets are rebuilt."""

    async def begin(self, tenant: str) -> Lost | None: ...
    async def fill(self, tenant: str, lost: Lost, spent: Mapping[str, int]) -> None: ...


class Rebuild:
    """Of one gateway. Used from one event loop only."""

    def __init__(
        self,
        store: Store,
        books: Books,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._books = books
        self._clock = clock
        self._sleep = sleep
        # Tenants whose budgets are not known, and what is set when they are; those that are waited for go first.
        self._wanted: dict[str, asyncio.Event] = {}
        self._waited: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._said_s: float | None = None

    @property
    def wanted(self) -> frozenset[str]:
        """Tenants whose budgets are being rebuilt."""
        return frozenset(self._wanted)

    def want(self, tenants: Iterable[str]) -> None:
        """Rebuild what is not known of these tenants' budgets. Returns at once."""
        for tenant in tenants:
            self._wanted.setdefault(tenant, asyncio.Event())
        if self._wanted and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._work(), name="budgets")

    async def wait(self, tenant: str, within_s: float) -> bool:
        """Rebuild a tenant's budgets; whether they are known in time."""
        self.want((tenant,))
        known = self._wanted[tenant]
        self._waited[tenant] = self._waited.get(tenant, 0) + 1
        try:
            async with asyncio.timeout(within_s):
                await known.wait()
        except TimeoutError:
            return False
        finally:
            self._waited[tenant] -= 1
            if not self._waited[tenant]:
                del self._waited[tenant]
        return True

    def close(self) -> None:
        """Rebuild no more."""
        if self._task is not None:
            self._task.cancel()

    async def _work(self) -> None:
        while self._wanted:
            tried: set[str] = set()
            with contextlib.suppress(StoreDown, NoAnswer):
                while (tenant := self._next(tried)) is not None:
                    tried.add(tenant)
                    if await self._known(tenant):
                        self._wanted.pop(tenant).set()
            if self._wanted:
                await self._sleep(AGAIN_S)

    def _next(self, tried: set[str]) -> str | None:
        """Whoever is waited for goes before the others, and each once a round."""
        left = [tenant for tenant in self._wanted if tenant not in tried]
        return next((tenant for tenant in left if tenant in self._waited), left[0] if left else None)

    async def _known(self, tenant: str) -> bool:
        """Whether a tenant's budgets are known now; raises StoreDown or NoAnswer, which end a round."""
        lost = await self._store.begin(tenant)
        if lost is None:
            return True
        if not lost.mine or lost.age_s < self._books.lag_s:
            return False
        try:
            spent = await self._books.spent(tenant, lost.since_s)
        except NoAnswer as trouble:
            self._complain(trouble)
            # It may be this tenant's sum alone that takes too long: others go before it from now on.
            self._wanted[tenant] = self._wanted.pop(tenant)
            raise
        await self._store.fill(tenant, lost, by_period(spent))
        log.info("a tenant's budgets were told by the ledger", tenant=tenant)
        return True

    def _complain(self, trouble: NoAnswer) -> None:
        now_s = self._clock()
        if self._said_s is None or now_s - self._said_s >= REPEAT_S:
            self._said_s = now_s
            log.warning(
                "budgets cannot be rebuilt from the ledger yet", tenants=len(self._wanted), reason=trouble.reason
            )


def by_period(spent: Mapping[str, int]) -> dict[str, int]:
    """Sums of days with those of their months."""
    found = dict(spent)
    for day, tokens in spent.items():
        found[month_of(day)] = found.get(month_of(day), 0) + tokens
    return found
