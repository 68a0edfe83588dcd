"""What a dashboard is made of, before Grafana: facts that its tests and pictures read as well.

Promises: no panel without a unit, a description that says when to worry, and a query; a panel about something that an
alert watches names the alert, and so links to its section of the runbook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from serving.metrics.alerts import ALERTS

# Names of the template variables, and how a query asks for them.
DATASOURCE: Final = "datasource"
MODEL: Final = 'model=~"$model"'
TENANT: Final = 'tenant=~"$tenant"'
# Grafana's own: at least four scrapes, and no less than a pixel of the graph.
WINDOW: Final = "[$__rate_interval]"
# The time that the dashboard shows.
SHOWN: Final = "[$__range]"

# Units as Grafana names them.
SECONDS: Final = "s"
HOURS: Final = "h"
SHARE: Final = "percentunit"
REQUESTS_PER_S: Final = "reqps"
BYTES: Final = "bytes"
BYTES_PER_S: Final = "Bps"
COUNT: Final = "short"
REPLICAS: Final = "suffix: replicas"
REQUESTS: Final = "suffix: requests"
TOKENS: Final = "suffix: tokens"
TOKENS_PER_S: Final = "suffix: tokens/s"
EVENTS_PER_S: Final = "suffix: /s"
TIMES_ALLOWED: Final = "suffix: × allowed"
YES_NO: Final = "bool_yes_no"

FULL_WIDTH: Final = 24
HALF: Final = 12
THIRD: Final = 8
QUARTER: Final = 6
_ALERTS: Final = frozenset(alert.name for alert in ALERTS)

# lines over time; `stacked`: parts of a whole. number: one figure of the time shown. bars: one bar a series, likewise.
Kind = Literal["lines", "stacked", "number", "bars"]


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and what a series of its answer is called."""

    expr: str
    legend: str = "{{model}}"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `worry` is where its value turns red, or, with `worry_below`, up to where."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = "lines"
    width: int = HALF
    worry: float | None = None
    worry_below: bool = False
    alerts: Sequence[str] = ()
    most: float | None = None
    decimals: int | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.alerts) - _ALERTS:
            raise ValueError(f"{self.title}: no alert is called {', '.join(sorted(unknown))}")


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels under it."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard; `by_tenant`: it has the tenant variable too."""

    name: str
    title: str
    description: str
    rows: Sequence[Row]
    by_tenant: bool = False

    @property
    def uid(self) -> str:
        """What links name: stable, so that bookmarks stay."""
        return f"galerne-{self.name}"


def query(expr: str, legend: str = "{{model}}") -> tuple[Query]:
    """The queries of a panel that has one."""
    return (Query(expr, legend),)


def rate(metric: str, by: str, *selectors: str) -> str:
    """The sum of a counter's rates by some labels."""
    return f"sum by ({by}) (rate({metric}{_selected(selectors)}{WINDOW}))"


def grown(metric: str, by: str, *selectors: str) -> str:
    """By how much a counter grew in the time shown."""
    return f"sum by ({by}) (increase({metric}{_selected(selectors)}{SHOWN}))"


def quantile(q: float, histogram: str, by: str, *selectors: str) -> str:
    """A quantile of a histogram; no line where nothing was observed."""
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', f'{by}, le', *selectors)}) >= 0"


def mean(histogram: str, by: str, *selectors: str) -> str:
    """What a histogram observed on average; no line where nothing was observed."""
    return f"{rate(histogram + '_sum', by, *selectors)} / ({rate(histogram + '_count', by, *selectors)} > 0)"


def quantiles(histogram: str, by: str, *selectors: str) -> tuple[Query, ...]:
    """p50, p95 and p99."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return tuple(
        Query(quantile(q, histogram, by, *selectors), f"{legend} p{round(q * 100)}") for q in (0.5, 0.95, 0.99)
    )


def _selected(selectors: Sequence[str]) -> str:
    return f"{{{', '.join(selectors)}}}" if selectors else ""
