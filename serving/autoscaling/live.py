"""The policy as a running cluster uses it: what the controller shows becomes a snapshot, the decision a target.

It runs in the event loop of Ray Serve's controller, ten times a second, so it promises never to block and never to
raise: signals are read in the background, a decision is made every `decision_interval_s`, in between and in any trouble
the target stays what it is. Nothing here imports Ray; `deployments.scaling` hands it what Ray knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from serving.autoscaling.policy import Memory, decide
from serving.autoscaling.settings import Settings
from serving.autoscaling.snapshot import Decision, Signal, Snapshot
from serving.autoscaling.starts import Starts
from serving.config import AutoscalingConfig, ModelConfig
from serving.metrics.autoscaler import FAILED, READY, AutoscalerMetrics

# Of the time from being asked for to being ready, what the replica itself does not account for.
SCHEDULE = "schedule"
# A replica's own report of its start comes with its first statistics; one that has none by then never will.
REPORT_WAIT_S = 60.0

Read = Callable[[str], Mapping[str, Signal]]

log = structlog.get_logger("galerne.autoscaler")


@dataclass(frozen=True, slots=True)
class View:
    """What a controller knows of one deployment now; times in seconds since the epoch."""

    now_s: float
    ready: frozenset[str]
    target: int
    # When the target last grew.
    scaled_up_s: float | None = None
    # By replica, the phases of its start as it reports them, seconds.
    phases_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Starts that have failed since the cluster began.
    failed_starts: int = 0


class ModelScaler:
    """Says how many replicas one model is to have."""

    def __init__(
        self,
        model: ModelConfig,
        read: Read,
        metrics: AutoscalerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read(model id)` gives the signals by their field of Snapshot, at once; `clock` paces decisions."""
        section = model.autoscaling or AutoscalingConfig()
        self._model = model.id
        self._settings = Settings.of(model)
        self._interval_s = section.decision_interval_s
        self._read = read
        self._metrics = metrics
        self._clock = clock
        self._starts = Starts(section.start_s)
        self._memory = Memory()
        self._next_s = 0.0
        self._target: int | None = None
        self._reason = ""
        # Starts whose replica has not reported its phases yet: when they ended, how long they took.
        self._unreported: dict[str, tuple[float, float]] = {}
        self._failed_starts: int | None = None
        metrics.expect(model.id, self._settings.maximum)

    def __call__(self, view: View) -> int:
        """The target; the one that is, in between decisions and where none can be made."""
        try:
            return self._scaled(view)
        except Exception:
            self._metrics.failed(self._model)
            log.exception("no decision: the scale is held", model=self._model, target=view.target)
            return view.target

    def _scaled(self, view: View) -> int:
        self._follow(view)
        woken = self._target == 0 and view.target > 0
        if woken:
            # Somebody asks; the signals, which are some seconds old, do not know it yet.
            self._memory = replace(self._memory, asked_at_s=view.now_s)
            log.info("woken", model=self._model, target=view.target)
        self._target = view.target
        self._metrics.target(self._model, view.target)
        now_s = self._clock()
        if now_s < self._next_s:
            return view.target
        self._next_s = now_s + self._interval_s
        signals = self._read(self._model)
        snapshot = replace(
            Snapshot(
                at_s=view.now_s,
                ready=len(view.ready),
                target=view.target,
                starting_s=self._starts.starting_s(view.now_s),
                start_s=self._starts.start_s,
            ),
            **signals,  # type: ignore[arg-type]  # each is a field that holds a signal
        )
        decision, self._memory = decide(snapshot, self._memory, self._settings)
        ages_s = {name: math.inf if signal.value is None else signal.age_s for name, signal in signals.items()}
        self._metrics.decided(self._model, decision.reason, decision.terms, ages_s)
        self._tell(view, decision)
        return decision.target

    def _tell(self, view: View, decision: Decision) -> None:
        # A line a change; what is decided anew every few seconds is in the metrics.
        if decision.target != view.target or decision.reason != self._reason:
            log.info(
                "scale" if decision.target != view.target else "hold",
                model=self._model,
                ready=len(view.ready),
                target=decision.target,
                before=view.target,
                reason=decision.reason,
                explanation=decision.explanation,
            )
        self._reason = decision.reason
        if decision.target != view.target:
            # What the cluster then shows is this decision, and no wake.
            self._target = decision.target

    def _follow(self, view: View) -> None:
        # What failed before this controller came was counted by the one before it.
        known = view.failed_starts if self._failed_starts is None else self._failed_starts
        for _ in range(view.failed_starts - known):
            self._metrics.start_ended(self._model, FAILED)
        self._failed_starts = view.failed_starts
        for started in self._starts.observe(view.now_s, view.ready, view.target, view.scaled_up_s):
            self._metrics.start_ended(self._model, READY)
            self._unreported[started.replica] = (view.now_s, started.seconds)
        for replica, (ended_s, seconds) in tuple(self._unreported.items()):
            phases_s = view.phases_s.get(replica)
            if phases_s:
                scheduled_s = max(0.0, seconds - sum(phases_s.values()))
                self._metrics.started(self._model, {SCHEDULE: scheduled_s, **phases_s})
            if phases_s or view.now_s - ended_s > REPORT_WAIT_S:
                del self._unreported[replica]
