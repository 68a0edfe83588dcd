"""A model without a replica that somebody wants: it is asked for, and how long its start still takes."""

from __future__ import annotations

import math
from collections.abc import Callable

from serving.admission.ticket import CallLater, Timer

# A sleeping model is asked for again while somebody waits: the first call may have met a cluster in trouble. Not
# often: while Serve sees a call, it starts a first replica and asks no policy whether there should be more.
ASK_AGAIN_S = 20.0
# Retry-After where a start takes longer than it ever did.
OVERDUE_RETRY_S = 5


class Waking:
    """One model's."""

    def __init__(
        self, start_s: float, ask: Callable[[], None] | None, clock: Callable[[], float], call_later: CallLater
    ) -> None:
        """`start_s`: how long a start takes, until one is measured. `ask`: wakes the model; None: it never sleeps."""
        self.start_s = start_s
        self._ask = ask
        self._clock = clock
        self._call_later = call_later
        # Since when somebody has wanted this model while it had no replica.
        self._wanted_s: float | None = None
        self._wanted = False
        self._asking: Timer | None = None

    def follow(self, *, has_replica: bool, somebody_waits: bool) -> None:
        """Take how things stand, at every change."""
        self._wanted = somebody_waits and not has_replica
        if has_replica:
            self._wanted_s = None
        elif somebody_waits:
            if self._wanted_s is None:
                self._wanted_s = self._clock()
            if self._ask is not None and self._asking is None:
                self._ask()
                self._asking = self._call_later(ASK_AGAIN_S, self._again)

    def retry_after_s(self) -> int:
        """What is left of a start."""
        waited_s = 0.0 if self._wanted_s is None else self._clock() - self._wanted_s
        left_s = self.start_s - waited_s
        return max(1, math.ceil(left_s)) if left_s > 0 else OVERDUE_RETRY_S

    def _again(self) -> None:
        self._asking = None
        if self._wanted:
            self.follow(has_replica=False, somebody_waits=True)
