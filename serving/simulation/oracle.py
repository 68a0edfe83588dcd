"""The cheapest schedule that knows the future, as near as a search comes to it; and the best constant number.

An oracle knows every request, but a replica takes as long to start for it as for anybody. Demand in replicas is taken
from the trace: the engine time of each prompt where it comes, that of each answer spread over the time it runs. Over it
lies a staircase, the greatest of

    factor x demand + spare x sqrt(demand)      spare: for what collides at random
    floor x mean demand                         never fewer, as far as bursts do not care about the hour
    burst x what the prompts of the last seconds need so that none waits longer than its target

and a level stays on across gaps that are shorter than it takes to start again, since that is billed as well. All of it
is searched, one figure after the other, for the fewest GPU-hours at which the simulated attainment reaches the goal.
What it finds is a schedule that exists, so the true optimum can only be cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from serving.autoscaling.capacity import BATCH_SHARE, Capacity
from serving.simulation.engine import Floats
from serving.simulation.meter import SCRAPE_S
from serving.simulation.replay import Bench, Outcome, scheduled

GOAL: Final = 0.99
# The search's grid and how close the factor is searched.
SMOOTHINGS_S: Final = (30.0, 90.0, 240.0, 5.0)
OTHERS: Final = ({"spare": 0.7}, {"floor": 1.0}, {"floor": 2.0}, {"burst": 0.4}, {"burst": 0.8})
FACTOR_STEP: Final = 0.02
# Windows of the burst term, seconds.
_BURSTS_S: Final = (1, 2, 4, 8, 16)
_LEAST_FACTOR, _MOST_FACTOR, _STEP = 0.4, 6.0, 0.08


@dataclass(frozen=True, slots=True)
class Plan:
    """One point of the search."""

    smoothing_s: float
    factor: float
    spare: float = 0.0
    floor: float = 0.0
    burst: float = 0.0


def demand(bench: Bench) -> Floats:
    """Replicas that the work of each step of SCRAPE_S takes at a replica's capacity."""
    trace, engine = bench.trace, bench.engine
    capacity = Capacity.measured(engine.capacity, itl_s=bench.targets.itl_s)
    prompt, output = float(trace.prompt_tokens.mean()), float(trace.output_tokens.mean())
    # Tokens that a running request holds: long answers run longer, so they count by their length.
    held = (trace.prompt_tokens + trace.output_tokens / 2) * np.asarray(trace.output_tokens, dtype=np.float64)
    context = float(held.sum() / trace.output_tokens.sum(dtype=np.float64))
    rate = capacity.requests_per_s(prompt, output, context)
    prefill_s = capacity.prefill_s(prompt)
    # What is left of a replica's second at capacity is decoding's.
    token_s = max(1 / rate - prefill_s, 0.0) / max(output, 1.0)
    steps = math.ceil(trace.duration_s / SCRAPE_S)
    at = np.minimum((trace.at_s / SCRAPE_S).astype(np.int64), steps - 1)
    prompts = trace.prompt_tokens / 1000
    work = np.bincount(
        at,
        weights=capacity.prefill_overhead_s
        + trace.prompt_tokens / capacity.prefill_tokens_per_s
        + capacity.prefill_s_per_k_squared * prompts**2,
        minlength=steps,
    )
    # An answer of n tokens lies over n steps of a replica that has all it should.
    each_s = capacity.batch(rate, prompt, output, context) / rate / max(output - 1.0, 1.0)
    last = np.minimum(((trace.at_s + trace.output_tokens * each_s) / SCRAPE_S).astype(np.int64), steps - 1)
    length = last - at + 1
    each = trace.output_tokens * token_s / length
    change = np.bincount(at, weights=each, minlength=steps + 1)
    change -= np.bincount(last + 1, weights=each, minlength=steps + 1)
    worked = (work + np.cumsum(change)[:steps]) / SCRAPE_S
    # What runs has its place in the KV cache from its admission to its end.
    places = (trace.prompt_tokens + trace.output_tokens) / (capacity.kv_tokens * BATCH_SHARE)
    change = np.bincount(at, weights=places, minlength=steps + 1)
    change -= np.bincount(last + 1, weights=places, minlength=steps + 1)
    return np.maximum(worked, np.cumsum(change)[:steps])


