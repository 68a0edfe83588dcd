"""How every benchmark tells its result: a table for people, one JSON file of one form for everything else.

The form: `name`, `when` (UTC), `machine`, `settings`, `cells` (all figures, each a median with its least
and greatest) and `summary` (flat: key to number, null where a cell was invalid).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from loadtest.measures import Cell
from loadtest.processes import Machine
from loadtest.stats import Spread


def write_summary(
    path: Path,
    *,
    name: str,
    when: datetime,
    machine: Machine,
    settings: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float | None],
) -> None:
    """Write a benchmark's file, its folders included; `when` must know its time zone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {
        "name": name,
        "when": when.astimezone(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "settings": dict(settings),
        "cells": list(cells),
        "summary": dict(summary),
    }
    path.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table; the first column is text, all others are figures."""
    built = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, header in enumerate(headers):
        built.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows:
        built.add_row(*row)
    return built


def shown(figure: Spread, digits: int = 1) -> str:
    """The median and, on a second line to keep columns narrow, the range of the repeats."""
    return f"{figure.median:.{digits}f}\n{figure.low:.{digits}f}…{figure.high:.{digits}f}"


def summary_of(cell: Cell, keys: Mapping[str, Spread]) -> dict[str, float | None]:
    """Medians under their summary keys, null where the cell is invalid."""
    return {key: None if cell.invalid else round(figure.median, 4) for key, figure in keys.items()}


def comparison_tables(title: str, cells: Sequence[Cell]) -> list[Table]:
    """What the cells say, as two tables: speed, and what it costs."""
    return [
        table(
            f"{title}: medians, and least…greatest, of the repeats",
            [
                "load",
                "target",
                "tok/s",
                "TTFT p50 ms",
                "TTFT p99 ms",
                "ITL p50 ms",
                "ITL p99 ms",
                "E2E p50 ms",
            ],
            (row for cell in cells for row in _speed_rows(cell)),
        ),
        table(
            f"{title}: gateway against direct, pair by pair",
            ["load", "tok/s ratio", "TTFT p50 added ms", "TTFT p99 added ms", "ITL p50 added ms", "valid"],
            (_compared_row(cell) for cell in cells),
        ),
        table(
            f"{title}: CPU seconds per 1,000 tokens, and shares of processor time",
            ["load", "target", *_groups(cells), "client of a core", "machine", "others"],
            (row for cell in cells for row in _cost_rows(cell, _groups(cells))),
        ),
    ]


def _speed_rows(cell: Cell) -> list[list[str]]:
    keys = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "e2e_p50_ms")
    return [
        [_load(cell), target, shown(figures["tok_s"], 0), *(shown(figures[key]) for key in keys)]
        for target, figures in (("direct", cell.direct), ("gateway", cell.gateway))
    ]


def _compared_row(cell: Cell) -> list[str]:
    compared = cell.compared
    return [
        _load(cell),
        shown(compared["tok_s_ratio"], 3),
        shown(compared["ttft_added_p50_ms"], 2),
        shown(compared["ttft_added_p99_ms"], 2),
        shown(compared["itl_added_p50_ms"], 2),
        "yes" if not cell.invalid else "NO",
    ]


def _cost_rows(cell: Cell, groups: Sequence[str]) -> list[list[str]]:
    shares = ("client_cpu_share", "machine_cpu_share", "other_cpu_share")
    return [
        [
            _load(cell),
            target,
            *(f"{figures[f'{group}_cpu_s_per_1k_tokens'].median:.4f}" for group in groups),
            *(f"{figures[share].median:.0%}" for share in shares),
        ]
        for target, figures in (("direct", cell.direct), ("gateway", cell.gateway))
    ]


def _load(cell: Cell) -> str:
    # The title names the engine already.
    return cell.name.partition(" ")[0]


def _groups(cells: Sequence[Cell]) -> list[str]:
    suffix = "_cpu_s_per_1k_tokens"
    return [key.removesuffix(suffix) for key in cells[0].direct if key.endswith(suffix)] if cells else []
