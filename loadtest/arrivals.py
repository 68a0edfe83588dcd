"""When requests come: pure functions from a rate and a source of randomness to ascending times.

Times are seconds after the run's start. All iterators are lazy; all but `profile` and `trace` are endless,
so cut them with `until`. The random ones are stationary: they start as if they had run forever, so any window
of T seconds holds `rate * T` arrivals on average. A renewal process that starts with a whole gap would bring
(cv² - 1)/2 arrivals too many, all of them at the beginning.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Gaps that vary by less than a hundredth of a per cent are a clock's; the shape parameter of a gamma distribution
# grows with the square of 1/CV, beyond what it can be drawn with.
_CLOCK_CV = 1e-4


def constant(rate_rps: float) -> Iterator[float]:
    """One arrival every 1/rate seconds, the first at 0. Raises ValueError for a rate that is not above 0."""
    _check(rate_rps)
    # Not a running sum: its rounding would drift over a long run.
    return (count / rate_rps for count in itertools.count())


def poisson(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Independent users: exponential gaps (CV 1). Raises ValueError for a rate that is not above 0."""
    _check(rate_rps)
    return itertools.accumulate(rng.expovariate(rate_rps) for _ in itertools.count())


def gamma(rate_rps: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Gamma-distributed gaps of this coefficient of variation: above 1 bursty, below 1 regular, 0 a clock.

    The first gap is drawn from the equilibrium distribution, a uniform part of a length-biased gap
    (Cox, Renewal Theory, 1962). Raises ValueError for a rate that is not above 0 or a CV below 0.
    """
    _check(rate_rps, cv)
    if cv < _CLOCK_CV:
        phase = rng.random()
        return ((count + phase) / rate_rps for count in itertools.count())
    shape, scale = 1 / cv**2, cv**2 / rate_rps
    # A gap of Gamma(k) weighted by its own length is Gamma(k + 1).
    first = rng.random() * rng.gammavariate(shape + 1, scale)
    gaps = (rng.gammavariate(shape, scale) for _ in itertools.count())
    return itertools.accumulate(itertools.chain([first], gaps))


def profile(steps: Sequence[tuple[float, float]], rng: random.Random, *, cv: float = 1.0) -> Iterator[float]:
    """Arrivals at a rate that changes in steps of (seconds, requests a second); ends with the last step.

    Exact: a stationary process of rate 1 runs on a clock that counts expected arrivals, and its times are
    carried back through the inverse of the integrated rate. Nothing is drawn and thrown away, so a change of
    one step leaves the arrivals before it as they were. Raises ValueError for a negative length or rate.
    """
    for length_s, rate_rps in steps:
        if not (length_s >= 0 and rate_rps >= 0 and math.isfinite(length_s) and math.isfinite(rate_rps)):
            raise ValueError(f"a step of {length_s} s at {rate_rps} requests a second; neither may be below 0")
    return _through(steps, gamma(1.0, cv, rng))


def _through(steps: Sequence[tuple[float, float]], expected: Iterator[float]) -> Iterator[float]:
    start_s = begun = 0.0
    due = next(expected)
    for length_s, rate_rps in steps:
        ended = begun + length_s * rate_rps
        while due < ended:
            # The bound only takes back rounding: times must not reach into the next step.
            yield start_s + min(length_s, (due - begun) / rate_rps)
            due = next(expected)
        start_s, begun = start_s + length_s, ended


def trace(
    items: Iterable[T], *, time_s: Callable[[T], float], from_s: float = 0.0, speed: float = 1.0, until_s: float
) -> Iterator[tuple[float, T]]:
    """Recorded items with the times at which to replay them: from `from_s` of the trace on, `speed` times as fast.

    `items` must ascend in `time_s`; reading stops at the first one due at or after `until_s` (of the run).
    Raises ValueError for a speed that is not above 0.
    """
    if not speed > 0:
        raise ValueError(f"a trace cannot run at speed {speed}; it must be above 0")
    return _replayed(items, time_s, from_s, speed, until_s)


def _replayed(
    items: Iterable[T], time_s: Callable[[T], float], from_s: float, speed: float, until_s: float
) -> Iterator[tuple[float, T]]:
    for item in items:
        at_s = (time_s(item) - from_s) / speed
        if at_s >= until_s:
            return
        if at_s >= 0:
            yield at_s, item


def until(times_s: Iterable[float], end_s: float) -> Iterator[float]:
    """The ascending times before `end_s`."""
    return itertools.takewhile(lambda at_s: at_s < end_s, times_s)


def _check(rate_rps: float, cv: float = 0.0) -> None:
    if not (rate_rps > 0 and math.isfinite(rate_rps)):
        raise ValueError(f"a rate of {rate_rps} requests a second; it must be above 0")
    if not (cv >= 0 and math.isfinite(cv)):
        raise ValueError(f"a coefficient of variation of {cv}; it must be 0 or more")
