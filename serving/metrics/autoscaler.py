"""The recording side of scaling decisions: what the process that decides exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry

from serving.metrics.recorded import Metrics
from serving.metrics.table import START_PHASES

READY = "ready"
FAILED = "failed"
STALE = "stale"


class AutoscalerMetrics:
    """Records decisions and starts of replicas, on a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        metrics = Metrics(registry, exporter="autoscaler")
        self.registry = metrics.registry
        self._target = metrics.gauge("galerne_autoscaler_target_replicas")
        self._most = metrics.gauge("galerne_autoscaler_max_replicas")
        self._terms = metrics.gauge("galerne_autoscaler_term_replicas")
        self._decisions = metrics.counter("galerne_autoscaler_decisions")
        self._ages = metrics.gauge("galerne_autoscaler_signal_age_seconds")
        self._stale = metrics.gauge("galerne_autoscaler_stale")
        self._errors = metrics.counter("galerne_autoscaler_errors")
        self._start = metrics.histogram("galerne_replica_start_seconds")
        self._starts = metrics.counter("galerne_replica_starts")

    def expect(self, model: str, maximum: int) -> None:
        """Have a model's series exist before its first decision."""
        self._most.labels(model).set(maximum)
        self._stale.labels(model).set(0)
        self._errors.labels(model)
        for outcome in (READY, FAILED):
            self._starts.labels(model, outcome)

    def decided(self, model: str, reason: str, terms: Iterable[tuple[str, float]], ages_s: Mapping[str, float]) -> None:
        """A decision: why, its terms in replicas, and how old each signal was that it was made from."""
        self._decisions.labels(model, reason).inc()
        self._stale.labels(model).set(reason == STALE)
        for term, replicas in terms:
            self._terms.labels(model, term).set(replicas)
        for name, age_s in ages_s.items():
            self._ages.labels(model, name).set(age_s)

    def target(self, model: str, replicas: int) -> None:
        """What the cluster was last told."""
        self._target.labels(model).set(replicas)

    def failed(self, model: str) -> None:
        """A decision that could not be made."""
        self._errors.labels(model).inc()

    def start_ended(self, model: str, outcome: str) -> None:
        """A replica has become ready, or has failed to."""
        self._starts.labels(model, outcome).inc()

    def started(self, model: str, phases_s: Mapping[str, float]) -> None:
        """How long the phases of a start took."""
        for phase, seconds in phases_s.items():
            if phase in START_PHASES:
                self._start.labels(model, phase).observe(seconds)
