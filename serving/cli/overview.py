"""`galerne status`: models, replicas and queues of the cluster on this machine, from its own metrics.

It reads the state file and scrapes the listed endpoints; it opens no Ray connection, so it answers in
milliseconds and also while Ray is in trouble.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

SCRAPE_TIMEOUT_S = 2.0
Fetch = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One line of the table; None where the replica did not answer."""

    model: str
    replica: str
    address: str
    in_flight: int
    running: float | None
    waiting: float | None
    kv_use: float | None


def fetch(url: str) -> str:
    """Text of a metrics endpoint on this machine; "" where it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as response:  # noqa: S310 - loopback http
            content: bytes = response.read()
    except (urllib.error.URLError, OSError):
        return ""
    return content.decode()


def rows(document: dict[str, Any], get: Fetch = fetch) -> list[ReplicaRow]:
    """One row per engine replica of the state document."""
    in_flight: dict[tuple[str, str], int] = {}
    for gateway in document["gateways"]:
        text = get(f"http://127.0.0.1:{gateway['metrics_port']}/metrics")
        for labels, value in _samples(text, "galerne_replica_in_flight"):
            key = (labels["model"], labels["replica"])
            in_flight[key] = in_flight.get(key, 0) + int(value)
    found = []
    for model in document["models"]:
        for engine in document["engines"].get(model, ()):
            text = get(f"http://{engine['host']}:{engine['port']}/metrics")
            found.append(
                ReplicaRow(
                    model,
                    engine["replica_id"],
                    f"{engine['host']}:{engine['port']}",
                    in_flight.get((model, engine["replica_id"]), 0),
                    _sum(text, "vllm:num_requests_running"),
                    _sum(text, "vllm:num_requests_waiting"),
                    _sum(text, "vllm:kv_cache_usage_perc"),
                )
            )
    return found


def table(document: dict[str, Any], found: Iterable[ReplicaRow]) -> Table:
    """The rows as a table; a model without replicas has a line that says so."""
    view = Table(title=f"Galerne at {document['url']}: {len(document['gateways'])} gateway replica(s)")
    for name in ("model", "replica", "address"):
        view.add_column(name)
    for name in ("in flight", "running", "waiting", "KV cache"):
        view.add_column(name, justify="right")
    by_model: dict[str, list[ReplicaRow]] = {model: [] for model in document["models"]}
    for row in found:
        by_model[row.model].append(row)
    for model, replicas in by_model.items():
        if not replicas:
            view.add_row(model, "[yellow]none ready[/]", "", "", "", "", "")
        for row in replicas:
            kv = "?" if row.kv_use is None else f"{row.kv_use:.1%}"
            view.add_row(
                model,
                row.replica,
                row.address,
                str(row.in_flight),
                _count(row.running),
                _count(row.waiting),
                kv,
            )
    return view


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]


def _sum(text: str, name: str) -> float | None:
    values = [value for _, value in _samples(text, name)]
    return sum(values) if values else None
