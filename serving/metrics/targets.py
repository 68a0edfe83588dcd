"""Serves a gateway's metrics, and beside them the list of what else Prometheus should scrape (its HTTP discovery).

Engines listen on free ports, which only Serve knows. On one machine `galerne serve` writes them to a file; in a cluster
any gateway tells them here, in the same form and with the same labels, so that the same rules hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, make_wsgi_app

from serving.metrics.release import LABEL

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PATH: Final = "/targets"
GATEWAY_JOB: Final = "galerne-gateway"
ENGINE_JOB: Final = "vllm"
HAPROXY_JOB: Final = "haproxy"
AUTOSCALER_JOB: Final = "galerne-autoscaler"


def row(host: str, port: int, job: str, release: str, **labels: str) -> dict[str, Any]:
    """A target in Prometheus' file_sd and http_sd form; a release without a name has no label for it."""
    named = {LABEL: release} if release else {}
    return {"targets": [f"{_bracketed(host)}:{port}"], "labels": {"job": job} | named | labels}


def gateway_row(host: str, port: int, release: str = "") -> dict[str, Any]:
    """A gateway's metrics."""
    return row(host, port, GATEWAY_JOB, release)


def engine_row(host: str, port: int, model: str, replica: str, release: str = "") -> dict[str, Any]:
    """An engine's metrics."""
    return row(host, port, ENGINE_JOB, release, model=model, replica=replica)


def app(registry: CollectorRegistry, rows: Callable[[], list[dict[str, Any]]]) -> WSGIApplication:
    """Metrics on every path but `/targets`, which is `rows()` as JSON."""
    metrics: WSGIApplication = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            return metrics(environ, start_response)
        body = json.dumps(rows()).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
