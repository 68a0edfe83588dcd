"""What demand may become while a replica starts: learned from how the very same demand moved lately.

A fixed headroom is too much for a steady service and too little for one that doubles within a minute. Here is learned
which part of a rise went on over the time that a start takes, and by how much demand came out above what was said of
it: a load that swings back is not extrapolated, one that climbs is, and what neither tells is the measure of headroom.
All functions are pure, histories are bounded tuples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

# Seconds and demand, ascending in time.
Sample = tuple[float, float]

# Of demand itself, in replicas: below it a ratio says nothing (from a hundredth to a tenth is not tenfold growth).
_LEAST: Final = 0.25


def kept(history: Sequence[Sample], newest: Sample, *, window_s: float, most: int) -> tuple[Sample, ...]:
    """The history with its newest sample, no older than `window_s` and at most `most` long."""
    first = newest[0] - window_s
    held = [sample for sample in history if first <= sample[0] < newest[0]]
    return (*held[-(most - 1) :], newest)


# What is forgotten of how demand moved: most of it after this time; at first there is little to forget.
_FORGET_S: Final = 1800.0
_FIRST_S: Final = 180.0
# What a service that nobody has seen yet is taken for: demand misses what was said of it by this part of itself, and
# half of a rise goes on, which counts like one rise of this many replicas.
_FIRST_MISS: Final = 0.15
_FIRST_DAMPING: Final = 0.5
_FIRST_RISE: Final = 0.5
# What is missed below this part of demand is nothing: a load that is constant is to settle, not to approach.
_NOTHING: Final = 0.03
# A rise is taken over the horizon, within these.
_LEAST_RISE_S: Final = 60.0
_MOST_RISE_S: Final = 180.0


@dataclass(frozen=True, slots=True)
class Said:
    """What was said at a moment: demand then, its rise before, and what it was to become."""

    at_s: float
    demand: float
    rise: float
    expected: float


@dataclass(frozen=True, slots=True)
class Moves:
    """How demand, in replicas, moved over the time that a start takes, and how far that was from what was said.

    Two figures are learned, with weights that fade over half an hour: which part of a rise goes on (least squares of
    rises on the rises before them), and by how much demand came out above what was said (root of the mean square).
    """

    said: tuple[Said, ...] = ()
    since_s: float | None = None
    rise_squared: float = _FIRST_RISE**2
    rise_goes_on: float = _FIRST_DAMPING * _FIRST_RISE**2
    missed_squared: float | None = None

    @property
    def damping(self) -> float:
        """The part of a rise that goes on, 0 to 1."""
        return min(max(self.rise_goes_on / max(self.rise_squared, 1e-9), 0.0), 1.0)

    def missed(self, demand: float) -> float:
        """Replicas by which demand was above what was said, 0 where that is next to nothing of it."""
        missed = math.sqrt(self.missed_squared or 0.0)
        return missed if missed >= _NOTHING * demand else 0.0

    def seen(self, history: Sequence[Sample], ahead_s: float) -> tuple[Moves, float]:
        """After the newest sample of demand: what was learned, and demand in `ahead_s`."""
        now, demand = history[-1]
        since_s = now if self.since_s is None else self.since_s
        missed_squared = (_FIRST_MISS * demand) ** 2 if self.missed_squared is None else self.missed_squared
        rise_squared, goes_on = self.rise_squared, self.rise_goes_on
        due = [one for one in self.said if one.at_s <= now - ahead_s]
        if due:
            last = self.said[-1].at_s
            fades = 1 - math.exp(-max(now - last, 0.0) / min(_FIRST_S + now - since_s, _FORGET_S))
            told = due[-1]
            missed_squared += fades * (max(demand - told.expected, 0.0) ** 2 - missed_squared)
            if told.rise > 0:
                rise_squared += fades * (told.rise**2 - rise_squared)
                goes_on += fades * (told.rise * (demand - told.demand) - goes_on)
        learned = replace(
            self, since_s=since_s, rise_squared=rise_squared, rise_goes_on=goes_on, missed_squared=missed_squared
        )
        rise = _rise(history, min(max(ahead_s, _LEAST_RISE_S), _MOST_RISE_S))
        expected = demand + learned.damping * rise
        said = (
            *[one for one in self.said if one not in due[:-1]][-(_MOST_SAID - 1) :],
            Said(now, demand, rise, expected),
        )
        return replace(learned, said=said), expected


_MOST_SAID: Final = 256


def _rise(history: Sequence[Sample], over_s: float) -> float:
    """By how much demand is above what it was so long ago; 0 where it fell or nobody knows."""
    now, demand = history[-1]
    for at, value in reversed(history):
        if at <= now - over_s:
            return max(demand - value, 0.0)
    return 0.0


BIN_S: Final = 600.0
BINS: Final = 144
_DAY_S: Final = 86400.0
# Weight of a new day against those before it.
_NEW: Final = 0.5
# Of the difference to the present that yesterday's shape may make: no more than this, up.
_MOST_AHEAD: Final = 2.0

# Mean demand of each ten minutes of the day; below 0: not known yet.
Profile = tuple[float, ...]
UNKNOWN: Final[Profile] = (-1.0,) * BINS


def learned(profile: Profile, history: Sequence[Sample], at_s: float) -> Profile:
    """The profile with the ten minutes that ended before `at_s`, if this is the first sample after them."""
    if not history or history[-1][0] // BIN_S == at_s // BIN_S:
        return profile
    number = history[-1][0] // BIN_S
    values = [value for at, value in history if at // BIN_S == number]
    mean = sum(values) / len(values)
    index = int(number) % BINS
    before = profile[index]
    now = mean if before < 0 else before + _NEW * (mean - before)
    return (*profile[:index], now, *profile[index + 1 :])


def by_time_of_day(profile: Profile, at_s: float, ahead_s: float, demand: float) -> float:
    """Demand in `ahead_s` if it moves as it did on earlier days at this time; `demand` where none is known."""
    now, then = _at(profile, at_s), _at(profile, at_s + ahead_s)
    if now is None or then is None:
        return demand
    return demand * min(max(then, _LEAST) / max(now, _LEAST), _MOST_AHEAD)


def _at(profile: Profile, at_s: float) -> float | None:
    """The profile between the middles of its bins."""
    place = (at_s % _DAY_S) / BIN_S - 0.5
    index = int(place // 1)
    first, second = profile[index % BINS], profile[(index + 1) % BINS]
    if first < 0 or second < 0:
        return None
    return first + (place - index) * (second - first)
