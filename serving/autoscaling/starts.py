"""How long replicas take to start, measured from what a controller shows of them: ids that are ready, and a target."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

# The median of so many: one slow start (a cold page cache, a download) is not what the next will take.
REMEMBERED = 5


@dataclass(frozen=True, slots=True)
class Started:
    """A replica that has become ready, and how long after it was asked for, seconds."""

    replica: str
    seconds: float


class Starts:
    """Follows one deployment's replicas from being asked for to being ready."""

    def __init__(self, guess_s: float) -> None:
        """`guess_s` is what a start is taken to last until one was seen."""
        self._guess_s = guess_s
        self._measured_s: list[float] = []
        self._known: frozenset[str] | None = None
        self._asked_s: list[float] = []
        self._seen_s = 0.0

    @property
    def start_s(self) -> float:
        """How long a start takes."""
        return median(self._measured_s) if self._measured_s else self._guess_s

    def starting_s(self, now_s: float) -> tuple[float, ...]:
        """For each replica that is asked for and not ready, since how long, the longest first."""
        return tuple(max(0.0, now_s - asked_s) for asked_s in self._asked_s)

    def observe(
        self, now_s: float, ready: frozenset[str], target: int, scaled_up_s: float | None
    ) -> tuple[Started, ...]:
        """Take what is to be seen now; returns the replicas that have become ready since.

        `scaled_up_s` is when the target last grew: that may be earlier than anybody looked.
        """
        first = self._known is None
        fresh = scaled_up_s is not None and (first or scaled_up_s >= self._seen_s)
        asked_s = scaled_up_s if fresh and scaled_up_s is not None else now_s
        came = [] if self._known is None else sorted(ready - self._known)
        started = []
        for replica in came:
            if self._asked_s:
                started.append(Started(replica, now_s - self._asked_s.pop(0)))
            elif fresh:
                started.append(Started(replica, now_s - asked_s))
        missing = max(0, target - len(ready))
        # Those that are not wanted any more are the latest: a controller stops first what has not started.
        del self._asked_s[missing:]
        self._asked_s += [asked_s] * (missing - len(self._asked_s))
        self._known, self._seen_s = ready, now_s
        self._measured_s = [*self._measured_s, *(s.seconds for s in started)][-REMEMBERED:]
        return tuple(started)
