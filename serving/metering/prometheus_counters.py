"""Engines' counters of tokens out of Prometheus: every scrape of a window, in parts that an answer has room for."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from serving.autoscaling.signals import Fetch, fetch_http
from serving.errors import ClusterError
from serving.metering.reconcile import COMPLETION, PROMPT
from serving.metering.scrapes import Follower, Increase
from serving.metrics.release import LABEL, scope
from serving.metrics.rules import ENGINE_JOB

_OF_ENGINES: Final = f'job="{ENGINE_JOB}"'
RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
# 120 scrapes of four series: 15 KB a replica of one rank.
PART_S: Final = 600
# After the window's end it is looked this far whether what was under way has ended.
AFTER_S: Final = 600
# Without a scrape for so long before the window's end a replica is gone.
GONE_S: Final = 300
TIMEOUT_S: Final = 30.0


@dataclass(slots=True)
class Scrape:
    """One scrape of one replica: counters by series, and the requests that run or wait."""

    at_s: float
    replica: str
    prompt: dict[str, float] = field(default_factory=dict)
    completion: dict[str, float] = field(default_factory=dict)
    under_way: float = 0.0


class Counters:
    """One Prometheus; raises ClusterError where it does not answer as expected."""

    def __init__(self, url: str, match: str = "", fetch: Fetch = fetch_http) -> None:
        """`match`: further matchers of PromQL, such as `namespace="galerne"`, where several clusters are scraped."""
        self._url = url.rstrip("/")
        self._match = match.strip().strip(",")
        self._fetch = fetch

    def releases(self, from_s: float, until_s: float) -> tuple[str, ...]:
        """Names of the releases whose engines were scraped in a window; "" is one without a name."""
        selected = f"{{{','.join(part for part in (_OF_ENGINES, self._match) if part)}}}"
        scraped = f"present_over_time(up{selected}[{round((until_s - from_s) * 1000)}ms])"
        return tuple(sorted(scope(row["metric"]) for row in self._query(f"group by ({LABEL}) ({scraped})", until_s)))

    def increases(self, from_s: float, until_s: float, now_s: float) -> dict[str, Increase]:
        """By replica, what it counted; of replicas that were scraped within the window."""
        followers: dict[str, Follower] = {}
        for scrape in self._scrapes(from_s, min(until_s + AFTER_S, now_s)):
            follower = followers.setdefault(scrape.replica, Follower(until_s))
            follower.scrape(scrape.at_s, scrape.prompt, scrape.completion, scrape.under_way)
        found = {
            replica: follower.increase(gone=until_s - follower.last_s > GONE_S)
            for replica, follower in followers.items()
        }
        return {replica: increase for replica, increase in sorted(found.items()) if increase is not None}

    def rows_behind(self) -> int:
        """Rows that wait at gateways for the database, by their last scrape."""
        selected = f"{{{self._match}}}" if self._match else ""
        rows = self._query(f"sum(galerne_ledger_rows_behind{selected})", None)
        return sum(int(float(row["value"][1])) for row in rows)

    def _scrapes(self, from_s: float, until_s: float) -> Iterator[Scrape]:
        names = "|".join((PROMPT, COMPLETION, RUNNING, WAITING))
        selector = f'{{__name__=~"{names}",job="{ENGINE_JOB}"{"," if self._match else ""}{self._match}}}'
        begin_s = from_s
        while begin_s < until_s:
            end_s = min(begin_s + PART_S, until_s)
            rows = self._query(f"{selector}[{round((end_s - begin_s) * 1000)}ms]", end_s)
            # Whether the left end belongs to a range differs between versions of Prometheus.
            yield from read(rows, begin_s)
            begin_s = end_s

    def _query(self, query: str, at_s: float | None) -> list[Any]:
        fields = {"query": query} | ({} if at_s is None else {"time": f"{at_s:.3f}"})
        try:
            return _result(self._fetch(f"{self._url}/api/v1/query?{urllib.parse.urlencode(fields)}", TIMEOUT_S))
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise ClusterError(f"Prometheus does not answer as expected: {type(error).__name__}: {error}") from None


def _result(body: bytes) -> list[Any]:
    answer = json.loads(body)
    if answer["status"] != "success" or answer.get("warnings"):
        raise ValueError("it reports an error or an incomplete answer")
    result = answer["data"]["result"]
    if not isinstance(result, list):
        raise TypeError("its result is no list")
    return result


def read(rows: list[Any], after_s: float) -> list[Scrape]:
    """Scrapes out of a matrix, in the order of time, those after a moment; a scrape without counters is none."""
    found: dict[tuple[float, str], Scrape] = {}
    for row in rows:
        labels = dict(row["metric"])
        name, replica = labels.pop("__name__"), labels.get("replica", "")
        series = json.dumps(labels, sort_keys=True)
        for at, value in row["values"]:
            at_s = float(at)
            if at_s <= after_s:
                continue
            scrape = found.setdefault((at_s, replica), Scrape(at_s, replica))
            if name == PROMPT:
                scrape.prompt[series] = float(value)
            elif name == COMPLETION:
                scrape.completion[series] = float(value)
            else:
                scrape.under_way += float(value)
    return sorted((s for s in found.values() if s.prompt or s.completion), key=lambda s: (s.at_s, s.replica))
