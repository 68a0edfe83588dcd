"""How fast a stream sends, as a scenario says it; the arithmetic is in `arrivals`."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from loadtest import arrivals
from loadtest.strict import Strict

Rate = Annotated[float, Field(gt=0, le=100_000)]
Variation = Annotated[float, Field(ge=0, le=100)]


class Process(Strict):
    """Times that do not come from the workload."""

    @abstractmethod
    def times(self, rng: random.Random) -> Iterator[float]:
        """Ascending seconds after the run's start, at least until the run's end."""


class Poisson(Process):
    """Independent users at a steady rate."""

    kind: Literal["poisson"]
    rate_rps: Rate

    def times(self, rng: random.Random) -> Iterator[float]:
        """Exponential gaps."""
        return arrivals.poisson(self.rate_rps, rng)


class Gamma(Process):
    """Bursts: `cv` is the coefficient of variation of the gaps, 1 for Poisson, 0 for a clock."""

    kind: Literal["gamma"]
    rate_rps: Rate
    cv: Variation

    def times(self, rng: random.Random) -> Iterator[float]:
        """Gamma-distributed gaps."""
        return arrivals.gamma(self.rate_rps, self.cv, rng)


class Constant(Process):
    """A clock, from the run's start on."""

    kind: Literal["constant"]
    rate_rps: Rate

    def times(self, _rng: random.Random) -> Iterator[float]:
        """Equal gaps."""
        return arrivals.constant(self.rate_rps)


class Step(Strict):
    """A part of a profile."""

    for_s: Annotated[float, Field(gt=0)]
    rate_rps: Annotated[float, Field(ge=0, le=100_000)]


class Profile(Process):
    """A rate that changes in steps, from the run's start on (the warm-up included); `cv` as for gamma."""

    kind: Literal["profile"]
    steps: Annotated[tuple[Step, ...], Field(strict=False, min_length=1)]
    cv: Variation = 1.0

    @property
    def length_s(self) -> float:
        """Seconds that the steps cover."""
        return sum(step.for_s for step in self.steps)

    def times(self, rng: random.Random) -> Iterator[float]:
        """Gaps stretched by the rate."""
        return arrivals.profile([(step.for_s, step.rate_rps) for step in self.steps], rng, cv=self.cv)


class Trace(Strict):
    """The workload's own times, from `from_s` of the source on, `speed` times as fast.

    `share` keeps each request with this probability: the way to run a large trace on a small engine. What
    is left is as long and has the same peaks, where a slower replay would smooth them; its short bursts thin
    out towards Poisson.
    """

    kind: Literal["trace"]
    from_s: Annotated[float, Field(ge=0)] = 0.0
    speed: Annotated[float, Field(gt=0)] = 1.0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


Arrivals = Annotated[Poisson | Gamma | Constant | Profile | Trace, Field(discriminator="kind")]
