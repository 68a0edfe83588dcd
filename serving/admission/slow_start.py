"""How many of those who waited meet replicas that have just come: some, one more for each that has been answered, and
twice as many every quarter of a second (slow start, as TCP's), so that even those who are answered late hold nobody up.
"""

from __future__ import annotations

from collections.abc import Callable

from serving.admission.ticket import CallLater, Timer

# Released at once for each replica that comes: enough to fill a first batch, few enough for a server that has just
# come up.
RELEASED_PER_REPLICA = 16
# How often that doubles while anybody waits, and how far.
RAMP_S = 0.25
MOST_RAMP = 1 << 16


class SlowStart:
    """One model's. It begins where there is no replica and is over when nobody waits."""

    def __init__(self, call_later: CallLater, more: Callable[[], None]) -> None:
        """`more` is called when it lets more through."""
        self._call_later = call_later
        self._more = more
        self._starting = True
        self._unanswered = 0
        self._ramp = 1
        self._ramping: Timer | None = None
        self._met = False

    def limit(self, replicas: int) -> int:
        """The most that may be under way unanswered at so many replicas while they start."""
        return replicas * RELEASED_PER_REPLICA * self._ramp

    def full(self, replicas: int) -> bool:
        """Whether no more may go to so many replicas now."""
        return replicas <= 0 or (self._starting and self._unanswered >= self.limit(replicas))

    def sent(self) -> bool:
        """A request goes; whether it is one of those that `answered` is to be told of."""
        self._unanswered += self._starting
        return self._starting

    def answered(self) -> None:
        """One of those that were sent is answered, or has ended."""
        self._unanswered -= 1

    def follow(self, replicas: int, *, somebody_waits: bool) -> None:
        """Take how things stand, at every change."""
        self._met = somebody_waits and replicas > 0
        if replicas <= 0:
            self._starting = True
        elif not somebody_waits:
            self._starting = False
        if not self._met:
            self._ramp = 1
        elif self._starting and self._ramping is None:
            self._ramping = self._call_later(RAMP_S, self._double)

    def _double(self) -> None:
        self._ramping = None
        if self._met:
            self._ramp = min(MOST_RAMP, self._ramp * 2)
        self._more()
