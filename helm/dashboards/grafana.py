"""From facts to Grafana's JSON, through its own SDK: the one module that knows either.

Promises: the same facts give the same bytes. Every dashboard has a data source variable (so it is found whatever the
source is called), links to its sisters that carry variables and time along, and the firing alerts as annotations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

from helm.dashboards.panels import DATASOURCE, Dashboard, Kind, Panel, Query
from serving.metrics.alerts import RUNBOOK
from serving.metrics.release import LABEL, scoped

TAG: Final = "galerne"
PROMETHEUS: Final = "prometheus"
PANEL_HEIGHT: Final = 8
NUMBER_HEIGHT: Final = 5
# The least of $__rate_interval, and of a graph's step: as often as the rules are evaluated.
LEAST_STEP: Final = "15s"
ALL: Final = "$__all"
GREEN, RED, BLUE = "green", "red", "blue"
# Where docs/runbook.md is published is the installation's own: the chart sets this variable.
RUNBOOK_VARIABLE: Final = "runbook"

RELEASE_VARIABLE: Final = "release"
# On every selector of every query: what is shown is of one release.
SHOWN_RELEASE: Final = f'{LABEL}="${RELEASE_VARIABLE}"'

_Built = timeseries.Panel | stat.Panel | bargauge.Panel
_SOURCE: Final = model.DataSourceRef(type_val=PROMETHEUS, uid=f"${{{DATASOURCE}}}")


def document(of: Dashboard) -> str:
    """The dashboard as the JSON file that Grafana provisions."""
    return json.dumps(_build(of), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _build(of: Dashboard) -> model.Dashboard:
    built = (
        dashboard.Dashboard(of.title)
        .uid(of.uid)
        .description(of.description)
        .tags([TAG])
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .variables(_variables(by_tenant=of.by_tenant))
        .annotation(_firing())
        .link(_sisters())
    )
    number = 0
    for row in of.rows:
        number += 1
        built.with_row(dashboard.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            built.with_panel(_panel(panel, number))
    return built.build()


def _variables(*, by_tenant: bool) -> list[Builder[model.VariableModel]]:
    found: list[Builder[model.VariableModel]] = [
        dashboard.DatasourceVariable(DATASOURCE)
        .label("Data source")
        .description("The Prometheus that scrapes the cluster and evaluates Galerne's rules.")
        .type(PROMETHEUS),
        _release(),
        _every("model", "Model", "galerne_replicas_ready"),
    ]
    if by_tenant:
        found.append(_every("tenant", "Tenant", "galerne_requests_accepted_total"))
    runbook = dashboard.ConstantVariable(RUNBOOK_VARIABLE).description("Where the runbook is published.").value(RUNBOOK)
    return [*found, runbook]


def _release() -> dashboard.QueryVariable:
    """One, and never all: two releases may have a model of the same name. Where no series has the label it is empty."""
    return (
        dashboard.QueryVariable(RELEASE_VARIABLE)
        .label("Release")
        .description("NAMESPACE/RELEASE of the chart; None: the series have no label galerne_release.")
        .datasource(_SOURCE)
        .query(f"label_values(galerne_build_info, {LABEL})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(False)
        .include_all(False)
    )


def _every(name: str, label: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(f"{label}s of the configuration; All: every one.")
        .datasource(_SOURCE)
        .query(f"label_values({scoped(metric, SHOWN_RELEASE)}, {name})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        # A tenant or model without one would match series that have none.
        .all_value(".+")
        .current(model.VariableOption(selected=True, text="All", value=ALL))
    )


def _firing() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("Firing alerts")
        .datasource(_SOURCE)
        .enable(True)
        .icon_color(RED)
        .expr(scoped('ALERTS{alertname=~"Galerne.+", alertstate="firing"}', SHOWN_RELEASE))
    )


def _sisters() -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink("Galerne")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
    )


def _panel(of: Panel, number: int) -> _Built:
    panel = _DRAWN[of.kind](of)
    panel.id(number).title(of.title).description(_description(of)).datasource(_SOURCE).unit(of.unit).span(of.width)
    panel.thresholds(_thresholds(of)).links([_runbook(alert) for alert in of.alerts])
    panel.min(0)
    if of.most is not None:
        panel.max(of.most)
    if of.decimals is not None:
        panel.decimals(of.decimals)
    over_time = of.kind in {"lines", "stacked"}
    for index, one in enumerate(of.queries):
        panel.with_target(_target(one, chr(ord("A") + index), over_time=over_time))
    return panel


def _lines(of: Panel) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .height(PANEL_HEIGHT)
        .interval(LEAST_STEP)
        .line_width(1)
        .fill_opacity(8)
        .show_points(common_model.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_model.LegendDisplayMode.TABLE)
            .placement(common_model.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_model.TooltipDisplayMode.MULTI)
            .sort(common_model.SortOrder.DESCENDING)
        )
    )
    if of.worry is not None:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.DASHED))
    return panel


def _stacked(of: Panel) -> timeseries.Panel:
    return (
        _lines(of).fill_opacity(35).stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL).group("A"))
    )


def _number(_: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .height(NUMBER_HEIGHT)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .color_mode(common_model.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _bars(_: Panel) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .height(PANEL_HEIGHT)
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .display_mode(common_model.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


_DRAWN: Final[Mapping[Kind, Callable[[Panel], _Built]]] = {
    "lines": _lines,
    "stacked": _stacked,
    "number": _number,
    "bars": _bars,
}


def _thresholds(of: Panel) -> dashboard.ThresholdsConfig:
    calm = BLUE if of.worry is None else RED if of.worry_below else GREEN
    steps = [model.Threshold(value=None, color=calm)]
    if of.worry is not None:
        steps.append(model.Threshold(value=of.worry, color=GREEN if of.worry_below else RED))
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _description(of: Panel) -> str:
    if not of.alerts:
        return of.description
    return f"{of.description}\n\nRunbook: {', '.join(f'{RUNBOOK}#{alert.lower()}' for alert in of.alerts)}"


def _runbook(alert: str) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(f"Runbook: {alert}")
        .type(model.DashboardLinkType.LINK)
        .url(f"${{{RUNBOOK_VARIABLE}}}#{alert.lower()}")
        .target_blank(True)
    )


def _target(of: Query, ref_id: str, *, over_time: bool) -> prometheus.Dataquery:
    target = (
        prometheus.Dataquery()
        .expr(scoped(of.expr, SHOWN_RELEASE))
        .legend_format(of.legend)
        .ref_id(ref_id)
        .datasource(_SOURCE)
    )
    return target.range() if over_time else target.instant()


def files(of: Sequence[Dashboard]) -> dict[str, str]:
    """The files of some dashboards: name and content."""
    return {f"{one.uid}.json": document(one) for one in of}
