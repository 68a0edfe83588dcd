"""Capacity: the highest rate at which a scenario still meets its targets, found in few runs.

A step passes where enough of its requests were good, fails where too few were, and is undecided where the run was too
short to tell: the Wilson interval of the share of good requests (Wilson, 1927; 95 %) holds the wanted share. An
undecided step is repeated and judged with all its requests together, up to a bound; then its share alone decides, and
the result says so. The rate climbs by doubling until a step fails, and is then halved in between until the step that
passed and the one that failed are close.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

# Of the normal distribution, two-sided 95 %.
_Z = 1.959964


class Decision(StrEnum):
    """What a step came to."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How far and how exactly to search."""

    start: float = 1.0
    # Of the requests that must be good.
    good_share: float = 0.95
    # The search ends when the failed factor is at most this much above the passed one.
    precision: float = 0.1
    # Runs of one step at most.
    repeats: int = 3
    # Steps at most; a bound, not an aim.
    most_steps: int = 30
    # Below it nothing is searched: the scenario is too much at any rate.
    least: float = 0.01
    most: float = 1000.0


@dataclass(frozen=True, slots=True)
class Tried:
    """One factor with all its runs together."""

    factor: float
    requests: int
    good: int
    decision: Decision
    # Decided by its share although the interval holds the wanted one.
    close: bool = False

    @property
    def interval(self) -> tuple[float, float]:
        """Within which the share of good requests lies, at 95 %."""
        return wilson(self.good, self.requests)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Where the capacity lies: it was kept at `passed` and not at `failed`."""

    # None: at no rate that was tried.
    passed: float | None
    # None: the search ended before any rate was too high.
    failed: float | None
    steps: tuple[Tried, ...]


def wilson(good: int, requests: int) -> tuple[float, float]:
    """The 95 % interval of a share; of no requests it is everything."""
    if requests == 0:
        return 0.0, 1.0
    share, z2 = good / requests, _Z * _Z
    middle = (share + z2 / (2 * requests)) / (1 + z2 / requests)
    half = _Z / (1 + z2 / requests) * math.sqrt(share * (1 - share) / requests + z2 / (4 * requests * requests))
    return max(0.0, middle - half), min(1.0, middle + half)


def decide(good: int, requests: int, wanted: float) -> Decision:
    """Passed, failed, or too few requests to tell."""
    low, high = wilson(good, requests)
    if low >= wanted:
        return Decision.PASSED
    if high < wanted:
        return Decision.FAILED
    return Decision.UNDECIDED


def search(settings: SearchSettings, measure: Callable[[float], tuple[int, int]]) -> Capacity:
    """Find the capacity; `measure` runs the scenario at a factor of its rates and gives (good, requests)."""
    steps: list[Tried] = []
    passed: float | None = None
    failed: float | None = None
    factor: float | None = settings.start
    while factor is not None and len(steps) < settings.most_steps:
        tried = _tried(settings, factor, measure)
        steps.append(tried)
        if tried.decision is Decision.PASSED:
            passed = factor
        else:
            failed = factor
        factor = _next(settings, passed, failed)
    return Capacity(passed, failed, tuple(steps))


def _tried(settings: SearchSettings, factor: float, measure: Callable[[float], tuple[int, int]]) -> Tried:
    good = requests = 0
    for _ in range(settings.repeats):
        more_good, more = measure(factor)
        good, requests = good + more_good, requests + more
        decision = decide(good, requests, settings.good_share)
        if decision is not Decision.UNDECIDED:
            return Tried(factor, requests, good, decision)
    enough = requests > 0 and good / requests >= settings.good_share
    return Tried(factor, requests, good, Decision.PASSED if enough else Decision.FAILED, close=True)


def _next(settings: SearchSettings, passed: float | None, failed: float | None) -> float | None:
    """The factor to try now; None at the end."""
    if passed is None:
        down = (failed or settings.start) / 2
        return down if down >= settings.least else None
    if failed is None:
        up = passed * 2
        return up if up <= settings.most else None
    if failed <= passed * (1 + settings.precision):
        return None
    # The geometric middle: factors are ratios.
    return math.sqrt(passed * failed)


def told(steps: tuple[Tried, ...]) -> Iterator[str]:
    """Sentences a reader needs beside the figures."""
    for tried in steps:
        if tried.close:
            low, high = tried.interval
            yield (
                f"× {tried.factor:.3g} is a close call: {tried.good} of {tried.requests} good, {low:.1%} to {high:.1%} "
                "at 95 % confidence; a longer scenario tells more"
            )
