"""What one replica can take where nobody measured it: learned from what replicas took while their users were content.

Work is counted in output tokens; a prompt token is a tenth of one, about what it costs an engine that batches. Two
figures are kept: the most work a replica did while the targets held and nothing waited, and the least at which they did
not. The first only says that so much is possible, so it never asks for replicas; it says when fewer would still do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

PROMPT_TOKEN: Final = 0.1
# A proven load is forgotten slowly: engines and workloads change.
_FORGET_S: Final = 6 * 3600.0
# Of what was too much this is taken as possible.
_BELOW: Final = 0.9


@dataclass(frozen=True, slots=True)
class Learned:
    """Work a second and replica: `proven` was done within the targets, `too_much` was not; None: not seen yet."""

    proven: float = 0.0
    too_much: float | None = None

    def seen(self, work: float, *, content: bool, passed_s: float) -> Learned:
        """After a moment at which each replica did so much."""
        kept = math.exp(-passed_s / _FORGET_S)
        # What was too much once may be possible now, so it rises while it is forgotten.
        too_much = None if self.too_much is None else self.too_much / kept
        if content:
            return Learned(max(self.proven * kept, work), None if too_much is None or work >= too_much else too_much)
        lowest = work if too_much is None else min(too_much, work)
        return replace(self, proven=min(self.proven * kept, _BELOW * lowest), too_much=lowest)

    @property
    def possible(self) -> float:
        """Work a second that a replica is known to do."""
        return self.proven


def work_per_s(arrivals_rps: float, prompt_tokens: float, output_tokens: float) -> float:
    """The work of such arrivals."""
    return arrivals_rps * (PROMPT_TOKEN * prompt_tokens + output_tokens)
