"""A report in a terminal or a log: the verdict first, then the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.reports.model import ReportRun
from loadtest.reports.rows import compared, figure_rows, heads, target_rows, unserved
from loadtest.reports.text import visible
from loadtest.reports.verdict import State, judge

_STYLES = {State.MET: "bold green", State.NOT_MET: "bold red", State.INVALID: "bold yellow"}
_KINDS = {"good": "green", "bad": "red", "": ""}


def tables(run: ReportRun) -> Iterator[RenderableType]:
    """The run, part by part."""
    verdict = judge(run)
    if run.simulated:
        yield Text("SIMULATED: the engines computed nothing", style="bold yellow")
    yield _table(run.name, heads(), [[Text(cell) for cell in row] for row in figure_rows(run)])
    lost = unserved(run)
    if lost:
        rows = [[Text(one.kind), Text(f"{one.count:,}"), Text(one.detail)] for one in lost]
        yield _table("not served", ["kind", "requests", "the first one"], rows)
    if verdict.lines:
        rows = [
            [*map(Text, row[:-1]), Text(row[-1], style="green" if met else "red")] for row, met in target_rows(verdict)
        ]
        yield _table("targets", ["target", "limit", "measured", ""], rows)
    yield Text(f"verdict: {verdict.state.value}", style=_STYLES[verdict.state])
    for reason in verdict.reasons:
        yield Text(f"  {visible(reason)}")


def comparison(runs: Sequence[ReportRun]) -> RenderableType:
    """Several runs against the first."""
    rows = [[Text(label), *(Text(text, style=_KINDS[kind]) for text, kind in cells)] for label, cells in compared(runs)]
    states = [judge(run).state for run in runs]
    rows.append([Text("verdict"), *(Text(state.value, style=_STYLES[state]) for state in states)])
    shown = _table("compared with the first run", ["", *(run.name for run in runs)], rows)
    if any(run.simulated for run in runs):
        return Group(Text("SIMULATED: the engines computed nothing", style="bold yellow"), shown)
    return shown


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    built = Table(title=Text(visible(title)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        built.add_column(
            Text(visible(name)), justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0
        )
    for row in rows:
        built.add_row(*row)
    return built
