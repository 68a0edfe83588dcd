"""What a load run is to send: requests with their times, made ahead of the run and independent of its answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of an open-loop run; a workload is an iterable of these, ascending in `at_s`."""

    # Seconds after the run's start at which it is to be sent, whatever the earlier ones do.
    at_s: float
    tenant: str
    model: str
    # The user's message, ready to be sent.
    prompt: str
    # Asked for as max_tokens together with ignore_eos, so that the amount of work is the plan's.
    output_tokens: int
    # Requests of one conversation share it; sent as x-session-id.
    session: str | None = None
