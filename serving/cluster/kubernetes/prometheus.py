"""Prometheus as an operator's commands ask it: at an address, or through the API server's proxy to a service.

An answer that is partial, late or no answer is no answer: callers get None and a sentence why, and say so.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from serving.autoscaling.signals import fetch_http
from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.resources import SERVICES
from serving.errors import ClusterError, KubernetesError

TIMEOUT_S: Final = 10.0
SERVICE: Final = "service:"
_PATH: Final = "api/v1/query"


@dataclass(frozen=True, slots=True)
class Sample:
    """One series' value now."""

    labels: Mapping[str, str]
    value: float


class Prometheus:
    """Instant queries; `problem` says why the newest failed, "" where it did not."""

    def __init__(self, fetch: Callable[[str], bytes]) -> None:
        """`fetch(query)` gives the body of Prometheus' answer."""
        self._fetch = fetch
        self.problem = ""

    def raw(self, query: str) -> bytes | None:
        """The body of an answer as it came."""
        try:
            body = self._fetch(query)
        except (OSError, ValueError, http.client.HTTPException, KubernetesError) as error:
            self.problem = f"Prometheus does not answer: {error}"[:300]
            return None
        self.problem = ""
        return body

    def query(self, query: str) -> list[Sample] | None:
        """Finite values of the series; [] where there is none, None where the answer cannot be believed."""
        body = self.raw(query)
        if body is None:
            return None
        try:
            return _parsed(body)
        except (ValueError, KeyError, TypeError) as error:
            self.problem = f"Prometheus' answer cannot be used: {error}"[:300]
            return None


def reach(where: str, client: Client) -> Prometheus:
    """`where`: http(s)://HOST:PORT, or service:NAMESPACE/NAME:PORT; ClusterError for something else."""
    if where.startswith(SERVICE):
        namespace, slash, service = where.removeprefix(SERVICE).partition("/")
        if not namespace or not slash or ":" not in service:
            raise ClusterError(f"{where}: must be service:NAMESPACE/NAME:PORT, as service:monitoring/prometheus:9090")
        return Prometheus(lambda query: client.service(namespace, service, _PATH, {"query": query}, SERVICES))
    if not where.startswith(("http://", "https://")):
        raise ClusterError(f"{where}: Prometheus is at http://HOST:PORT, https://… or service:NAMESPACE/NAME:PORT")
    base = where.rstrip("/")
    return Prometheus(lambda query: fetch_http(f"{base}/{_PATH}?{urllib.parse.urlencode({'query': query})}", TIMEOUT_S))


def _parsed(body: bytes) -> list[Sample]:
    document: Any = json.loads(body)
    if document.get("status") != "success":
        raise ValueError(str(document.get("error") or "no success"))
    if document.get("warnings"):
        raise ValueError("it is incomplete")
    found = []
    for row in document["data"]["result"]:
        value = float(row["value"][1])
        if math.isfinite(value):
            found.append(Sample(dict(row["metric"]), value))
    return found
