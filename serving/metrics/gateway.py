"""The gateway's recording side: children of the table's metrics, looked up once per label set.

Looking a labelled child up costs as much as incrementing it; the label sets are bounded by the configuration,
so the children are kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.metrics.table import Metrics, spec


class Accepted(Protocol):
    """What the metrics read of a relayed request when it has ended."""

    @property
    def model(self) -> str: ...
    @property
    def body(self) -> bytes: ...
    @property
    def started_s(self) -> float: ...
    @property
    def first_byte_s(self) -> float | None: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def outcome(self) -> str: ...
    @property
    def cut(self) -> bool: ...
    @property
    def client_left(self) -> bool: ...


class Loads(Protocol):
    """What the metrics read of the replica set at scrape time."""

    def ready(self, model: str) -> int:
        """Replicas that take requests."""

    def snapshot(self) -> Mapping[str, Mapping[str, int]]:
        """Requests in flight by model and replica."""


class GatewayMetrics:
    """Records what the gateway sees, on a registry of its own."""

    def __init__(self, clock: Callable[[], float], registry: CollectorRegistry | None = None) -> None:
        metrics = Metrics(registry)
        self.registry = metrics.registry
        self._clock = clock
        # Bounded by configuration: routes x models x tenants x statuses.
        self._requests = lru_cache(maxsize=None)(metrics.counter("galerne_requests").labels)
        self._accepted = lru_cache(maxsize=None)(metrics.counter("galerne_requests_accepted").labels)
        self._finished = lru_cache(maxsize=None)(metrics.counter("galerne_requests_finished").labels)
        self._in_flight = lru_cache(maxsize=None)(metrics.gauge("galerne_requests_in_flight").labels)
        self._ttft = lru_cache(maxsize=None)(metrics.histogram("galerne_time_to_first_token_seconds").labels)
        self._gaps = _Gaps()
        self.registry.register(self._gaps)
        self._seconds = lru_cache(maxsize=None)(metrics.histogram("galerne_request_seconds").labels)
        self._bytes_in = lru_cache(maxsize=None)(metrics.counter("galerne_request_bytes").labels)
        self._bytes_out = lru_cache(maxsize=None)(metrics.counter("galerne_response_bytes").labels)
        self._upstream = lru_cache(maxsize=None)(metrics.counter("galerne_upstream_errors").labels)
        self._cut = lru_cache(maxsize=None)(metrics.counter("galerne_streams_cut").labels)

    def watch(self, loads: Loads) -> None:
        """Export the replica set's state as it is at each scrape."""
        self.registry.register(_ReplicaCollector(loads))

    def answered(self, route: str, model: str, tenant: str, status: str, seconds: float) -> None:
        """One request ended towards its client."""
        self._requests(route, model, tenant, status).inc()
        self._seconds(route, model, tenant).observe(seconds)

    def upstream_failed(self, model: str, kind: str) -> None:
        """An engine failed: connect, broken, timeout or server_error."""
        self._upstream(model, kind).inc()

    def gap(self, model: str, seconds: float) -> None:
        """Time between two chunks of an answer."""
        self._gaps.observe(model, seconds)

    @contextmanager
    def accepted(self, exchange: Accepted, tenant: str, stream: bool) -> Iterator[None]:
        """Around a relayed request: counts it as accepted and, whatever happens, once as ended."""
        labels = (exchange.model, tenant)
        self._accepted(*labels).inc()
        self._bytes_in(*labels).inc(len(exchange.body))
        in_flight = self._in_flight(*labels)
        in_flight.inc()
        try:
            yield
        finally:
            in_flight.dec()
            outcome = exchange.outcome
            if outcome != "completed" and exchange.client_left:
                outcome = "cancelled"
            self._finished(*labels, outcome).inc()
            self._bytes_out(*labels).inc(exchange.sent_bytes)
            if exchange.cut:
                self._cut(exchange.model).inc()
            if stream and exchange.first_byte_s is not None:
                self._ttft(*labels).observe(exchange.first_byte_s - exchange.started_s)


class _Gaps(Collector):
    """The one histogram that is observed per chunk: counts by bisection, no lock (one event loop writes).

    The library's own histogram scans its buckets one by one and takes a lock for each value it writes.
    """

    def __init__(self) -> None:
        self._row = spec("galerne_inter_chunk_seconds")
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float) -> None:
        counts = self._counts.get(model)
        if counts is None:
            counts = self._counts[model] = [0] * (len(self._row.buckets) + 1)
            self._sums[model] = 0.0
        counts[bisect_left(self._row.buckets, seconds)] += 1
        self._sums[model] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._row.name, self._row.help, labels=self._row.labels)
        bounds = [*(str(float(bound)) for bound in self._row.buckets), "+Inf"]
        for model, counts in tuple(self._counts.items()):
            family.add_metric([model], list(zip(bounds, accumulate(counts), strict=True)), self._sums[model])
        yield family


class _ReplicaCollector(Collector):
    def __init__(self, loads: Loads) -> None:
        self._loads = loads

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ready, load = _family("galerne_replicas_ready"), _family("galerne_replica_in_flight")
        for model, replicas in self._loads.snapshot().items():
            ready.add_metric([model], self._loads.ready(model))
            for replica, in_flight in replicas.items():
                load.add_metric([model, replica], in_flight)
        yield ready
        yield load


def _family(name: str) -> GaugeMetricFamily:
    row = spec(name)
    return GaugeMetricFamily(row.name, row.help, labels=row.labels)
