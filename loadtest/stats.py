"""Exact statistics: every quantile is a sample that was seen, nothing is interpolated or fitted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over repeats with the least and the greatest of them."""

    median: float
    low: float
    high: float
    count: int


def quantiles(values: Iterable[float], *levels: float) -> tuple[float, ...]:
    """The nearest-rank quantiles of `values` at each of `levels` (0 to 1): always members of `values`.

    Raises ValueError for no values or a level outside 0..1.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values: a quantile of nothing does not exist")
    return tuple(_nearest_rank(ordered, level) for level in levels)


def _nearest_rank(ordered: Sequence[float], level: float) -> float:
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"quantile level {level} is outside 0..1")
    return ordered[max(0, math.ceil(level * len(ordered)) - 1)]


def spread(values: Iterable[float]) -> Spread:
    """Median (mean of the middle two when even), least and greatest. Raises ValueError for no values."""
    held = list(values)
    if not held:
        raise ValueError("no values: a spread of nothing does not exist")
    return Spread(median=statistics.median(held), low=min(held), high=max(held), count=len(held))


def pairwise(first: Sequence[float], second: Sequence[float], *, ratio: bool) -> Spread:
    """Spread of second/first (`ratio`) or second-first, pair by pair.

    Pairs are repeats measured next to each other in time: what drifts slowly falls out.
    Raises ValueError for unequal lengths or none; ZeroDivisionError for a ratio to zero.
    """
    pairs = zip(first, second, strict=True)
    return spread([b / a if ratio else b - a for a, b in pairs])
