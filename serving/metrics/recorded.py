"""The table's metrics that are recorded as things happen, as the Prometheus library's own objects."""

from __future__ import annotations

from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.metrics.spec import Exporter, Spec
from serving.metrics.table import TABLE

_T = TypeVar("_T")


class Metrics:
    """One exporter's metrics of the table, those recorded and not read at scrape, on a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None, exporter: Exporter = "gateway") -> None:
        self.registry = registry or CollectorRegistry()
        self._by_name: dict[str, Counter | Gauge | Histogram] = {}
        for spec in TABLE:
            if spec.exporter == exporter and not spec.at_scrape:
                self._by_name[spec.name] = self._create(spec)

    def _create(self, spec: Spec) -> Counter | Gauge | Histogram:
        if spec.kind == "counter":
            return Counter(spec.name, spec.help, spec.labels, registry=self.registry)
        if spec.kind == "gauge":
            return Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
        return Histogram(spec.name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets)

    def of(self, name: str) -> Counter | Gauge | Histogram:
        """The metric of this name."""
        return self._by_name[name]

    def counter(self, name: str) -> Counter:
        """The counter of this name; TypeError where it is another kind."""
        return _of(Counter, self._by_name[name])

    def gauge(self, name: str) -> Gauge:
        """The gauge of this name."""
        return _of(Gauge, self._by_name[name])

    def histogram(self, name: str) -> Histogram:
        """The histogram of this name."""
        return _of(Histogram, self._by_name[name])


def _of(kind: type[_T], metric: object) -> _T:
    if not isinstance(metric, kind):
        raise TypeError(f"{metric!r} is no {kind.__name__}")
    return metric
