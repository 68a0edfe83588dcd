"""So many users, each with one request after another and a pause to think between them.

A request counts from the moment at which its user asked for it; the times of the plan are not used. Such a load adapts
to its target: a slow target is asked less. Say so wherever its figures are shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from loadtest.errors import LoadtestError
from loadtest.open_loop import INTERRUPTED
from loadtest.plan import PlannedRequest
from loadtest.sender import Sender


@dataclass(frozen=True, slots=True)
class Users:
    """Who asks: so many, pausing so many seconds between an answer and the next question, for so many seconds."""

    count: int
    think_s: float
    duration_s: float


class ClosedLoop:
    """One process's users."""

    def __init__(self, sender: Sender, users: Users) -> None:
        """Raises LoadtestError for fewer than one user or a negative pause."""
        if users.count < 1 or users.think_s < 0:
            raise LoadtestError(f"{users.count} users that think {users.think_s:g} s: at least one, at least 0 s")
        self._sender = sender
        self._users = users
        self._stop: asyncio.Future[None] | None = None
        self._stopped = False
        self._taken = 0

    async def run(self, planned: Iterable[tuple[int, PlannedRequest]]) -> int:
        """Ask in the plan's order until the duration is over or the plan ends; the count of requests asked.

        Users begin spread over one think time, so that they do not ask in step. Raises LoadtestError for what
        cannot be sent at all.
        """
        sender, users = self._sender, self._users
        self._stop = asyncio.get_running_loop().create_future()
        source = iter(planned)
        tasks = [asyncio.create_task(self._user(number, source)) for number in range(users.count)]
        everyone = asyncio.gather(*tasks)
        try:
            await asyncio.wait((everyone, self._stop), return_when=asyncio.FIRST_COMPLETED)
            if self._stopped:
                await sender.cut(INTERRUPTED)
            await everyone
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await sender.cut(INTERRUPTED)
            sender.close()
        return self._taken

    def stop(self) -> None:
        """Ask nothing more and cut what is in flight."""
        self._stopped = True
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(None)

    async def _user(self, number: int, source: Iterator[tuple[int, PlannedRequest]]) -> None:
        sender, users = self._sender, self._users
        await self._pause(max(0.0, -sender.now_s()) + users.think_s * number / users.count)
        while not self._stopped and sender.now_s() < users.duration_s:
            index, request = next(source, (None, None))
            if index is None or request is None:
                return
            self._taken += 1
            raw = sender.prepared(request)
            asked = replace(request, at_s=sender.now_s())
            task = sender.send(index, asked, raw)
            # At the end of all, what is not finished in time is cut like everything else.
            left_s = users.duration_s + sender.settings.drain_s - sender.now_s()
            done, _ = await asyncio.wait((task,), timeout=left_s)
            if not done:
                await sender.drain(0.0)
            await self._pause(users.think_s)

    async def _pause(self, seconds: float) -> None:
        if self._stop is not None and not self._stop.done():
            await asyncio.wait((self._stop,), timeout=seconds)
