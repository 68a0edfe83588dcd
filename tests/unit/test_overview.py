"""`galerne status`: what it reads of engines and gateways, and how it stands on a terminal."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from rich.console import Console

from serving.cli.overview import ModelRow, read, view
from serving.metrics.table import TABLE

DOCUMENT: dict[str, Any] = {
    "url": "http://127.0.0.1:8000",
    "models": {"m": "generate", "sleeps": "generate"},
    "gateways": [{"metrics_port": 1}, {"metrics_port": 2}],
    "engines": {"m": [{"replica_id": "r", "host": "h", "port": 3}, {"replica_id": "s", "host": "h", "port": 4}]},
}


def gateway(ejected: int, held: int, oldest_s: float, cut: int, shed: int, in_flight: int) -> str:
    rows = {
        'galerne_replica_in_flight{model="m",replica="r"}': in_flight,
        'galerne_replicas_ejected{model="m"}': ejected,
        'galerne_requests_held{model="m",tenant="a"}': held,
        'galerne_requests_held{model="m",tenant="b"}': held,
        'galerne_requests_held{model="sleeps",tenant="none"}': 0,
        'galerne_held_oldest_seconds{model="m"}': oldest_s,
        'galerne_streams_cut_total{model="m"}': cut,
        'galerne_requests_shed_total{reason="memory"}': 0,
        'galerne_requests_shed_total{reason="requests"}': shed,
    }
    return "".join(f"{name} {value}\n" for name, value in rows.items())


TEXTS = {
    "http://127.0.0.1:1/metrics": gateway(1, 2, 0.5, 3, 10, 3),
    "http://127.0.0.1:2/metrics": gateway(0, 1, 4.0, 1, 2, 1),
    "http://h:3/metrics": "vllm:num_requests_running 2\n",
    "http://h:4/metrics": "",
}


def shown(document: dict[str, Any], texts: dict[str, str]) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(view(document, read(document, texts.__getitem__)))
    return out.getvalue()


def test_it_reads_what_engines_and_gateways_say() -> None:
    found = read(DOCUMENT, TEXTS.__getitem__)
    replica, silent = found.replicas
    assert (replica.replica, replica.in_flight, replica.running, replica.waiting) == ("r", 4, 2.0, None)
    assert (silent.replica, silent.in_flight, silent.running) == ("s", 0, None)
    # Held and cut are sums; of ejected replicas, what the gateway has that ejected most.
    assert found.models == (ModelRow("m", 2, 1, 6, 4.0, 4), ModelRow("sleeps", 0, 0, 0, 0.0, 0))
    assert found.shed == {"requests": 12}
    assert asdict(found)["models"][0]["streams_cut"] == 4


def test_a_cluster_whose_gateways_are_silent_is_unknown_and_not_fine() -> None:
    found = read(DOCUMENT, dict.fromkeys(TEXTS, "").__getitem__)
    assert found.models[0] == ModelRow("m", 2, None, None, None, None)
    lines = shown(DOCUMENT, dict.fromkeys(TEXTS, "")).splitlines()
    assert [cell.strip() for cell in next(li for li in lines if "│ m " in li).split("│")[2:-1]] == ["2", *"????"]


def test_its_tables_fit_a_terminal_and_say_what_is_wrong() -> None:
    text = shown(DOCUMENT, TEXTS)
    assert "ejected" in text
    assert "streams cut" in text
    assert "requests shed since gateways started: requests 12" in text
    assert "none ready" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "shed" not in shown(
        DOCUMENT, TEXTS | {f"http://127.0.0.1:{n}/metrics": gateway(0, 0, 0, 0, 0, 0) for n in (1, 2)}
    )


def test_its_metrics_are_in_the_table() -> None:
    names = {row.name for row in TABLE}
    assert {line.split("{")[0].removesuffix("_total") for line in gateway(0, 0, 0, 0, 0, 0).splitlines()} <= names
