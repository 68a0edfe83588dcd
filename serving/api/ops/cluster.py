"""What Prometheus knows of the whole cluster, for the ops page: read in the background, kept, and never hammered.

It promises that asking never waits and never raises: the newest facts that are there are the answer, with when they
were asked for. Only while somebody looks at the page is Prometheus asked, once in ten seconds at most, however many
pages are open, and a slow answer is waited for by one thread alone.
"""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from serving.autoscaling.signals import Fetch, fetch_http
from serving.metrics import rules
from serving.metrics.release import matcher, scoped

REFRESH_S: Final = 10.0
WINDOW: Final = "1h"
STEP_S: Final = 30
MAX_CHANGES: Final = 20
# Reasons of decisions that leave a target as it is.
HOLDING: Final = frozenset({"steady", "cooldown", "stale"})
# What starts a sleeping model is a request, through Ray Serve itself, before the policy has a word.
WAKE: Final = "wake"
TARGET: Final = "galerne_autoscaler_target_replicas"
DECISIONS: Final = "galerne_autoscaler_decisions_total"
BURN: Final = rules.burn_record(WINDOW)

# By model: the page's name of a value, and the series it is.
MODEL_SERIES: Final = {
    "arrivals_rps": "model:galerne_arrivals:rate30s",
    "held": "model:galerne_held:sum",
    "running": "model:galerne_running:sum",
    "waiting": "model:galerne_waiting:sum",
    "kv_use": "model:galerne_kv_use:avg",
    "ttft_p95_s": "model:galerne_ttft_seconds:p95_30s",
    "itl_p95_s": "model:galerne_itl_seconds:p95_30s",
    "target": TARGET,
    "stale": "galerne_autoscaler_stale",
}
REPLICA_SERIES: Final = {
    "in_flight": "galerne_replica_in_flight",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_use": "vllm:kv_cache_usage_perc",
}
_NOW: Final = "|".join([*MODEL_SERIES.values(), *REPLICA_SERIES.values(), BURN])
_QUERIES: Final = {
    "now": f'{{__name__=~"{_NOW}"}}',
    "gateways": f'count(up{{job="{rules.GATEWAY_JOB}"}} == 1)',
    "tenants": f'sum by (tenant, status) (increase(galerne_requests_total{{tenant!="none"}}[{WINDOW}]))',
    "prompt_tokens": f"sum by (model) (increase(vllm:prompt_tokens_total[{WINDOW}]))",
    "output_tokens": f"sum by (model) (increase(vllm:generation_tokens_total[{WINDOW}]))",
    "decisions": f'{{__name__=~"{TARGET}|{DECISIONS}"}}[{WINDOW}:{STEP_S}s]',
}


def queries(release: str) -> dict[str, str]:
    """What is asked of a release, by the part of the page that it is for."""
    return {name: scoped(expr, matcher(release)) for name, expr in _QUERIES.items()}


@dataclass(frozen=True, slots=True)
class Change:
    """A model's target that changed: when (seconds since the epoch, to half a minute), and why as decisions said."""

    at_s: float
    model: str
    before: int
    after: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything the page shows of the cluster; mappings are empty where nothing is known."""

    asked_at_s: float | None = None
    # Why the newest attempt failed; "" where it did not.
    problem: str = ""
    gateways: int | None = None
    models: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # By model and replica.
    replicas: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    # By model and objective (ttft, itl): share of requests within the target over the last hour.
    attainment: Mapping[tuple[str, str], float] = field(default_factory=dict)
    # By tenant and HTTP status: requests of the last hour.
    tenants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    # By model: reasons of the decisions of the last half minute.
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


NO_CLUSTER: Final = Facts()


class Cluster:
    """The cluster as one Prometheus tells of it."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        fetch: Fetch = fetch_http,
        start: Callable[[Callable[[], None]], None] | None = None,
        *,
        release: str = "",
    ) -> None:
        """`start(refresh)` runs it elsewhere: a thread where absent."""
        self._queries = queries(release)
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._clock = clock
        self._fetch = fetch
        self._start = start or _in_a_thread
        self._asking = threading.Lock()
        self._next_s = -math.inf
        self._facts = replace(NO_CLUSTER, problem="not asked yet")

    def facts(self) -> Facts:
        """The newest facts; has them renewed where they are old and nobody is at it."""
        now_s = self._clock()
        if now_s >= self._next_s and self._asking.acquire(blocking=False):
            self._next_s = now_s + REFRESH_S
            self._start(self._refresh)
        return self._facts

    def _refresh(self) -> None:
        asked_at_s = self._clock()
        try:
            answers = {name: self._ask(query) for name, query in self._queries.items()}
            self._facts = replace(read(answers), asked_at_s=asked_at_s)
        except Exception as error:  # The page outlives whatever an answer holds.
            # Not the error's own words: they may hold the address, with what an operator put into it.
            self._facts = replace(
                self._facts, problem=f"Prometheus does not answer as expected: {type(error).__name__}"
            )
        finally:
            self._asking.release()

    def _ask(self, query: str) -> list[Any]:
        form = urllib.parse.urlencode({"query": query, "timeout": f"{self._timeout_s:g}"})
        answer = json.loads(self._fetch(f"{self._url}/api/v1/query?{form}", self._timeout_s))
        if not isinstance(answer, dict) or answer.get("status") != "success":
            raise ValueError("Prometheus does not report success")
        rows = answer["data"]["result"]
        if not isinstance(rows, list):
            raise TypeError("Prometheus' result is no list")
        return rows


