"""Runs the scheduler in real time on the event loop, with one timer for the whole engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serving.engine.fake.metrics import EngineMetrics
from serving.engine.fake.scheduler import Scheduler, Sequence, State

# uvloop's timers count whole milliseconds and round: one that fires so much early is on time. Passes stay
# tied to their planned times, so the error does not add up.
TIMER_RESOLUTION_S = 0.001


class ClientGoneError(Exception):
    """The client has gone; its sequences are aborted."""


class Ticket:
    """The sequences of one request, and how its handler learns of their progress."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.aborted = False
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        for sequence in sequences:
            sequence.notify = self.wake

    def wake(self) -> None:
        """Tells the handler that there is something new."""
        self._news = True
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def progress(self) -> None:
        """Returns once something happened since the last call; raises ClientGoneError after an abort."""
        if not self._news and not self.aborted:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._news = False
        if self.aborted:
            raise ClientGoneError

    async def finished(self) -> None:
        """Returns once every sequence has finished; raises ClientGoneError after an abort."""
        while not all(sequence.state is State.FINISHED for sequence in self.sequences):
            await self.progress()


class Driver:
    """The engine's clockwork: takes tickets, steps the scheduler when it is due, wakes handlers."""

    def __init__(self, scheduler: Scheduler, metrics: EngineMetrics, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._tickets: set[Ticket] = set()

    def submit(self, sequences: list[Sequence]) -> Ticket:
        """Queues the sequences of one request."""
        ticket = Ticket(sequences)
        self._tickets.add(ticket)
        now = self._clock()
        for sequence in sequences:
            self._scheduler.submit(sequence, now)
        if self._timer is None:
            self._arm(now)
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Ends a request: aborts what has not finished, freeing its slots and blocks at once."""
        self._tickets.discard(ticket)
        for sequence in ticket.sequences:
            if self._scheduler.abort(sequence):
                ticket.aborted = True
                self._metrics.record_end(sequence, "abort", self._clock())
        if ticket.aborted:
            ticket.wake()

    def stop(self) -> None:
        """Aborts everything and lets go of the timer."""
        for ticket in list(self._tickets):
            self.close(ticket)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, now: float) -> None:
        due = self._scheduler.due
        if due is None:
            self._timer = None
        else:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._tick)

    def _tick(self) -> None:
        now = self._clock()
        due = self._scheduler.due
        if due is not None and now < due <= now + TIMER_RESOLUTION_S:
            now = due
        step = self._scheduler.step(now)
        self._metrics.record_step(step)
        for sequence in step.finished:
            self._metrics.record_end(sequence, None, now)
            if not sequence.output_tokens and sequence.notify is not None:
                sequence.notify()
        for sequence, _gap in step.yielded:
            if sequence.notify is not None:
                sequence.notify()
        self._arm(self._clock())
