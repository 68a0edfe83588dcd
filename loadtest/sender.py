"""Sends planned requests, each as a task of its own, and makes exactly one record of each, whatever happens to it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loadtest.client import Failure, FailureKind, RequestResult, StreamClient
from loadtest.errors import LoadtestError
from loadtest.plan import PlannedRequest
from loadtest.pool import ConnectionPool
from loadtest.records import Outcome, Record
from loadtest.request import Target, chat_message

_NS = 1e9
_BAD_REQUEST = 400
_INTERNAL_ERROR = 500
_UNAVAILABLE = 503

# Live figures keep times in steps of a hundredth of their size: exact enough to watch, and they add up.
TTFT_STEPS = 100


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The bounds of one process's part of a run; all in seconds."""

    # A request not at its end so long after its scheduled time has failed.
    timeout_s: float = 600.0
    # So long after the last request's time whatever is left is cut.
    drain_s: float = 60.0
    # Connections of each tenant.
    max_connections: int = 5000
    # Requests scheduled before it are marked as warm-up.
    warm_up_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Live counts of a run, from its start until now; they can be added up over processes."""

    sent: int = 0
    in_flight: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    # Output tokens of finished requests, and content events so far of those in flight.
    tokens: int = 0
    # Times to first token, in logarithmic steps: see TTFT_STEPS.
    ttft_steps: Counter[int] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add another process's counts."""
        self.sent += other.sent
        self.in_flight += other.in_flight
        self.outcomes += other.outcomes
        self.tokens += other.tokens
        self.ttft_steps += other.ttft_steps

    def ttft_p50_s(self) -> float | None:
        """Median time to first token so far, to a percent; None before the first one."""
        left = math.ceil(self.ttft_steps.total() / 2)
        for step in sorted(self.ttft_steps):
            left -= self.ttft_steps[step]
            if left <= 0:
                return math.exp(step / TTFT_STEPS)
        return None


@dataclass(slots=True, eq=False)
class _Flight:
    """A request that has a task and no record yet."""

    task: asyncio.Task[None] | None = None
    client: StreamClient | None = None
    # Why it is to end now, set before its task is cancelled.
    cut: Failure | None = None


