"""Hedged requests: one whose first byte is late goes to a second replica too, and whichever answers first is relayed.

A replica that is slow on one request (a throttled GPU, a long prefill before it, a stall that probes do not see) costs
its client the whole wait, although another could answer at once (Dean and Barroso, "The Tail at Scale", 2013). A hedge
costs computing twice, so it is bounded: within the retry budget of the model, which second tries share; only on a
replica with less under way than the first has; once a request, and never after a retry.

Promises: the client gets one answer, of one replica; the other's connection is closed at once, which ends its work,
and its lease with it; whoever is merely slow is not held against it; however it ends (the client leaves, both fail),
nothing stays behind. What the other computed is noted in the exchange for the ledger (`lost`).

The tenant pays for one: the fair queue charges one prompt, the hold counts one turn, quotas and the bill know of one
attempt. That a replica is slow is no doing of the tenant's, and to be put behind others for it would make its next
requests late too; what it adds to the engines is bounded by the retry budget.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from serving.api.body import ClientLeft
from serving.api.exchange import Exchange, Sent
from serving.api.retry import is_failure, lost
from serving.api.upstream import Connection, Pool, UpstreamError
from serving.api.watch import Attempt, Watch
from serving.config import ModelConfig
from serving.errors import Unavailable
from serving.metrics.table import HEDGE_WINNERS
from serving.routing.health import Health
from serving.routing.replicas import Lease, ReplicaSet

FIRST, SECOND, NEITHER = HEDGE_WINNERS
GENERATES: Final = "generate"

# Puts an exchange's request on a replica, none of these; None or Unavailable where there is none.
Connect = Callable[[Exchange, frozenset[str]], Awaitable[tuple[Lease, Connection] | None]]


def hedge_after_s(model: ModelConfig, *, stream: bool) -> float | None:
    """How long a request of this model waits for its first byte until it is hedged; None: it never is.

    The first byte of a generated text that is not streamed is its last one: late says nothing about the replica.
    """
    return model.faults.hedge_after_s if stream or model.task != GENERATES else None


@dataclass(slots=True, eq=False)
class Runner:
    """One replica that has the request; `request_id` is what it is called there."""

    lease: Lease
    connection: Connection
    request_id: str
    attempt: Attempt
    # It has failed, and that is accounted for.
    out: bool = False

    @property
    def sent(self) -> Sent:
        """What it takes to ask the replica about it."""
        return Sent(self.lease.endpoint, self.request_id)


class Hedging:
    """All models' hedges. Used from one event loop only."""

    def __init__(
        self,
        replicas: ReplicaSet,
        pool: Pool,
        health: Health,
        watch: Watch,
        connect: Connect,
        *,
        response_timeout_s: float,
        on_failure: Callable[[str, str], None],
        on_hedge: Callable[[str, str], None],
    ) -> None:
        """`on_failure(model, kind)`: a replica failed; `on_hedge(model, won)`: a request that two replicas had."""
        self._replicas = replicas
        self._pool = pool
        self._health = health
        self._watch = watch
        self._connect = connect
        self._response_timeout_s = response_timeout_s
        self._on_failure = on_failure
        self._on_hedge = on_hedge

    async def leader(
        self, exchange: Exchange, lease: Lease, connection: Connection, after_s: float
    ) -> tuple[Lease, Connection]:
        """Wait for the first byte of a request that was just sent, on a second replica too once `after_s` are over.

        Returns the replica whose first byte is there to be read; where none answers, one whose failure is: it is the
        request's.
        """
        runners = [self._runner(exchange, lease, connection)]
        leader: Runner | None = None
        exchange.engine = lease.endpoint
        exchange.waits = True
        try:
            if not exchange.client_left:
                leader = await self._begun(runners[0], after_s) or await self._race(exchange, runners, after_s)
            else:
                leader = runners[0]
            return leader.lease, leader.connection
        finally:
            exchange.waits = False
            for runner in runners:
                self._watch.end(runner.attempt)
                if runner is not leader:
                    with runner.lease:
                        self._pool.release(runner.lease.endpoint, runner.connection)

    async def _begun(self, runner: Runner, within_s: float) -> Runner | None:
        """The runner, when its answer has begun or failed; None where neither came in time."""
        with contextlib.suppress(UpstreamError):
            try:
                async with asyncio.timeout(within_s):
                    await runner.connection.begun()
            except TimeoutError:
                # Its first byte may have come in the very turn of the loop in which the time was up.
                return runner if runner.connection.has_begun else None
        return runner

    async def _race(self, exchange: Exchange, runners: list[Runner], after_s: float) -> Runner:
        """Put the request on a second replica, once one may have it, and wait for the first of both."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._response_timeout_s - after_s
        # The first is listened to while a connection to the second is made.
        ways = (loop.create_task(_seen(runners[0])), loop.create_task(self._second(exchange, runners, after_s)))
        standing: set[asyncio.Task[_Seen]] = set(ways)
        winner: Runner | None = None
        try:
            while standing:
                done, standing = await asyncio.wait(
                    standing, timeout=max(0.0, deadline_s - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                # Of two that come in one turn of the loop the first goes before.
                seen = [way.result() for way in ways if way in done]
                for runner, error in seen:
                    if error is not None and not self._goes_on(exchange, runner, error, runners):
                        return runner
                winner = next((runner for runner, error in seen if error is None), None)
                if winner is not None:
                    return self._lead(exchange, winner, runners)
            leader = next(runner for runner in runners if not runner.out)
            leader.connection.fail(UpstreamError("timeout", "no engine answered in time"))
            return leader
        finally:
            for way in ways:
                way.cancel()
            if len(runners) > 1:
                self._on_hedge(exchange.model, NEITHER if winner is None else (FIRST, SECOND)[runners.index(winner)])

    async def _second(self, exchange: Exchange, runners: list[Runner], after_s: float) -> _Seen:
        """Another replica, once its answer has begun; while none may have the request, asks again every `after_s`."""
        while True:
            # Never waits: whoever has lost its replica goes before.
            turn = await self._health[exchange.model].budget.turn(0.0)
            if turn is not None:
                try:
                    if await self._joined(exchange, runners):
                        return await _seen(runners[1])
                finally:
                    turn.end()
            await asyncio.sleep(after_s)

    async def _joined(self, exchange: Exchange, runners: list[Runner]) -> bool:
        """Put the request on another replica with less to do; False where there is none."""
        first = runners[0].lease
        # As many as the first has, or more: there it would wait as well.
        loads = self._replicas.in_flight(exchange.model)
        full = frozenset(name for name, requests in loads.items() if requests >= first.choice.seat.requests)
        try:
            sent = await self._connect(exchange, full | {first.endpoint.replica_id})
        except (Unavailable, ClientLeft):
            return False
        if sent is None:
            return False
        runners.append(self._runner(exchange, *sent))
        self._lead(exchange, runners[0], runners)
        return True

    def _runner(self, exchange: Exchange, lease: Lease, connection: Connection) -> Runner:
        attempt = self._watch.begin(exchange.model, lease.endpoint, connection, exchange.bound)
        return Runner(lease, connection, exchange.engine_request_id, attempt)

    def _lead(self, exchange: Exchange, leader: Runner, runners: list[Runner]) -> Runner:
        """From now on the exchange is this replica's, and what the other computed is lost."""
        exchange.engine, exchange.engine_request_id = leader.sent
        exchange.lost = next((runner.sent for runner in runners if runner is not leader), None)
        return leader

    def _goes_on(self, exchange: Exchange, runner: Runner, error: UpstreamError, runners: list[Runner]) -> bool:
        """Take note of a replica that failed; False where no other has the request: it is not accounted for then."""
        other = next((other for other in runners if other is not runner and not other.out), None)
        if other is None:
            return False
        runner.out = True
        exchange.replica = runner.lease.endpoint.replica_id
        exchange.spent |= {exchange.replica}
        self._on_failure(exchange.model, error.kind)
        lost(self._health[exchange.model].ejections, exchange, error.kind)
        self._lead(exchange, other, runners)
        return True


_Seen = tuple[Runner, UpstreamError | None]


async def _seen(runner: Runner) -> _Seen:
    """A replica when its answer has begun, or with why there is none."""
    try:
        chunk = await runner.connection.begun()
    except UpstreamError as error:
        return runner, error
    failed = is_failure(runner.connection.status, chunk)
    return runner, UpstreamError("server_error", "the engine failed on this request") if failed else None
