"""The comparison for people: a table in the terminal, a page with plots; every part says that it is simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loadtest.reports.svg import COLOURS, Curve, Guide, Plot, figure
from loadtest.reports.text import escaped
from serving.simulation.comparison import Comparison, Row
from serving.simulation.engine import Floats
from serving.simulation.meter import SCRAPE_S
from serving.simulation.oracle import GOAL
from serving.simulation.traces import Trace

# Points of a curve over time: more than a plot has pixels only weigh.
_POINTS: Final = 360
HEADINGS: Final = (
    "trace",
    "start",
    "policy",
    "attainment",
    "GPU-hours",
    "of oracle",
    "of static",
    "goodput/s",
    "peak",
    "turns/h",
    "to capacity",
    "worst tenant",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under HEADINGS."""
    outcome = row.outcome
    return (
        row.trace,
        f"{row.start_delay_s:g} s",
        row.policy,
        f"{outcome.attainment:.2%}",
        f"{outcome.gpu_hours:,.1f}",
        "–" if row.ratio_to_oracle is None else f"{row.ratio_to_oracle:.2f}",
        "–" if row.ratio_to_static is None else f"{row.ratio_to_static:.2f}",
        f"{outcome.goodput_rps:,.1f}",
        str(outcome.peak_replicas),
        f"{outcome.oscillation_per_h:.1f}",
        f"{outcome.time_to_capacity_s:.0f} s",
        "–" if outcome.worst_tenant is None else f"{outcome.worst_tenant:.1%}",
    )


def preface(comparison: Comparison) -> Iterator[str]:
    """What holds for every figure, a line each."""
    targets = comparison.targets
    own = " + the prompt's own unloaded prefill" if targets.own_prefill else ""
    yield f"SIMULATED. Engine: {comparison.engine}."
    yield (
        f"Served well: first token within {targets.ttft_s:g} s{own}, mean time between tokens at most "
        f"{targets.itl_s:g} s; of all arrivals, rejected ones missed."
    )
    for trace in comparison.traces:
        notes = "".join(f"; {note}" for note in trace.notes)
        yield (
            f"{trace.name}: {len(trace):,} requests in {trace.duration_s / 3600:.2f} h, "
            f"{float(trace.prompt_tokens.mean()):.0f} prompt, {float(trace.output_tokens.mean()):.0f} output tokens; "
            f"ceiling (replicas in plenty) {comparison.ceilings[trace.name]:.2%}{notes}"
        )


def page(comparison: Comparison) -> str:
    """One HTML page that needs nothing else."""
    css = resources.files("loadtest.reports").joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(f"<p>{escaped(line, 2000)}</p>" for line in preface(comparison))
    head = "".join(f"<th>{escaped(name)}</th>" for name in HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells(row)) + "</tr>" for row in comparison.rows
    )
    plots = "".join(figure(plot) for plot in _plots(comparison))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Simulated autoscaling</title><style>{css}</style></head><body>"
        f"<h1>Simulated autoscaling</h1>{body}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<div class="plots">{plots}</div></body></html>\n'
    )


def _plots(comparison: Comparison) -> Iterator[Plot]:
    for trace in comparison.traces:
        mine = [row for row in comparison.rows if row.trace == trace.name]
        for delay_s in dict.fromkeys(row.start_delay_s for row in mine):
            cell = [row for row in mine if row.start_delay_s == delay_s]
            yield _over_time(trace, cell, comparison.demands[trace.name], delay_s)
            yield _trade(trace, cell, delay_s)


def _over_time(trace: Trace, cell: Sequence[Row], needed: Floats, delay_s: float) -> Plot:
    curves = [Curve("demand", _thinned(needed), steps=True)]
    curves += [Curve(row.policy, _thinned(row.outcome.series[:, 1]), steps=True) for row in cell]
    return Plot(
        title=f"{trace.name}: replicas, starts of {delay_s:g} s (simulated)",
        x_label="hours",
        y_label="replicas ready",
        curves=curves[:COLOURS],
        note="Demand: what the work that came takes at one replica's capacity. Each point is its interval's highest.",
    )


def _trade(trace: Trace, cell: Sequence[Row], delay_s: float) -> Plot:
    return Plot(
        title=f"{trace.name}: cost and attainment, starts of {delay_s:g} s (simulated)",
        x_label="GPU-hours",
        y_label="attainment",
        curves=[
            Curve(row.policy, ((row.outcome.gpu_hours, row.outcome.attainment),), marked=True) for row in cell[:COLOURS]
        ],
        note="Upper left is better.",
        y_least_top=1.0,
        guides=(Guide("goal", GOAL),),
    )


def _thinned(values: NDArray[Any]) -> tuple[tuple[float, float | None], ...]:
    width = max(1, -(-len(values) // _POINTS))
    padded = np.pad(np.asarray(values, dtype=float), (0, -len(values) % width), mode="edge")
    highest = padded.reshape(-1, width).max(axis=1)
    return tuple((i * width * SCRAPE_S / 3600, float(value)) for i, value in enumerate(highest))