class Sender:
    """One process's requests to its targets, those in flight and the records of those that ended."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        settings: LoopSettings,
        on_record: Callable[[Record], None],
        *,
        start_ns: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`targets` by tenant; the tenant TENANT/CLIENT uses TENANT's. `start_ns` is the run's zero on the clock."""
        self.settings = settings
        self.start_ns = start_ns
        self.clock_ns = clock_ns
        self._targets = targets
        self._on_record = on_record
        self._pools: dict[str, ConnectionPool] = {}
        self._flights: set[_Flight] = set()
        self._tally = Tally()

    @property
    def waited(self) -> int:
        """Requests so far that found all connections taken."""
        return sum(pool.waited for pool in self._pools.values())

    def now_s(self) -> float:
        """Seconds after the run's start."""
        return (self.clock_ns() - self.start_ns) / _NS

    def tally(self) -> Tally:
        """The counts until now; a copy."""
        done = self._tally
        flying = sum(flight.client.content_events for flight in self._flights if flight.client is not None)
        return Tally(
            done.sent, len(self._flights), Counter(done.outcomes), done.tokens + flying, Counter(done.ttft_steps)
        )

    def prepared(self, request: PlannedRequest) -> bytes:
        """The whole message. Raises LoadtestError for a tenant without a target, or what cannot be a header."""
        return chat_message(
            self._target(request.tenant)[1],
            model=request.model,
            prompt=request.prompt,
            output_tokens=request.output_tokens,
            session=request.session,
        )

    def send(self, index: int, request: PlannedRequest, raw: bytes) -> asyncio.Task[None]:
        """Begin the request now, as a task that ends with its record and never raises."""
        flight = _Flight()
        self._flights.add(flight)
        self._tally.sent += 1
        flight.task = asyncio.create_task(self._follow(flight, index, request, raw))
        return flight.task

    def unsent(self, index: int, request: PlannedRequest) -> None:
        """Record a request whose time never came."""
        self._end(self._record(index, request, None, None, Outcome.UNSENT))

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is in flight, at most so long; what is left then has failed with a timeout."""
        left = [flight.task for flight in self._flights if flight.task is not None]
        if left:
            await asyncio.wait(left, timeout=timeout_s)
        drain_s = self.settings.drain_s
        await self.cut(Failure(FailureKind.TIMEOUT, f"not finished {drain_s:g} s after the last request's time"))

    async def cut(self, why: Failure) -> None:
        """End everything in flight with this failure; what came of it is kept."""
        # A task that has not begun would be cancelled without a record.
        await asyncio.sleep(0)
        flights = list(self._flights)
        for flight in flights:
            self._cut_one(flight, why)
        await asyncio.gather(*(flight.task for flight in flights if flight.task is not None), return_exceptions=True)

    def close(self) -> None:
        """Close all connections that no request uses, without waiting for it."""
        for pool in self._pools.values():
            pool.close()

    def _cut_one(self, flight: _Flight, why: Failure) -> None:
        flight.cut = why
        sent = flight.client is not None and flight.client.cut(why.kind, why.detail)
        # Before anything was sent there is no exchange to fail: its task waits for a connection.
        if not sent and flight.task is not None:
            flight.task.cancel()

    def _target(self, tenant: str) -> tuple[str, Target]:
        for name in (tenant, tenant.partition("/")[0]):
            if name in self._targets:
                return name, self._targets[name]
        raise LoadtestError(f"tenant {tenant!r} has no target; known: {', '.join(sorted(self._targets))}")

    def _pool(self, tenant: str) -> ConnectionPool:
        name, target = self._target(tenant)
        if name not in self._pools:
            self._pools[name] = ConnectionPool(
                target.host, target.port, max_connections=self.settings.max_connections, clock_ns=self.clock_ns
            )
        return self._pools[name]

    async def _follow(self, flight: _Flight, index: int, request: PlannedRequest, raw: bytes) -> None:
        settings, sent_ns = self.settings, None
        late = Failure(FailureKind.TIMEOUT, f"not finished {settings.timeout_s:g} s after its time")
        # One bound on all that a request waits for: a free connection, connecting, the answer.
        expiry = asyncio.get_running_loop().call_later(
            request.at_s + settings.timeout_s - self.now_s(), self._cut_one, flight, late
        )
        try:
            pool = self._pool(request.tenant)
            client = await pool.take()
            try:
                flight.client = client
                sent_ns = self.clock_ns()
                result = await client.request(raw, timeout_s=settings.timeout_s)
            finally:
                pool.give_back(client)
            self._end(self._record(index, request, sent_ns, result, _outcome(result)))
        except asyncio.CancelledError:
            why = flight.cut or Failure(FailureKind.INTERRUPTED, "the run was ended")
            self._end(self._failed(index, request, sent_ns, why))
        finally:
            expiry.cancel()
            self._flights.discard(flight)

    def _end(self, record: Record) -> None:
        tally = self._tally
        tally.outcomes[record.outcome.value] += 1
        tally.tokens += len(record.chunks_s) if record.completion_tokens is None else record.completion_tokens
        if record.ttft_s is not None and record.ttft_s > 0:
            tally.ttft_steps[round(math.log(record.ttft_s) * TTFT_STEPS)] += 1
        self._on_record(record)

    def _failed(self, index: int, request: PlannedRequest, sent_ns: int | None, failure: Failure) -> Record:
        now_ns = self.clock_ns()
        result = RequestResult(now_ns, None, (), now_ns, None, None, None, failure)
        return self._record(index, request, sent_ns, result, Outcome.FAILED)

    def _record(
        self,
        index: int,
        request: PlannedRequest,
        sent_ns: int | None,
        result: RequestResult | None,
        outcome: Outcome,
    ) -> Record:
        failure = result.failure if result is not None else None
        return Record(
            index=index,
            tenant=request.tenant,
            model=request.model,
            scheduled_s=request.at_s,
            sent_s=None if sent_ns is None else (sent_ns - self.start_ns) / _NS,
            chunks_s=tuple((stamp - self.start_ns) / _NS for stamp in result.content_ns) if result is not None else (),
            end_s=(result.end_ns - self.start_ns) / _NS if result is not None else None,
            status=result.status if result is not None else None,
            outcome=outcome,
            prompt_tokens=result.prompt_tokens if result is not None else None,
            completion_tokens=result.completion_tokens if result is not None else None,
            # A refusal is an answer, not a failure; its status and detail say which.
            failure=failure.kind if failure is not None and outcome is Outcome.FAILED else None,
            detail=failure.detail if failure is not None else None,
            warm_up=request.at_s < self.settings.warm_up_s,
        )


def _outcome(result: RequestResult) -> Outcome:
    if result.failure is None:
        return Outcome.COMPLETED
    if result.failure.kind is FailureKind.HTTP_STATUS and result.status is not None:
        if _BAD_REQUEST <= result.status < _INTERNAL_ERROR:
            return Outcome.REJECTED
        if result.status == _UNAVAILABLE and result.retry_after is not None:
            return Outcome.REJECTED
    return Outcome.FAILED
