"""A gateway's watch over what is in its hands: replicas that go silent, answers that stall, clients that do not read.

Once an interval every replica is asked for its health, and every answer under way is looked at: whether something
came since, whether its client took what was there. So nothing is asked of a clock per token. Promises: an answer is
given up only when nothing of it has come for `stall_s` and its replica has not answered probes for as long (a long
prefill is silent, its replica is not); a client that has not taken what waits for it in `slow_reader_s` is cut off;
a probe that came too late because this gateway was late counts for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from serving.api.upstream import Connection, Pool, UpstreamError
from serving.config import GatewayFaultsConfig
from serving.routing.health import Health
from serving.routing.replicas import Endpoint

OK: Final = 200
HEALTH: Final = "/health"
MOST_BYTES: Final = 64 * 1024
# A probe's timeout that fires later than this says more about this event loop than about the replica.
LATE_S: Final = 0.25

Verdict = Literal["fine", "stalled", "slow"]


def verdict(silent_s: float, dark_s: float, untaken_s: float, *, stall_s: float, slow_reader_s: float) -> Verdict:
    """What is to become of an answer: nothing came for `silent_s`, its replica has been dark and its client has
    taken nothing for so long.
    """
    if untaken_s >= slow_reader_s:
        return "slow"
    # Where the client does not read, the replica is stopped by us: its silence proves nothing.
    if untaken_s <= 0 and min(silent_s, dark_s) >= stall_s:
        return "stalled"
    return "fine"


@dataclass(slots=True, eq=False)
class Attempt:
    """An answer under way: whose, and what was seen of it at the last look."""

    model: str
    endpoint: Endpoint
    connection: Connection
    # Ends the request where it is, also in the middle of sending to its client.
    bound: asyncio.Timeout | None
    came_s: float
    taken_s: float
    received: int = 0
    reads: int = 0
    slow: bool = False

    def look(self, now_s: float) -> None:
        """Take what has changed since the last look."""
        connection = self.connection
        if connection.received != self.received:
            self.received, self.came_s = connection.received, now_s
        if connection.read_waits or connection.reads != self.reads:
            self.reads, self.taken_s = connection.reads, now_s


class Watch:
    """The watch of one gateway. Used from one event loop only."""

    def __init__(
        self,
        pool: Pool,
        health: Health,
        faults: GatewayFaultsConfig,
        *,
        engine_token: str,
        clock: Callable[[], float],
        on_slow: Callable[[str], None],
        on_round: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_slow(model)` is called for each client that is cut off because it does not read; `on_round` after every
        round of probes.
        """
        self._pool = pool
        self._health = health
        self._faults = faults
        self._token = engine_token
        self._clock = clock
        self._on_slow = on_slow
        self._on_round = on_round
        self._attempts: set[Attempt] = set()
        # Replicas whose last probe failed, and since when all of them did.
        self._dark_s: dict[Endpoint, float] = {}

    def begin(self, model: str, endpoint: Endpoint, connection: Connection, bound: asyncio.Timeout | None) -> Attempt:
        """A request was put on a connection."""
        now_s = self._clock()
        attempt = Attempt(model, endpoint, connection, bound, now_s, now_s)
        self._attempts.add(attempt)
        return attempt

    def end(self, attempt: Attempt) -> None:
        """It is over."""
        self._attempts.discard(attempt)

    async def run(self) -> None:
        """Look and probe until cancelled."""
        while True:
            next_s = self._clock() + self._faults.probe_interval_s
            self.look()
            await self._probe_all()
            self._on_round()
            await asyncio.sleep(max(0.0, next_s - self._clock()))

    def look(self) -> None:
        """Look at every answer under way, and end those that must be."""
        now_s, slow_reader_s = self._clock(), self._faults.slow_reader_s
        for attempt in tuple(self._attempts):
            attempt.look(now_s)
            dark_since_s = self._dark_s.get(attempt.endpoint)
            found = verdict(
                now_s - attempt.came_s,
                0.0 if dark_since_s is None else now_s - dark_since_s,
                now_s - attempt.taken_s,
                stall_s=self._health[attempt.model].stall_s,
                slow_reader_s=slow_reader_s,
            )
            if found == "stalled":
                attempt.connection.fail(UpstreamError("stalled", "nothing comes, and the replica answers no probe"))
            elif found == "slow" and not attempt.slow:
                attempt.slow = True
                self._on_slow(attempt.model)
                if attempt.bound is not None:
                    attempt.bound.reschedule(asyncio.get_running_loop().time())

    async def _probe_all(self) -> None:
        """Ask every listed replica, and those that have left with answers of theirs still under way."""
        listed = {endpoint: model for model, health in self._health.items() for endpoint in health.endpoints}
        left = {a.endpoint for a in self._attempts} - listed.keys()
        self._dark_s = {e: since_s for e, since_s in self._dark_s.items() if e in listed or e in left}
        await asyncio.gather(*(self._probe(endpoint, listed.get(endpoint)) for endpoint in self._all(listed, left)))

    @staticmethod
    def _all(listed: Iterable[Endpoint], left: Iterable[Endpoint]) -> Iterable[Endpoint]:
        yield from listed
        yield from left

    async def _probe(self, endpoint: Endpoint, model: str | None) -> None:
        began_s, timeout_s = self._clock(), self._faults.probe_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                status, _ = await self._pool.get(endpoint, HEALTH, self._token, most_bytes=MOST_BYTES)
                healthy = status == OK
        except TimeoutError:
            if self._clock() - began_s > timeout_s + LATE_S:
                return
            healthy = False
        except UpstreamError:
            healthy = False
        if healthy:
            self._dark_s.pop(endpoint, None)
        else:
            self._dark_s.setdefault(endpoint, began_s)
        if model is not None:
            self._health[model].ejections.probed(endpoint.replica_id, healthy)
