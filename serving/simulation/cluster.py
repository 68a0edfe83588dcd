"""A simulated deployment: replicas that start with a delay, drain when they go, and are billed from ask to end."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.simulation import kernel
from serving.simulation.engine import Engine, Floats, Targets
from serving.simulation.traces import Trace

# Requests that the gateway holds for want of a replica; beyond it new ones get 503 (`gateway.max_ongoing_requests`).
MOST_HELD: Final = 4096
_SEED: Final = 0x9E3779B9


class State(NamedTuple):
    """All arrays of a cluster, as the kernel takes them."""

    at_s: Floats
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    own_s: NDArray[np.float32]
    first_s: Floats
    last_s: Floats
    following: NDArray[np.int32]
    numbers: Floats
    counts: NDArray[np.int64]
    due: Floats
    order: NDArray[np.int64]
    ends: Floats
    who: NDArray[np.int32]
    fresh: NDArray[np.int32]
    ready: NDArray[np.int64]
    counters: Floats
    world: NDArray[np.int64]
    speed: Floats


class Cluster:
    """Plays a trace against replicas whose number is changed between moments."""

    def __init__(
        self, trace: Trace, engine: Engine, targets: Targets, *, start_delay_s: float, most: int, initial: int
    ) -> None:
        # Drained replicas keep their place until their last stream ended.
        slots = 2 * most + 8
        n = len(trace.at_s)
        batch = engine.max_sequences
        counts = np.zeros((slots, kernel.COUNTS), dtype=np.int64)
        for column in (kernel.HEAD, kernel.TAIL, kernel.PARTIAL):
            counts[:, column] = kernel.NOBODY
        counts[:, kernel.PLACE] = np.arange(slots)
        world = np.zeros(kernel.WORLD, dtype=np.int64)
        world[kernel.HELD_HEAD] = world[kernel.HELD_TAIL] = kernel.NOBODY
        world[kernel.RANDOM] = _SEED
        self.state = State(
            at_s=trace.at_s,
            prompt=trace.prompt_tokens,
            output=trace.output_tokens,
            own_s=engine.own_s(trace.prompt_tokens).astype(np.float32),
            first_s=np.full(n, np.nan),
            last_s=np.full(n, np.nan),
            following=np.full(n, kernel.NOBODY, dtype=np.int32),
            numbers=np.zeros((slots, kernel.NUMBERS)),
            counts=counts,
            due=np.full(slots, np.inf),
            order=np.arange(slots),
            ends=np.zeros((slots, batch + 1)),
            who=np.zeros((slots, batch + 1), dtype=np.int32),
            fresh=np.zeros((slots, batch + 1), dtype=np.int32),
            ready=np.zeros(slots, dtype=np.int64),
            counters=np.zeros(kernel.COUNTERS),
            world=world,
            speed=engine.speeds(targets),
        )
        self.engine, self.targets = engine, targets
        self.start_delay_s = start_delay_s
        self.now_s = 0.0
        self.target = initial
        self._asked_at_s: float | None = None
        kernel.ask(initial, 0.0, 0.0, self.state)
        # The first replicas are warm.
        self.advance(1e-9)

    def advance(self, until_s: float) -> None:
        """Plays what happens before a moment."""
        kernel.advance(until_s, MOST_HELD, self.state)
        self.now_s = until_s

    def scale(self, target: int) -> None:
        """Asks for so many replicas, as of now."""
        if target > self.target:
            if self._asked_at_s is None:
                self._asked_at_s = self.now_s
            kernel.ask(target - self.target, self.now_s, self.start_delay_s, self.state)
        elif target < self.target:
            kernel.release(self.target - target, self.now_s, self.state)
        self.target = target

    def follow(self, levels: NDArray[np.int64], step_s: float, end_s: float, most_missed: float) -> Any:
        """Plays a schedule from the start to `end_s`; None once more than `most_missed` requests missed.

        Returns after each step the target and what was ready.
        """
        series = np.zeros((len(levels), 2), dtype=np.int32)
        series[0, 0] = self.target
        ended = kernel.follow(levels, step_s, end_s, self.start_delay_s, MOST_HELD, most_missed, series, self.state)
        self.now_s, self.target = end_s, int(levels[-1])
        return series if ended else None

    @property
    def ready(self) -> int:
        """Replicas that take requests."""
        return int(self.state.world[kernel.READY_N])

    @property
    def has_started(self) -> bool:
        """Whether a start was seen through, so that its length is known."""
        return self._asked_at_s is not None and self.now_s >= self._asked_at_s + self.start_delay_s

    def starting_s(self) -> tuple[float, ...]:
        """How long each replica that starts has been at it."""
        counts, numbers = self.state.counts, self.state.numbers
        asked = numbers[counts[:, kernel.STATUS] == kernel.STARTING, kernel.ASKED]
        return tuple((self.now_s - asked).tolist())

    def counters(self) -> Floats:
        """A copy of what was counted so far."""
        return self.state.counters.copy()

    def gauges(self) -> tuple[float, float, float, float, float]:
        """Running, waiting (on engines), held (in the gateway), the share of KV in use, in flight on all engines."""
        counts, numbers, state = self.state.counts, self.state.numbers, self.state
        alive = counts[:, kernel.STATUS] >= kernel.READY
        running = float(counts[alive, kernel.BATCH].sum() + (counts[alive, kernel.PARTIAL] != kernel.NOBODY).sum())
        running += float(counts[alive & (counts[:, kernel.PHASE] == kernel.PASSING), kernel.NEW].sum())
        waiting = float(counts[alive, kernel.QUEUED].sum())
        number = int(alive.sum())
        used = float(numbers[alive, kernel.CONTEXT].sum()) / (number * self.engine.kv_tokens) if number else 0.0
        in_flight = float(counts[counts[:, kernel.STATUS] == kernel.READY, kernel.IN_FLIGHT].sum())
        return running, waiting, float(state.counters[kernel.HELD_NOW]), used, in_flight

    @property
    def rejected(self) -> float:
        """Requests that found nothing ready and too many held before them."""
        return float(self.state.counters[kernel.REJECTED])

    def billed_s(self) -> float:
        """Replica-seconds until now, those that still run included."""
        counts, numbers = self.state.counts, self.state.numbers
        alive = counts[:, kernel.STATUS] != kernel.FREE
        return float(self.state.counters[kernel.BILLED] + (self.now_s - numbers[alive, kernel.ASKED]).sum())

    def served_well(self) -> NDArray[np.bool_]:
        """For each request whether it kept its targets; one without an answer did not."""
        state, targets = self.state, self.targets
        with np.errstate(invalid="ignore"):
            limit_s = targets.ttft_s + (state.own_s if targets.own_prefill else 0.0)
            gaps = np.maximum(state.output - 1, 1)
            itl_s = (state.last_s - state.first_s) / gaps
            well = (state.first_s - state.at_s <= limit_s) & (itl_s <= targets.itl_s)
        return np.asarray(well)
