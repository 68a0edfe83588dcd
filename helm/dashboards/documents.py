"""The generated files as Grafana reads them: their panels, and their queries with every variable filled in.

Tests and pictures go through it, so that what they see is what is shipped and not what it was generated from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

DIRECTORY: Final = Path(__file__).parents[1] / "galerne" / "dashboards"
_VARIABLE: Final = re.compile(r"\$\{?([A-Za-z_]+)\}?")


@dataclass(frozen=True, slots=True)
class ShownQuery:
    """A panel's query, ready for Prometheus; `instant`: one value now, not a line."""

    expr: str
    legend: str
    instant: bool


@dataclass(frozen=True, slots=True)
class ShownPanel:
    """A panel as the file has it; `place` is x, y, width and height on a grid of 24 columns."""

    title: str
    kind: str
    unit: str
    description: str
    place: tuple[int, int, int, int]
    queries: tuple[ShownQuery, ...]
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShownDashboard:
    """A dashboard's file; rows are panels of kind `row`."""

    uid: str
    title: str
    panels: tuple[ShownPanel, ...]
    document: Mapping[str, Any]


def read(range_s: int, window_s: int, **values: str) -> tuple[ShownDashboard, ...]:
    """Every file, its queries over so long a range; `values` replaces other variables (all: their value for All)."""
    return tuple(
        _dashboard(json.loads(path.read_text()), range_s, window_s, values) for path in sorted(DIRECTORY.glob("*.json"))
    )


def filled(expr: str, values: Mapping[str, str]) -> str:
    """A query without variables; KeyError where one has no value."""
    return _VARIABLE.sub(lambda found: values[found[1]], expr)


def _dashboard(document: dict[str, Any], range_s: int, window_s: int, values: Mapping[str, str]) -> ShownDashboard:
    known = {v["name"]: str(v.get("allValue") or "") for v in document["templating"]["list"] if v["type"] == "query"}
    known |= {"__range": f"{range_s}s", "__rate_interval": f"{window_s}s"} | dict(values)
    panels = tuple(_panels(document["panels"], known))
    return ShownDashboard(document["uid"], document["title"], panels, document)


def _panels(documents: list[dict[str, Any]], values: Mapping[str, str]) -> Iterator[ShownPanel]:
    for one in documents:
        place = one["gridPos"]
        yield ShownPanel(
            one["title"],
            one["type"],
            one.get("fieldConfig", {}).get("defaults", {}).get("unit", ""),
            one.get("description", ""),
            (place.get("x", 0), place.get("y", 0), place["w"], place["h"]),
            tuple(
                ShownQuery(filled(t["expr"], values), t["legendFormat"], bool(t.get("instant")))
                for t in one.get("targets", ())
            ),
            one,
        )
        yield from _panels(one.get("panels") or [], values)