def _in_a_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, name="galerne-ops", daemon=True).start()


def read(answers: Mapping[str, list[Any]]) -> Facts:
    """The facts in the answers to `queries`; raises KeyError, TypeError or ValueError where they have another shape."""
    names = {series: name for name, series in MODEL_SERIES.items()}
    replica_names = {series: name for name, series in REPLICA_SERIES.items()}
    models: dict[str, dict[str, float]] = {}
    replicas: dict[tuple[str, str], dict[str, float]] = {}
    attainment: dict[tuple[str, str], float] = {}
    for labels, value in _values(answers["now"]):
        series, model = labels["__name__"], labels.get("model", "")
        if series in names:
            models.setdefault(model, {})[names[series]] = value
        elif series == BURN:
            attainment[model, labels.get("objective", "")] = 1 - value
        elif series in replica_names:
            # Several gateways have requests on one replica.
            row = replicas.setdefault((model, labels.get("replica", "")), {})
            row[replica_names[series]] = row.get(replica_names[series], 0.0) + value
    tenants: dict[str, dict[str, float]] = {}
    for labels, value in _values(answers["tenants"]):
        tenants.setdefault(labels["tenant"], {})[labels["status"]] = value
    for name in ("prompt_tokens", "output_tokens"):
        for labels, value in _values(answers[name]):
            models.setdefault(labels["model"], {})[name] = value
    gateways = [int(value) for _, value in _values(answers["gateways"])]
    changes, reasons = history(answers["decisions"])
    return Facts(
        gateways=gateways[0] if gateways else None,
        models=models,
        replicas=replicas,
        attainment=attainment,
        tenants=tenants,
        changes=changes,
        reasons=reasons,
    )


def history(rows: list[Any]) -> tuple[tuple[Change, ...], dict[str, tuple[str, ...]]]:
    """Changes of targets, newest first, and each model's newest reasons.

    A target is seen up to a step after its decision was counted, so the reasons are those of two steps.
    """
    targets: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        labels = row["metric"]
        points = [(float(at_s), float(value)) for at_s, value in row["values"]]
        if labels["__name__"] == TARGET:
            targets.setdefault(labels["model"], []).extend(points)
        else:
            counts.setdefault(labels["model"], {}).setdefault(labels["reason"], []).extend(points)
    changes = []
    for model, points in targets.items():
        points.sort()
        for (_, before), (at_s, after) in pairwise(points):
            if before != after:
                risen = _risen(counts.get(model, {}), at_s - 2 * STEP_S, at_s)
                why = tuple(reason for reason in risen if reason not in HOLDING) or ((WAKE,) if before == 0 else ())
                changes.append(Change(at_s, model, int(before), int(after), why))
    newest_s = max((points[-1][0] for points in targets.values() if points), default=0.0)
    reasons = {model: _risen(by_reason, newest_s - STEP_S, newest_s) for model, by_reason in counts.items()}
    changes.sort(key=lambda change: (-change.at_s, change.model))
    return tuple(changes[:MAX_CHANGES]), reasons


def _risen(by_reason: Mapping[str, list[tuple[float, float]]], from_s: float, to_s: float) -> tuple[str, ...]:
    """Reasons whose count rose between two times; one whose series begins there has begun with its first decision."""
    found = []
    for reason, points in by_reason.items():
        before = [value for at_s, value in points if at_s <= from_s]
        within = [value for at_s, value in points if from_s < at_s <= to_s]
        if within and max(within) > (max(before) if before else 0.0):
            found.append(reason)
    return tuple(sorted(found))


def _values(rows: list[Any]) -> list[tuple[dict[str, str], float]]:
    found = ((row["metric"], float(row["value"][1])) for row in rows)
    return [(labels, value) for labels, value in found if math.isfinite(value)]