def bursts(bench: Bench) -> Floats:
    """Replicas in each step of SCRAPE_S that keep every prompt of the last seconds from waiting beyond its target."""
    trace, engine = bench.trace, bench.engine
    seconds = math.ceil(trace.duration_s / SCRAPE_S) * int(SCRAPE_S)
    at = np.minimum(trace.at_s.astype(np.int64), seconds - 1)
    prompts = trace.prompt_tokens / 1000
    work = np.bincount(at, weights=prompts * 1000 / engine.rate + engine.attention_s * prompts**2, minlength=seconds)
    total = np.cumsum(np.insert(work, 0, 0.0))
    most = np.zeros(seconds)
    for width in _BURSTS_S:
        first = np.maximum(np.arange(1, seconds + 1) - width, 0)
        most = np.maximum(most, (total[1:] - total[first]) / (width + bench.targets.ttft_s))
    # A burst's work is done within its target after it: the replicas must stay for that long.
    most = _window_max(np.pad(most, (math.ceil(bench.targets.ttft_s), 0)), math.ceil(bench.targets.ttft_s) + 1)
    return np.asarray(most.reshape(-1, int(SCRAPE_S)).max(axis=1))


def smoothed(values: Floats, width_s: float) -> Floats:
    """The centred mean over so long a time."""
    width = max(1, round(width_s / SCRAPE_S)) | 1
    padded = np.pad(values, width // 2, mode="edge")
    total = np.cumsum(np.insert(padded, 0, 0.0))
    return np.asarray((total[width:] - total[:-width]) / width)


def staircase(wanted: Floats, gap_s: float, least: int, most: int) -> Floats:
    """Whole levels, each kept on across gaps up to `gap_s`."""
    level = np.clip(np.ceil(wanted - 1e-9), least, most)
    width = round(gap_s / SCRAPE_S)
    if width < 1:
        return np.asarray(level)
    spread = _window_max(np.pad(level, width, mode="edge"), width + 1)
    return np.asarray(-_window_max(-spread, width + 1)[: len(level)])


def alive(level: Floats, delay_s: float) -> Floats:
    """Replicas asked for: those needed now and those needed once a start asked for now has come."""
    width = math.ceil(delay_s / SCRAPE_S - 1e-9)
    return _window_max(np.pad(level, (0, width), mode="edge"), width + 1)


def _window_max(values: Floats, width: int) -> Floats:
    return np.asarray(np.lib.stride_tricks.sliding_window_view(values, width).max(axis=1))


class Search:
    """Looks for the cheapest plan; remembers every simulated point."""

    def __init__(self, bench: Bench, goal: float = GOAL, progress: Callable[[str], None] | None = None) -> None:
        self._bench = bench
        self._goal = goal
        self._demand = demand(bench)
        self._bursts = bursts(bench)
        self._progress = progress or (lambda _line: None)
        # None: misses the goal, or costs more than what was found before.
        self._seen: dict[Plan, Outcome | None] = {}

    def schedule(self, plan: Plan) -> tuple[Floats, int]:
        """Replicas asked for at each step, and those at the start."""
        bench = self._bench
        mean = smoothed(self._demand, plan.smoothing_s)
        wanted = plan.factor * mean + plan.spare * np.sqrt(mean)
        wanted = np.maximum(wanted, plan.floor * float(mean.mean()))
        if plan.burst:
            wanted = np.maximum(wanted, plan.burst * self._bursts + mean)
        level = staircase(wanted, bench.start_delay_s, bench.least, bench.most)
        return alive(level, bench.start_delay_s), int(level[0])

    def outcome(self, plan: Plan) -> Outcome | None:
        """The plan simulated; None where it misses the goal, which is known long before the trace's end."""
        if plan not in self._seen:
            levels, initial = self.schedule(plan)
            found = scheduled(replace(self._bench, initial=initial), levels, self._goal)
            self._seen[plan] = found if found is not None and found.attainment >= self._goal else None
        return self._seen[plan]

    def _least_hours(self, plan: Plan) -> float:
        """What the schedule costs at least: what goes is paid for until its last answer ended."""
        levels, _ = self.schedule(plan)
        return float(np.maximum(levels, self._bench.least).sum()) * SCRAPE_S / 3600

    def cheapest(self, near: Plan | None = None) -> tuple[Plan, Outcome] | None:
        """The best plan that reaches the goal, None where no number of replicas does.

        `near`: the plan found for another start delay, with which to begin.
        """
        best = None if near is None else self._better(None, near)
        first = Plan(SMOOTHINGS_S[0], 1.1) if best is None else best[0]
        for smoothing_s in SMOOTHINGS_S:
            best = self._better(best, replace(first, smoothing_s=smoothing_s))
        for other in OTHERS:
            if best is not None:
                best = self._better(best, replace(best[0], **other))
        return best

    def _better(self, best: tuple[Plan, Outcome] | None, plan: Plan) -> tuple[Plan, Outcome] | None:
        if best is not None:
            plan = replace(plan, factor=best[0].factor)
        found = self._least_factor(plan, best[1].gpu_hours if best else math.inf)
        if found is None:
            return best
        outcome = self.outcome(found)
        if outcome is None:
            return best
        self._progress(f"oracle {found}: {outcome.attainment:.4f} at {outcome.gpu_hours:.2f} GPU-hours")
        return (found, outcome) if best is None or outcome.gpu_hours < best[1].gpu_hours else best

    def _least_factor(self, plan: Plan, beaten_hours: float) -> Plan | None:
        """The plan with the least factor that reaches the goal; None where none does for less than `beaten_hours`.

        Coarse steps first, up or down, twice as wide each time; then halves between the last two.
        """
        high, step, low = plan.factor, _STEP, _LEAST_FACTOR
        while True:
            if high > _MOST_FACTOR or self._least_hours(replace(plan, factor=high)) >= beaten_hours:
                return None
            if self._reaches(replace(plan, factor=high)):
                break
            low, high, step = high, round(high + step, 4), 2 * step
        step = _STEP
        while low == _LEAST_FACTOR and high - step > _LEAST_FACTOR:
            if self._reaches(replace(plan, factor=round(high - step, 4))):
                high, step = round(high - step, 4), 2 * step
            else:
                low = round(high - step, 4)
        while high - low > FACTOR_STEP:
            middle = round((low + high) / 2, 4)
            if self._reaches(replace(plan, factor=middle)):
                high = middle
            else:
                low = middle
        return replace(plan, factor=high)

    def _reaches(self, plan: Plan) -> bool:
        return self.outcome(plan) is not None


def fewest(bench: Bench, goal: float = GOAL) -> tuple[int, Outcome] | None:
    """The smallest constant number that reaches the goal; None where none up to the most does."""

    def tried(number: int) -> Outcome | None:
        fixed = replace(bench, initial=number, most=max(number, 1))
        found = scheduled(fixed, np.array([float(number)]), goal)
        return found if found is not None and found.attainment >= goal else None

    low, high = 0, max(1, math.ceil(float(demand(bench).max())))
    found = tried(high)
    while found is None:
        low = high
        if high >= bench.most:
            return None
        high = min(2 * high, bench.most)
        found = tried(high)
    while high - low > 1:
        middle = (low + high) // 2
        outcome = tried(middle)
        if outcome is None:
            low = middle
        else:
            high, found = middle, outcome
    return high, found
