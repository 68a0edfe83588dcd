"""Prompts made to measure: a few shared beginnings (system prompts, documents) and a tail of each request's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import accumulate, count
from typing import Annotated, Literal

from pydantic import Field

from loadtest.workloads.draft import Draft, Setting, Workload
from loadtest.workloads.lengths import Lengths

_PREFIXES_HELD = 64


class SyntheticWorkload(Workload):
    """Every request is one of `prefixes` fixed texts of `prefix_tokens`, then a tail that no other request has.

    `skew` is the exponent of Zipf's law over the prefixes: 0 asks for all alike, 1 for the first twice as often
    as for the second.
    """

    kind: Literal["synthetic"]
    prefixes: Annotated[int, Field(ge=1, le=100_000)] = 1
    prefix_tokens: Annotated[int, Field(ge=0)] = 0
    skew: Annotated[float, Field(ge=0, le=10)] = 0.0
    tail_tokens: Lengths
    output_tokens: Lengths

    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """Endless."""
        rng = setting.rng("synthetic")
        weights = list(accumulate(rank**-self.skew for rank in range(1, self.prefixes + 1)))

        @lru_cache(maxsize=_PREFIXES_HELD)
        def beginning(prefix: int) -> str:
            return setting.text(f"prefix/{prefix}", self.prefix_tokens)

        def write(prefix: int, number: int, tokens: int) -> str:
            if tokens <= self.prefix_tokens:
                return setting.text(f"prefix/{prefix}", tokens)
            tail = setting.text(f"tail/{number}", tokens - self.prefix_tokens)
            return f"{beginning(prefix)} {tail}" if self.prefix_tokens else tail

        for number in count():
            (prefix,) = rng.choices(range(self.prefixes), cum_weights=weights)
            yield Draft(
                at_s=None,
                prompt_tokens=self.prefix_tokens + self.tail_tokens.draw(rng),
                output_tokens=self.output_tokens.draw(rng),
                write=partial(write, prefix, number),
            )
