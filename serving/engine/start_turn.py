"""Lets only as many engines of a machine start at once as its processors can carry.

Starting an engine on CPU is a minute of one core: three processes import vLLM one after the other. Two at once on
two cores finish together, late; in turn, the first answers in half the time and the second hardly later. The
operating system keeps the turns (file locks), so a start that dies gives its turn back.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

CORES_PER_START = 2
POLL_S = 0.2
# So that models start in the configuration's order: the first asks first.
STAGGER_S = 1.5


def turns(cores: int) -> int:
    """Engines that may start at the same time on a machine of so many cores."""
    return max(1, cores // CORES_PER_START)


@contextlib.asynccontextmanager
async def start_turn(directory: Path, position: int, cores: int) -> AsyncIterator[None]:
    """Hold one of the machine's turns; `position` is the model's place in the configuration."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # noqa: ASYNC240 - one directory, before anything runs
    if position >= turns(cores):
        await asyncio.sleep(STAGGER_S * position)
    descriptor = await _lock(directory, turns(cores))
    try:
        yield
    finally:
        os.close(descriptor)


async def _lock(directory: Path, count: int) -> int:
    while True:
        for index in range(count):
            descriptor = os.open(directory / f"start-{index}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                return descriptor
        await asyncio.sleep(POLL_S)
