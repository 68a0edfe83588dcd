"""`galerne status`: models, replicas and queues of the cluster on this machine, from its own metrics.

It reads the state file and scrapes the listed endpoints; it opens no Ray connection, so it answers in
milliseconds and also while Ray is in trouble.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.table import Table

SCRAPE_TIMEOUT_S = 2.0
Fetch = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One line of the replicas' table; None where the replica did not answer."""

    model: str
    replica: str
    address: str
    in_flight: int
    running: float | None
    waiting: float | None
    kv_use: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the models' table: what gateways say of a model; None where none of them answered.

    Each gateway judges replicas by itself: `ejected` is what the one has that ejected most. The rest are sums;
    `streams_cut` counts since gateways started.
    """

    model: str
    ready: int
    ejected: int | None
    held: int | None
    oldest_s: float | None
    streams_cut: int | None


@dataclass(frozen=True, slots=True)
class Overview:
    """What `galerne status` shows; `shed`: requests that gateways refused since they started, by why."""

    replicas: tuple[ReplicaRow, ...]
    models: tuple[ModelRow, ...]
    shed: Mapping[str, int]


def fetch(url: str) -> str:
    """Text of a metrics endpoint on this machine; "" where it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as response:  # noqa: S310 - loopback http
            content: bytes = response.read()
    except (urllib.error.URLError, OSError):
        return ""
    return content.decode()


def read(document: dict[str, Any], get: Fetch = fetch) -> Overview:
    """The cluster of a state document, as its endpoints tell it now."""
    gateways = [_Scrape(get(f"http://127.0.0.1:{gateway['metrics_port']}/metrics")) for gateway in document["gateways"]]
    answering = [gateway for gateway in gateways if gateway.samples]
    shed: dict[str, int] = {}
    for gateway in answering:
        for labels, value in gateway.of("galerne_requests_shed_total"):
            shed[labels["reason"]] = shed.get(labels["reason"], 0) + int(value)
    return Overview(
        tuple(_replica(model, engine, answering, get) for model, engine in _engines(document)),
        tuple(_model(model, len(document["engines"].get(model, ())), answering) for model in document["models"]),
        {reason: count for reason, count in sorted(shed.items()) if count},
    )


def view(document: dict[str, Any], found: Overview) -> Group:
    """The overview as tables; a model without replicas has a line that says so."""
    return Group(_models(document, found), _replicas(document, found.replicas))


class _Scrape:
    """One endpoint's samples, parsed once."""

    def __init__(self, text: str) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def of(self, name: str) -> list[tuple[dict[str, str], float]]:
        return self.samples.get(name, [])

    def sum(self, name: str, **labels: str) -> float | None:
        """Of the samples with these labels; None where there is none."""
        values = [value for found, value in self.of(name) if labels.items() <= found.items()]
        return sum(values) if values else None


def _engines(document: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((model, engine) for model in document["models"] for engine in document["engines"].get(model, ()))


def _replica(model: str, engine: dict[str, Any], gateways: list[_Scrape], get: Fetch) -> ReplicaRow:
    name, address = engine["replica_id"], f"{engine['host']}:{engine['port']}"
    said = _Scrape(get(f"http://{address}/metrics"))
    in_flight = (gateway.sum("galerne_replica_in_flight", model=model, replica=name) for gateway in gateways)
    return ReplicaRow(
        model,
        name,
        address,
        int(sum(count or 0 for count in in_flight)),
        said.sum("vllm:num_requests_running"),
        said.sum("vllm:num_requests_waiting"),
        said.sum("vllm:kv_cache_usage_perc"),
    )


def _model(model: str, ready: int, gateways: list[_Scrape]) -> ModelRow:
    def of_each(name: str) -> list[float]:
        return [gateway.sum(name, model=model) or 0.0 for gateway in gateways]

    if not gateways:
        return ModelRow(model, ready, None, None, None, None)
    return ModelRow(
        model,
        ready,
        int(max(of_each("galerne_replicas_ejected"))),
        int(sum(of_each("galerne_requests_held"))),
        max(of_each("galerne_held_oldest_seconds")),
        int(sum(of_each("galerne_streams_cut_total"))),
    )


def _models(document: dict[str, Any], found: Overview) -> Table:
    table = Table(title=f"Galerne at {document['url']}: {len(document['gateways'])} gateway replica(s)")
    table.add_column("model")
    for name in ("ready", "ejected", "held", "oldest held", "streams cut"):
        table.add_column(name, justify="right")
    for row in found.models:
        oldest = _count(row.oldest_s)
        table.add_row(
            row.model,
            str(row.ready),
            _notable(row.ejected),
            _count(row.held),
            oldest if row.oldest_s is None else f"{oldest} s",
            _notable(row.streams_cut),
        )
    if found.shed:
        whys = ", ".join(f"{reason} {count}" for reason, count in found.shed.items())
        table.caption = f"[yellow]requests shed since gateways started: {whys}[/]"
    return table


def _replicas(document: dict[str, Any], rows: Iterable[ReplicaRow]) -> Table:
    table = Table()
    for name in ("model", "replica", "address"):
        table.add_column(name)
    for name in ("in flight", "running", "waiting", "KV cache"):
        table.add_column(name, justify="right")
    by_model: dict[str, list[ReplicaRow]] = {model: [] for model in document["models"]}
    for row in rows:
        by_model[row.model].append(row)
    for model, replicas in by_model.items():
        if not replicas:
            table.add_row(model, "[yellow]none ready[/]", "", "", "", "", "")
        for row in replicas:
            kv = "?" if row.kv_use is None else f"{row.kv_use:.1%}"
            table.add_row(
                model,
                row.replica,
                row.address,
                str(row.in_flight),
                _count(row.running),
                _count(row.waiting),
                kv,
            )
    return table


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _notable(value: int | None) -> str:
    return f"[yellow]{value}[/]" if value else _count(value)
