"""How many requests of a model may be on their second replica at once.

A request that a replica lost is new load for the others. When one replica dies, its requests are a share of all and
the others can take them; when everything fails, second tries would double the load on what is left. So those that are
under way and not yet answered are bounded by a share of all requests under way, and never by fewer than a few
(after Finagle's and Envoy's retry budgets). Whoever lost a replica for good may wait for a turn; turns go in the
order of asking, and one is over when its first byte has come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Final, Self

LEAST: Final = 3


def allowed(active: int, share: float, least: int = LEAST) -> int:
    """Second tries at once, of `active` requests under way."""
    return max(least, int(active * share))


class Turn:
    """One request's second try; `end` gives it back, as often as it is called."""

    __slots__ = ("_budget",)

    def __init__(self, budget: RetryBudget) -> None:
        self._budget: RetryBudget | None = budget

    def end(self) -> None:
        """The first byte has come, or never will."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget.ended()


class RetryBudget:
    """The second tries of one model. Used from one event loop only; around each request it is a context."""

    __slots__ = ("_share", "_waiting", "active", "retrying")

    def __init__(self, share: float) -> None:
        self._share = share
        self._waiting: deque[asyncio.Future[None]] = deque()
        # Requests under way, second tries among them.
        self.active = 0
        self.retrying = 0

    def __enter__(self) -> Self:
        self.active += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active -= 1

    async def turn(self, wait_s: float) -> Turn | None:
        """A turn now, or within `wait_s`; None where none came."""
        if not self._waiting and self._free():
            self.retrying += 1
            return Turn(self)
        if wait_s <= 0:
            return None
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await asyncio.wait({place}, timeout=wait_s)
        except asyncio.CancelledError:
            if place.done():
                self.ended()
            raise
        finally:
            if not place.done():
                self._waiting.remove(place)
        return Turn(self) if place.done() else None

    def ended(self) -> None:
        """A turn is over."""
        self.retrying -= 1
        while self._waiting and self._free():
            self.retrying += 1
            self._waiting.popleft().set_result(None)

    def _free(self) -> bool:
        return self.retrying < allowed(self.active, self._share)
