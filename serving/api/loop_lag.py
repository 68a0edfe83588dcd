"""How late the gateway's event loop is: the one figure that says a gateway itself, and no engine, slows its streams.

A timer is asked for again and again; what it comes late by, every chunk of every stream waits too. Four timers a second
cost nothing, and a stall longer than the period is seen whole by the timer it delays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

PERIOD_S: Final = 0.25


async def watch(
    observe: Callable[[float], None],
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    """Report the lag of each timer, seconds, until cancelled."""
    while True:
        asked_s = clock()
        await sleep(PERIOD_S)
        observe(max(0.0, clock() - asked_s - PERIOD_S))
