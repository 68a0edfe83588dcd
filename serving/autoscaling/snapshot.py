"""What a scaling decision is made from and what it says; facts only, shared by the live path and the simulator.

A snapshot is of one deployment at one moment. Every value carries the age of what it was computed from, because
the policy's first question is whether it may believe it: a value that is missing, not a number or too old is no value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Signal:
    """One measured value and the age in seconds of its newest sample; `value` None: there is none."""

    value: float | None = None
    age_s: float = math.inf

    def usable(self, stale_after_s: float) -> bool:
        """Whether it is a finite number, measured recently enough."""
        return self.value is not None and math.isfinite(self.value) and 0 <= self.age_s <= stale_after_s


NO_SIGNAL: Final = Signal()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One model's deployment and its load.

    Rates and means are over the signals' window (`serving.metrics.rules`), counts are the newest samples summed over
    gateways or replicas.
    """

    # Seconds since the epoch, UTC: scheduled floors and forecasts hang on the time of day.
    at_s: float
    # Replicas that take requests.
    ready: int
    # What the cluster was last told.
    target: int
    # For each replica that is started but not ready, how long it has been starting, seconds.
    starting_s: tuple[float, ...] = ()
    # From asking for a replica to its readiness, seconds, as measured (the configured guess before the first start).
    start_s: float = 45.0
    # Requests accepted by the gateways, a second, held ones included.
    arrivals_rps: Signal = NO_SIGNAL
    # Mean of a request: prompt tokens that had to be computed (prefix cache hits taken off), output tokens.
    prompt_tokens: Signal = NO_SIGNAL
    output_tokens: Signal = NO_SIGNAL
    # Requests held in the gateways for want of a replica, and how long the oldest has waited, seconds.
    held: Signal = NO_SIGNAL
    held_oldest_s: Signal = NO_SIGNAL
    # Requests on the engines.
    running: Signal = NO_SIGNAL
    waiting: Signal = NO_SIGNAL
    # Share of KV blocks in use, mean over replicas, 0 to 1.
    kv_use: Signal = NO_SIGNAL
    # As clients see them (from the gateway's receipt of a request on), seconds.
    ttft_p95_s: Signal = NO_SIGNAL
    itl_p95_s: Signal = NO_SIGNAL
    # Share of requests beyond their target, 0 to 1; no requests: no value.
    ttft_missed: Signal = NO_SIGNAL
    itl_missed: Signal = NO_SIGNAL
    # Replicas that something else wants (`autoscaling.external`).
    external: Signal = NO_SIGNAL


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there are to be, and why."""

    target: int
    # One word for the metric's label: see `serving.autoscaling.policy.REASONS`.
    reason: str
    # The sentence for the log, with the figures that decided.
    explanation: str
    # The terms by name (demand, queue, feedback, floor …), in replicas, for dashboards.
    terms: tuple[tuple[str, float], ...] = ()
