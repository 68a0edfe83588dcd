"""One row of the table of metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which process exports a row.
Exporter = Literal["gateway", "autoscaler"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: `labels` in the order in which values are given."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    at_scrape: bool = False  # read from live state when scraped, not recorded
    exporter: Exporter = "gateway"
