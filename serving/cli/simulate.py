"""`galerne simulate autoscale | routing`: policies on recorded traces, without a GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serving.errors import SimulationError

app = typer.Typer(no_args_is_help=True, help="Simulate on recorded traces; every figure is simulated.")
DEFAULT_PROFILE = "a100-llama-3.1-8b-published"
# Tables are for reading and for files: no cutting at the width of a narrow terminal.
WIDTH = 150


@app.callback()
def _group() -> None:
    """Simulate on recorded traces; every figure is simulated."""


@app.command()
def autoscale(
    trace: Annotated[
        list[str],
        typer.Option(
            help="Name of a trace in the data folder (azure2023_conv, mooncake_conversation, servegen:POOL), a file "
            "(Azure CSV, Mooncake JSONL), or RATES.csv[.gz]:POOL with the table of lengths beside it. Repeatable."
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(help="ours, ray-default, hpa-waiting, keda-default, static or oracle; without: all. Repeatable."),
    ] = None,
    start_delay: Annotated[
        list[float] | None, typer.Option(min=0.0, help="Seconds a replica takes to start; without: 5, 45, 120.")
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="Times the recorded rate.")] = 1.0,
    from_s: Annotated[float, typer.Option(min=0.0, help="Begin here in the trace.")] = 0.0,
    until_s: Annotated[float, typer.Option(help="End here in the trace.")] = math.inf,
    profile: Annotated[str, typer.Option(help="An engine's profile: a bundled name or a file.")] = DEFAULT_PROFILE,
    ttft_slo_s: Annotated[
        float, typer.Option(min=0.001, help="First token within this, plus the prompt's own unloaded prefill.")
    ] = 5.0,
    itl_slo_s: Annotated[float, typer.Option(min=0.0001, help="A request's mean time between tokens.")] = 0.1,
    max_requests: Annotated[int, typer.Option(min=1000, help="Longer traces are thinned evenly to this.")] = 12_000_000,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Bound of every policy; without: six times what demand takes at most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a page with plots and the JSON into this folder.")] = None,
) -> None:
    """Compare scaling policies on traces: attainment of the latency targets against GPU-hours. Simulated."""
    from serving.simulation.command import Asked, run

    progress = Console(stderr=True)
    asked = Asked(
        traces=tuple(trace),
        policies=tuple(policy or ()),
        start_delays_s=tuple(start_delay or ()),
        rate_scale=rate_scale,
        from_s=from_s,
        until_s=until_s,
        profile=profile,
        ttft_s=ttft_slo_s,
        itl_s=itl_slo_s,
        max_requests=max_requests,
        max_replicas=max_replicas,
    )
    comparison = run(asked, lambda line: progress.print(line, style="dim", markup=False, highlight=False))
    from serving.simulation.report import HEADINGS, cells, page, preface

    document = json.dumps(comparison.document(), indent=None if as_json else 1)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "autoscale.html").write_text(page(comparison), encoding="utf-8")
            (out / "autoscale.json").write_text(document + "\n", encoding="utf-8")
        except OSError as error:
            raise SimulationError(f"{out}: cannot be written: {error}") from error
    if as_json:
        sys.stdout.write(document + "\n")
        return
    console = Console(file=sys.stdout, width=WIDTH)
    for line in preface(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(title="simulated", caption="simulated")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index in {0, 2} else "right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*cells(row))
    console.print(table)
    if out is not None:
        console.print(f"{out / 'autoscale.html'}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def validate(
    run: Annotated[Path, typer.Option(help="run.json.gz of `python -m loadtest run` against the cluster.")],
    config: Annotated[Path, typer.Option(help="The configuration that the cluster served, with --fake.")],
    model: Annotated[str | None, typer.Option(help="The model's id; without: the first.")] = None,
    ttft_slo_s: Annotated[float, typer.Option(min=0.001)] = 5.0,
    itl_slo_s: Annotated[float, typer.Option(min=0.0001)] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare a load test of a fake-engine cluster with the simulation of the same requests."""
    from serving.config_file import load
    from serving.simulation.engine import Targets
    from serving.simulation.validate import validate as compared

    loaded = load(config)
    try:
        chosen = loaded.model(model) if model else loaded.models[0]
    except KeyError:
        raise SimulationError(f"{config}: there is no model {model!r}") from None
    rows = compared(run, chosen, Targets(ttft_slo_s, itl_slo_s))
    if as_json:
        figures = [{"name": r.name, "measured": r.measured, "simulated": r.simulated, "error": r.error} for r in rows]
        sys.stdout.write(json.dumps({"simulated": True, "rows": figures}) + "\n")
        return
    table = Table(title="fake-engine cluster against its simulation")
    for heading in ("figure", "measured", "simulated", "error"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.measured:.4f}", f"{row.simulated:.4f}", f"{row.error:+.1%}")
    Console(file=sys.stdout, width=WIDTH).print(table)


@app.command()
def routing(
    trace: Annotated[
        str,
        typer.Option(
            help="mooncake_conversation or mooncake_toolagent in the data folder, a Mooncake JSONL, or a generated "
            "one: conversations, shared-prefixes, nothing-shared."
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="cost, power-of-two, round-robin, session, or affinity (only here, to compare with). Repeatable; "
            "without: all."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=1000, help="Replicas of the model.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of 512 tokens in each replica's KV cache.")] = 2500,
    profile: Annotated[str, typer.Option(help="An engine's profile: a bundled name or a file.")] = DEFAULT_PROFILE,
    rate_scale: Annotated[float, typer.Option(help="Play the trace so many times as fast.")] = 1.0,
    reuse_weight: Annotated[
        float | None, typer.Option(min=1.0, help="models[].routing.reuse_weight; without: its default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the policies' draws.")] = 0,
    gateways: Annotated[int, typer.Option(min=1, max=64, help="Gateways, each with a router of its own.")] = 1,
    feedback: Annotated[bool, typer.Option(help="Gateways learn at replicas of one another's requests.")] = True,
    exchange_interval_s: Annotated[
        float, typer.Option(min=0.01, help="How often they do, beside answers' heads.")
    ] = 0.25,
    spread_arrivals: Annotated[
        bool, typer.Option(help="Recorded times are rounded: spread requests of one time evenly until the next.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare routing policies on a trace: tokens found in caches, balance, time to first token. Simulated."""
    from serving.simulation.routing import command

    asked = command.Asked(
        trace=trace,
        policies=tuple(policy or ()),
        replicas=replicas,
        blocks=blocks,
        profile=profile,
        rate_scale=rate_scale,
        reuse_weight=reuse_weight,
        seed=seed,
        gateways=gateways,
        feedback=feedback,
        exchange_interval_s=exchange_interval_s,
        spread=spread_arrivals,
    )
    comparison = command.run(asked)
    if as_json:
        sys.stdout.write(command.as_json(comparison) + "\n")
        return
    console = Console(file=sys.stdout, width=WIDTH)
    console.print(comparison.preface(), markup=False, highlight=False, soft_wrap=True)
    table = Table(title="simulated", caption="simulated")
    for index, heading in enumerate(command.HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for outcome in comparison.outcomes:
        table.add_row(*command.cells(outcome))
    console.print(table)
