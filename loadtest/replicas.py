"""Replicas over a run's time, read from Prometheus after its end."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import datetime, timedelta
from urllib.parse import urlencode, urlsplit

from loadtest.errors import LoadtestError
from loadtest.reports.model import ReplicaCount

QUERY = "max by (model) (galerne_replicas_ready)"
# What the autoscaler asked for.
TARGETS = "max by (model) (galerne_autoscaler_target_replicas)"
# As many points as a plot can show; never finer than Prometheus scrapes.
_MOST_POINTS = 300
_LEAST_STEP_S = 1.0
_TIMEOUT_S = 10.0


def read(url: str, began: datetime, length_s: float, expression: str = QUERY) -> list[ReplicaCount]:
    """Ready replicas of every model from `began` on, as a Prometheus at http(s)://HOST:PORT has them.

    `expression` may ask for another count by model.

    Raises LoadtestError where it does not answer, or has nothing.
    """
    if urlsplit(url).scheme not in {"http", "https"}:
        raise LoadtestError(f"{url!r} is no Prometheus; give http://HOST:PORT")
    query = urlencode(
        {
            "query": expression,
            "start": began.timestamp(),
            "end": (began + timedelta(seconds=length_s)).timestamp(),
            "step": max(_LEAST_STEP_S, length_s / _MOST_POINTS),
        }
    )
    try:
        # The scheme was checked above.
        with urllib.request.urlopen(  # noqa: S310
            f"{url.rstrip('/')}/api/v1/query_range?{query}", timeout=_TIMEOUT_S
        ) as answer:
            found = json.load(answer)["data"]["result"]
        counts = [
            ReplicaCount(at - began.timestamp(), series["metric"].get("model", ""), int(float(value)))
            for series in found
            for at, value in series["values"]
        ]
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as problem:
        raise LoadtestError(f"Prometheus at {url} did not answer the query: {problem}") from problem
    if not counts:
        raise LoadtestError(f"Prometheus at {url} has no sample of {expression}; does it scrape the cluster?")
    return counts
