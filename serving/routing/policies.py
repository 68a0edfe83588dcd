"""Replica choice as pure functions from loads to an index.

Two random candidates and the less loaded of them come close to the least loaded of all, without the herd
that "least loaded" sends to one replica when several gateways act on the same stale picture (Mitzenmacher,
"The Power of Two Choices in Randomized Load Balancing", 2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def less_loaded_of_two(loads: Sequence[int], rng: Random) -> int:
    """Index of the less loaded of two distinct random candidates; a tie goes to the first drawn.

    `loads` are requests in flight, one entry a candidate, at least one.
    """
    if len(loads) == 1:
        return 0
    first, second = rng.sample(range(len(loads)), 2)
    return second if loads[second] < loads[first] else first
