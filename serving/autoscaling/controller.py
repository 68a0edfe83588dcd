"""What the policies of one controller process share: the reader of signals, and the port where decisions are seen.

Ray Serve's controller has no HTTP server of ours, and Ray's metrics agent does not run on a cluster without Ray's
dashboard; decisions are therefore exported by a listener of this process, on the address and port of
`prometheus.scaler_port`. Elsewhere they could only be told second-hand, and not while gateways are gone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import structlog
from prometheus_client import start_http_server

from serving.autoscaling.external import ExternalReader
from serving.autoscaling.live import ModelScaler, Read
from serving.autoscaling.signals import SignalReader, query_of
from serving.autoscaling.snapshot import Signal
from serving.config import ModelConfig, PrometheusConfig
from serving.metrics.autoscaler import AutoscalerMetrics

log = structlog.get_logger("galerne.autoscaler")

_lock = threading.Lock()
_metrics: AutoscalerMetrics | None = None
_readers: dict[tuple[PrometheusConfig, str], SignalReader] = {}


def scaler(
    model: ModelConfig, prometheus: PrometheusConfig | None, metrics_host: str, release: str = ""
) -> ModelScaler:
    """The policy of a model of a release; without a Prometheus it knows nothing, and holds."""
    with _lock:
        metrics = _exported(metrics_host, None if prometheus is None else prometheus.scaler_port)
        if prometheus is None:
            log.warning("no prometheus: the scale is held", model=model.id)
            return ModelScaler(model, _nothing, metrics)
        reader = _readers.get((prometheus, release))
        if reader is None:
            reader = SignalReader(prometheus.url, prometheus.query_timeout_s, query=query_of(release))
            _readers[prometheus, release] = reader
        return ModelScaler(model, _read(model, prometheus, reader), metrics)


def _read(model: ModelConfig, prometheus: PrometheusConfig, reader: SignalReader) -> Read:
    """The model's signals, and what something else wants where the configuration names it."""
    external = None if model.autoscaling is None else model.autoscaling.external
    if external is None:
        return reader.signals
    other = ExternalReader(prometheus.url, prometheus.query_timeout_s, external)
    return lambda model_id: {**reader.signals(model_id), **other.signals()}


def _nothing(_: str) -> Mapping[str, Signal]:
    return {}


def _exported(host: str, port: int | None) -> AutoscalerMetrics:
    global _metrics  # noqa: PLW0603 - one registry and one listener a process, however often policies are made
    if _metrics is None:
        _metrics = AutoscalerMetrics()
        if port is not None:
            try:
                start_http_server(port, host, registry=_metrics.registry)
            except OSError as error:
                log.warning("decisions are not scraped", host=host, port=port, error=str(error))
    return _metrics
