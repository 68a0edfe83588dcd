"""Sends each planned request at its time, whatever became of the earlier ones.

A closed loop slows down with its target and so hides how bad it is; this one does not (no coordinated omission). A
request that the client itself sends late still counts from its scheduled time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from loadtest.client import Failure, FailureKind
from loadtest.errors import LoadtestError
from loadtest.plan import PlannedRequest
from loadtest.sender import Sender

INTERRUPTED = Failure(FailureKind.INTERRUPTED, "the run was ended by hand")

_NS = 1e9


class OpenLoop:
    """One process's part of an open-loop run."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._stopped = False
        self._wake: asyncio.Future[None] | None = None

    async def run(self, planned: Iterable[tuple[int, PlannedRequest]]) -> int:
        """Send all, follow all to their end, and give their count; each has its record then.

        `planned` holds (index, request), ascending in time, and is read one request ahead, between two sends: it
        should be quick. Raises LoadtestError for times that go backwards and for what cannot be sent at all.
        """
        count, last_s = 0, 0.0
        sender = self._sender
        try:
            for index, request in planned:
                count += 1
                if self._stopped:
                    sender.unsent(index, request)
                    continue
                if request.at_s < last_s:
                    raise LoadtestError(f"request {index} is planned for {request.at_s} s, after one for {last_s} s")
                last_s = request.at_s
                # Ahead of its time, so that making the message does not make it late.
                raw = sender.prepared(request)
                await self._until(request.at_s)
                if self._stopped:
                    sender.unsent(index, request)
                else:
                    sender.send(index, request, raw)
            if not self._stopped:
                await self._until_drained(last_s)
        finally:
            await sender.cut(INTERRUPTED)
            sender.close()
        return count

    def stop(self) -> None:
        """Send nothing more and cut what is in flight; `run` then returns with every request recorded."""
        self._stopped = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _until(self, at_s: float) -> None:
        """Wait until this time of the run, never less; the event loop has its turn in any case."""
        loop = asyncio.get_running_loop()
        start_ns, clock_ns = self._sender.start_ns, self._sender.clock_ns
        at_ns = start_ns + round(at_s * _NS)
        await asyncio.sleep(0)
        # Again, because timers are rounded to a millisecond, which may be too early.
        while (left_ns := at_ns - clock_ns()) > 0 and not self._stopped:
            self._wake = loop.create_future()
            timer = loop.call_later(left_ns / _NS, _wake, self._wake)
            try:
                await self._wake
            finally:
                timer.cancel()

    async def _until_drained(self, last_s: float) -> None:
        sender = self._sender
        draining = asyncio.create_task(sender.drain(last_s + sender.settings.drain_s - sender.now_s()))
        self._wake = asyncio.get_running_loop().create_future()
        await asyncio.wait((draining, self._wake), return_when=asyncio.FIRST_COMPLETED)
        if self._stopped:
            await sender.cut(INTERRUPTED)
        await draining


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
