"""Tables of `galerne cluster`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from serving.cluster.kubernetes.drain import PodReport
from serving.cluster.kubernetes.findings import Finding, Level
from serving.cluster.kubernetes.status import GroupRow, ModelRow, Status

_STYLES: Final[dict[Level, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
UNKNOWN: Final = "?"


def findings(found: Sequence[Finding], address: str, namespace: str) -> Table:
    """One row a finding; why and fix below what was found."""
    counts = ", ".join(f"{sum(f.level == level for f in found)} {level}" for level in ("ok", "warn", "fail"))
    table = Table(title=f"Preflight of {address}, namespace {namespace}: {counts}", show_lines=False)
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found, why, and what to do", overflow="fold")
    for finding in found:
        text = Text(finding.found)
        for line in (finding.why, f"→ {finding.fix}" if finding.fix else ""):
            if line:
                text.append(f"\n{line}", style="dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), Text(finding.what), text)
    return table


def status(joined: Status, namespace: str) -> Iterator[RenderableType]:
    """Models, groups, notes."""
    yield Text(f"{joined.service} in {namespace}: {joined.summary}")
    table = Table("model", "state", title="models")
    for name in ("ready/wanted", "pods", "restarts", "GPUs", "TTFT kept", "ITL kept"):
        table.add_column(name, justify="right")
    for name in ("decision", "image", "cluster"):
        table.add_column(name, overflow="fold")
    for row in joined.models:
        table.add_row(*_model(row))
    yield table
    groups = Table("cluster", "group", title="pods")
    for name in ("ready/pods", "wanted", "most", "restarts", "GPUs"):
        groups.add_column(name, justify="right")
    groups.add_column("image", overflow="fold")
    groups.add_column("waiting for", overflow="fold")
    for group in joined.groups:
        groups.add_row(*_group(group))
    yield groups
    for note in joined.notes:
        yield Text(f"not seen: {note}", style="yellow")


def drained(reports: Sequence[PodReport]) -> Table:
    """One row a pod."""
    table = Table("pod", "outcome", "waited", "note", title="drained" if reports else "no pods to move")
    for report in reports:
        table.add_row(report.pod, report.outcome, f"{report.waited_s:.0f} s", report.note)
    return table


def _model(row: ModelRow) -> tuple[RenderableType, ...]:
    state = Text(row.state, style="green" if row.state == "HEALTHY" else "bold red")
    if row.message and row.state != "HEALTHY":
        state.append(f"\n{row.message[:120]}", style="dim")
    replicas = "" if row.model == "gateway" else f"{_number(row.ready)}/{_number(row.wanted)}"
    kept = ("", "") if row.model == "gateway" else (_share(row.ttft), _share(row.itl))
    pods = (_number(row.pods), _number(row.restarts), _number(row.gpus))
    return row.model, state, replicas, *pods, *kept, row.decision, ", ".join(row.images), row.cluster


def _group(row: GroupRow) -> tuple[str, ...]:
    counts = (_number(row.wanted), _number(row.most), str(row.restarts), _number(row.gpus))
    return (
        row.cluster,
        row.group,
        f"{row.ready}/{row.pods}",
        *counts,
        ", ".join(row.images),
        "; ".join(row.waiting),
    )


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:g}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"
