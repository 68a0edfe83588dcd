"""Token counts as a scenario gives them: a number, or a distribution to draw from."""

from __future__ import annotations

import math
import random
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from loadtest.strict import Strict
from loadtest.workloads.draft import Count

# The standard normal's 95 % quantile.
_P95_SIGMAS = 1.6448536269514722


class Fixed(Strict):
    """Always the same; a plain number in YAML."""

    kind: Literal["fixed"]
    tokens: Count

    def draw(self, _rng: random.Random) -> int:
        """The number."""
        return self.tokens


class Uniform(Strict):
    """Every count from `low` to `high` alike."""

    kind: Literal["uniform"]
    low: Count
    high: Count

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self

    def draw(self, rng: random.Random) -> int:
        """One count."""
        return rng.randint(self.low, self.high)


class Lognormal(Strict):
    """Mostly short with a long tail, as people write: half are below `median`, one in twenty above `p95`."""

    kind: Literal["lognormal"]
    median: Count
    p95: Count

    @model_validator(mode="after")
    def _ordered(self) -> Lognormal:
        if self.median > self.p95:
            raise ValueError(f"median ({self.median}) must not be above p95 ({self.p95})")
        return self

    def draw(self, rng: random.Random) -> int:
        """One count, at least 1."""
        sigma = math.log(self.p95 / self.median) / _P95_SIGMAS
        return max(1, round(rng.lognormvariate(math.log(self.median), sigma)))


def _plain_number(value: Any) -> Any:
    return {"kind": "fixed", "tokens": value} if isinstance(value, int | float) else value


Lengths = Annotated[
    Annotated[Fixed | Uniform | Lognormal, Field(discriminator="kind")],
    BeforeValidator(_plain_number),
]
