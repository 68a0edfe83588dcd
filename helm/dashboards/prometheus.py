"""Asking Prometheus what Grafana would: a line over time, or the value of now."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from helm.dashboards.documents import ShownQuery

TIMEOUT_S: Final = 30


@dataclass(frozen=True, slots=True)
class Answered:
    """A series: what it is called by the panel's legend, and its points (time, value), numbers only."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """The time that is shown, seconds since 1970, and its step."""

    start_s: float
    end_s: float
    step_s: float


class Prometheus:
    """One server's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def ask(self, query: ShownQuery, span: Span) -> tuple[Answered, ...]:
        """The series of a query; raises OSError, and ValueError for what Prometheus refuses."""
        if query.instant:
            rows = self._get("query", {"query": query.expr, "time": str(span.end_s)})
        else:
            asked = {"start": str(span.start_s), "end": str(span.end_s), "step": str(span.step_s)}
            rows = self._get("query_range", {"query": query.expr} | asked)
        found = []
        for row in rows:
            values = [row["value"]] if query.instant else row["values"]
            points = tuple((float(at), float(value)) for at, value in values if math.isfinite(float(value)))
            found.append(Answered(_named(query.legend, row["metric"]), points))
        return tuple(found)

    def value(self, expr: str) -> float | None:
        """One number; None where there is none."""
        rows = self._get("query", {"query": expr})
        return float(rows[0]["value"][1]) if rows else None

    def _get(self, call: str, parameters: Mapping[str, str]) -> list[dict[str, Any]]:
        body = urllib.parse.urlencode(parameters).encode()
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{call}", body, timeout=TIMEOUT_S) as answer:  # noqa: S310
                document = json.load(answer)
        except urllib.error.HTTPError as problem:
            raise ValueError(f"{parameters['query']}: {problem.read().decode(errors='replace')}") from problem
        rows: list[dict[str, Any]] = document["data"]["result"]
        return rows


def _named(legend: str, labels: Mapping[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    return legend
