"""The faults that the fake engine plays: which request meets which, and breaking an answer off."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from enum import Enum

from serving.config import FakeFaults
from serving.engine.fake.exchange import Event, Send

# The loop writes what was sent before the process goes.
FLUSH_S = 0.05


class Fault(Enum):
    """What happens to a request instead of its answer."""

    NONE = "none"
    ERROR = "error"
    HANG = "hang"


class BrokenOffError(Exception):
    """The answer breaks off here: the ASGI server closes the connection on the unfinished answer."""


class Faults:
    """Draws a fault per request from its own seeded randomness, and counts bytes of bodies."""

    def __init__(self, config: FakeFaults, seed: int, exit_process: Callable[[int], object]) -> None:
        self._config = config
        self._random = random.Random(seed)
        self._exit_process = exit_process
        self._bytes_until_death = config.die_after_bytes

    def draw(self) -> Fault:
        """The fault of the next request. Two numbers are drawn each time: rates do not shift each other."""
        error, hang = self._random.random(), self._random.random()
        if error < self._config.error_rate:
            return Fault.ERROR
        return Fault.HANG if hang < self._config.hang_rate else Fault.NONE

    def breaking(self, send: Send) -> Send:
        """A `send` for one answer that breaks off where configured; the very same one where it is not."""
        if self._config.cut_after_bytes is None and self._config.die_after_bytes is None:
            return send
        left = self._config.cut_after_bytes

        async def send_until_broken(event: Event) -> None:
            nonlocal left
            body: bytes = event.get("body", b"")
            if self._bytes_until_death is not None:
                self._bytes_until_death -= len(body)
                if self._bytes_until_death <= 0:
                    await send({**event, "body": body[: len(body) + self._bytes_until_death], "more_body": True})
                    await asyncio.sleep(FLUSH_S)
                    self._exit_process(1)
                    raise BrokenOffError
            if left is not None:
                if len(body) >= left:
                    await send({**event, "body": body[:left], "more_body": True})
                    raise BrokenOffError
                left -= len(body)
            await send(event)

        return send_until_broken
