"""What became of every planned request: the one table that reports, verdicts and comparisons are made from.

Latencies count from `scheduled_s`, not from `sent_s`: a request that a late client sent late waited all the same
(no coordinated omission). The difference of the two is the client's own lateness, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from loadtest.client import FailureKind


class Outcome(StrEnum):
    """How a request ended; every planned request has exactly one."""

    COMPLETED = "completed"
    REJECTED = "rejected"  # a clear refusal: HTTP 4xx, or 503 with Retry-After
    FAILED = "failed"
    UNSENT = "unsent"  # the run ended before its time came; never counted as anything else


@dataclass(frozen=True, slots=True)
class Record:
    """One request; all times in seconds after the run's start, None where that never happened."""

    index: int
    tenant: str
    model: str
    scheduled_s: float
    sent_s: float | None
    # Arrival of each event that bears content, the first included.
    chunks_s: tuple[float, ...]
    end_s: float | None
    status: int | None
    outcome: Outcome
    # The engine's own counts.
    prompt_tokens: int | None
    completion_tokens: int | None
    failure: FailureKind | None = None
    detail: str | None = None
    # Sent while the run was warming up: shown over time, left out of every figure.
    warm_up: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its scheduled time to the first content."""
        return self.chunks_s[0] - self.scheduled_s if self.chunks_s else None

    @property
    def e2e_s(self) -> float | None:
        """Seconds from its scheduled time to its end."""
        return None if self.end_s is None else self.end_s - self.scheduled_s

    @property
    def late_s(self) -> float | None:
        """How late the client sent it."""
        return None if self.sent_s is None else self.sent_s - self.scheduled_s
