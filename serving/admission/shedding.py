"""When a gateway refuses new requests so that those it has go on: before it falls over, not after.

Two things end a gateway: an event loop that falls behind (every stream waits as long for each token), and memory (the
kernel ends the process, and every stream with it). Both are looked at four times a second, and a refusal costs a few
microseconds where an accepted request costs thousands. Memory counts as far as something is held in it: what was freed
and only kept by the allocator is given back before a request is refused for it, and when much less is held than before.
As in CoDel (Nichols and Jacobson, 2012) it is the least lag
of a short while that counts: a single late timer is a burst, lateness that never goes away is a queue. Promises: what
began ends only well below its bound, so that it does not flutter; a gateway with next to nothing under way sheds
nothing, for it would help nobody.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from serving.admission import heap

# Timers that must all have been late: with four a second, about a second.
WINDOW: Final = 3
# Shedding ends below these shares of its bounds.
LAG_CALM: Final = 0.5
MEMORY_CALM: Final = 0.9
# With fewer requests under way than these, they are not what is wrong.
LEAST_IN_FLIGHT: Final = 16
# Bytes of bodies that have gone since the most were held, from which on it is worth giving memory back.
WORTH_TRIMMING_BYTES: Final = 32 * 1024 * 1024
# While too large, memory is given back at every so manyth look: it takes milliseconds, in which no stream goes on.
LOOKS_A_TRIM: Final = 4
STATM: Final = Path("/proc/self/statm")

Reason = Literal["event_loop", "memory"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Beyond which a gateway sheds."""

    lag_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """A gateway as it is: how late its last timers were, oldest first, its memory, its requests under way."""

    lags_s: tuple[float, ...]
    memory_bytes: int
    in_flight: int


def decide(present: Reason | None, load: Load, bounds: Bounds) -> Reason | None:
    """Why new requests are refused from now on; None: they are taken."""
    if load.in_flight < LEAST_IN_FLIGHT:
        return None
    memory_bound = bounds.memory_bytes * (MEMORY_CALM if present == "memory" else 1.0)
    if load.memory_bytes > memory_bound:
        return "memory"
    if present == "event_loop":
        return "event_loop" if max(load.lags_s, default=0.0) > bounds.lag_s * LAG_CALM else None
    late = len(load.lags_s) == WINDOW and min(load.lags_s) > bounds.lag_s
    return "event_loop" if late else None


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Shedder:
    """Keeps the last lags and the present decision."""

    __slots__ = ("_bounds", "_held", "_in_flight", "_lags_s", "_looks", "_memory", "_most_held", "_trim", "reason")

    def __init__(
        self,
        bounds: Bounds,
        in_flight: Callable[[], int],
        held: Callable[[], int] = lambda: 0,
        memory: Callable[[], int] = resident_bytes,
        trim: Callable[[], None] = heap.trim,
    ) -> None:
        """`held`: bytes of bodies under way; `memory`: bytes of the process; `trim` gives back what is free of them."""
        self._bounds = bounds
        self._in_flight = in_flight
        self._held = held
        self._memory = memory
        self._trim = trim
        self._most_held = 0
        self._looks = LOOKS_A_TRIM
        self._lags_s: deque[float] = deque(maxlen=WINDOW)
        # Why new requests are refused now.
        self.reason: Reason | None = None

    def observe(self, lag_s: float) -> None:
        """Take how late a timer was, and decide."""
        self._lags_s.append(lag_s)
        load = Load(tuple(self._lags_s), self._memory_bytes(), self._in_flight())
        self.reason = decide(self.reason, load, self._bounds)

    def _memory_bytes(self) -> int:
        held = self._held()
        self._most_held = max(self._most_held, held)
        memory = self._memory()
        self._looks += 1
        large = memory > self._bounds.memory_bytes * MEMORY_CALM and self._looks >= LOOKS_A_TRIM
        if not large and self._most_held - held < WORTH_TRIMMING_BYTES:
            return memory
        self._trim()
        self._looks, self._most_held = 0, held
        return self._memory()
