"""Every metric the gateway exports: name, kind, labels, unit and meaning, in one place.

vLLM's own metrics (`vllm:*`), Ray's (`ray_*`) and HAProxy's (`haproxy_*`) keep their names; this table holds
what none of them can know: who asked, and what the client waited for. Labels are bounded: tenants and
models come from the configuration, statuses from HTTP, routes from the allow-list; nothing a client sends
becomes a label value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_T = TypeVar("_T")

SECONDS_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
SECONDS_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
NO_TENANT = "none"  # label value before a key was recognised
NO_MODEL = "none"  # label value where a request names no served model


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: `labels` in the order in which values are given."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    at_scrape: bool = False  # read from live state when scraped, not recorded


TABLE: tuple[Spec, ...] = (
    Spec(
        "galerne_requests",
        "counter",
        ("route", "model", "tenant", "status"),
        "Requests answered, by HTTP status; 499: the client left first.",
    ),
    Spec(
        "galerne_requests_accepted",
        "counter",
        ("model", "tenant"),
        "Requests that passed authentication and bounds.",
    ),
    Spec(
        "galerne_requests_finished",
        "counter",
        ("model", "tenant", "outcome"),
        "Accepted requests that ended: completed, rejected, failed or cancelled.",
    ),
    Spec(
        "galerne_requests_in_flight",
        "gauge",
        ("model", "tenant"),
        "Accepted requests not yet ended.",
    ),
    Spec(
        "galerne_time_to_first_token_seconds",
        "histogram",
        ("model", "tenant"),
        "From the request's last byte to the first byte of a streamed answer.",
        SECONDS_LONG,
    ),
    Spec(
        "galerne_inter_chunk_seconds",
        "histogram",
        ("model",),
        "Between two chunks of a streamed answer (with one token a chunk: ITL).",
        SECONDS_SHORT,
        at_scrape=True,
    ),
    Spec(
        "galerne_request_seconds",
        "histogram",
        ("route", "model", "tenant"),
        "From the request's last byte to the answer's last byte.",
        SECONDS_LONG,
    ),
    Spec("galerne_request_bytes", "counter", ("model", "tenant"), "Request body bytes accepted."),
    Spec("galerne_response_bytes", "counter", ("model", "tenant"), "Response body bytes relayed."),
    Spec(
        "galerne_upstream_errors",
        "counter",
        ("model", "kind"),
        "Engine-side failures: connect, broken, timeout, server_error.",
    ),
    Spec("galerne_streams_cut", "counter", ("model",), "Streams that broke off and ended with an error event."),
    Spec(
        "galerne_replicas_ready",
        "gauge",
        ("model",),
        "Engine replicas this gateway may choose from.",
        at_scrape=True,
    ),
    Spec(
        "galerne_replica_in_flight",
        "gauge",
        ("model", "replica"),
        "Requests of this gateway in flight on a replica.",
        at_scrape=True,
    ),
)


def spec(name: str) -> Spec:
    """The table's row of this name; StopIteration where there is none."""
    return next(row for row in TABLE if row.name == name)


class Metrics:
    """The table's metrics on a registry of their own; attributes are named without the `galerne_` prefix."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._by_name: dict[str, Counter | Gauge | Histogram] = {}
        for spec in TABLE:
            if spec.at_scrape:
                continue
            self._by_name[spec.name] = self._create(spec)

    def _create(self, spec: Spec) -> Counter | Gauge | Histogram:
        if spec.kind == "counter":
            return Counter(spec.name, spec.help, spec.labels, registry=self.registry)
        if spec.kind == "gauge":
            return Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
        return Histogram(spec.name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets)

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
