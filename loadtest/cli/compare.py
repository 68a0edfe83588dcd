"""`loadtest compare`: Galerne and what people would pick instead, in front of the same engine, in turns."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from loadtest.command import numbers, placement
from loadtest.comparison import DIRECT, Plan, Row, bring_up, measure_all
from loadtest.errors import LoadtestError
from loadtest.overhead import PACED, PACED_ENGINE, SATURATED, SATURATED_ENGINE, loads_of
from loadtest.peers.catalogue import PEERS
from loadtest.peers.install import cache
from loadtest.processes import this_machine
from loadtest.report import shown, table, write_summary
from loadtest.targets import fake_cluster, real_cluster

_WIDTH = 120
# In a way's line: its caveat stands below the tables.
_MARK = "hosts its engine (see below)"


def compare(
    peers: Annotated[str, typer.Option(help="names, with commas")] = ",".join(PEERS),
    streams: Annotated[str, typer.Option(help="concurrent streams, with commas")] = "1,32,128",
    prompt_kib: Annotated[str, typer.Option(help="sizes of prompts, with commas")] = "1,64",
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each way a load")] = 3,
    run_s: Annotated[float, typer.Option(min=0.1, help="about how long one run lasts")] = 2.0,
    timeout_s: Annotated[float, typer.Option(min=1, help="bound on one request")] = 120.0,
    real: Annotated[bool, typer.Option(help="the bundled model on this processor instead of a fake engine")] = False,
    saturated: Annotated[bool, typer.Option(help="a fake engine that answers as fast as it can")] = False,
    out: Annotated[Path, typer.Option()] = Path("build/bench/compare.json"),
) -> None:
    """Measure every way to the same engine in turns and print the table; peers are installed on demand."""
    names = [name for name in peers.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise LoadtestError(f"no peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    machine, when = this_machine(), datetime.now(UTC)
    try:
        loads = loads_of(numbers(streams), numbers(prompt_kib))
    except ValueError as problem:
        raise LoadtestError(f"--streams and --prompt-kib are numbers with commas: {problem}") from problem
    plan = Plan(loads, output_tokens, run_s, repeats, timeout_s)
    # Asked to end, end as on Ctrl-C: cluster and peers go too.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with ExitStack() as held:
        if real:
            subject = held.enter_context(real_cluster())
        else:
            paced = {SATURATED: SATURATED_ENGINE} if saturated else {PACED: PACED_ENGINE}
            (subject,) = held.enter_context(fake_cluster(paced))
        wanted = [PEERS[name] for name in names]
        say = partial(console.print, markup=False)
        up, down = bring_up(subject, wanted, cache(), held, say)
        console.print(placement(machine))
        with console.status("") as status:
            measured = uvloop.run(measure_all(subject, up, plan, cores=machine.cores, say=say, progress=status.update))
    kind = "real engine" if real else "fake engine (simulated)"
    for built in tables(f"{kind}, {output_tokens} output tokens", measured):
        console.print(built)
    for name, why in down.items():
        console.print(f"{name}: not measured: {why}", markup=False)
    for name, runner in up.items():
        if name in PEERS:
            held_shown = runner.shown
            console.print(f"{name} {held_shown['version']}: {held_shown['argv']}", markup=False, style="dim")
        if runner.caveat:
            console.print(f"{_MARK} {name}: {runner.caveat}", markup=False)
    write_summary(
        out,
        name="compare",
        when=when,
        machine=machine,
        settings={
            "engine": {"simulated": not real, **subject.engine},
            "repeats": repeats,
            "run_s": run_s,
            "order": "all ways in turns, the order turned by one each repeat; one discarded warm-up of each",
            "placement": placement(machine),
            "ways": {name: dict(runner.shown) for name, runner in up.items()},
            "not_measured": down,
        },
        cells=[_json(row) for row in measured],
        summary=summary(measured),
    )
    console.print(f"written: {out}", markup=False)


def tables(title: str, rows: Iterable[Row]) -> list[Table]:
    """One table a load: a way a line."""
    held: dict[str, list[Row]] = {}
    for row in rows:
        held.setdefault(row.load, []).append(row)
    heads = ["way", "tok/s", "÷ direct", "TTFT p50 added ms", "p99 added ms", "CPU ms/request", "memory MiB", "note"]
    return [table(f"{load}: {title}", heads, map(_cells, of_load)) for load, of_load in held.items()]


def _cells(row: Row) -> list[str]:
    cell = row.cell
    if cell is None:
        return [row.way, *["–"] * 6, f"failed: {(row.problem or '')[:200]}"]
    first = [row.way, shown(cell.gateway["tok_s"], 0)]
    note = "; ".join((*([_MARK] if row.caveat else []), *cell.invalid))
    if row.way == DIRECT:
        return [*first, *["–"] * 5, note]
    compared = cell.compared
    return [
        *first,
        shown(compared["tok_s_ratio"], 3),
        shown(compared["ttft_added_p50_ms"], 2),
        shown(compared["ttft_added_p99_ms"], 2),
        "–" if row.cpu_ms_per_request is None else shown(row.cpu_ms_per_request, 2),
        "–" if row.rss_mib is None else f"{row.rss_mib.high:.0f}",
        note,
    ]


def summary(rows: Iterable[Row]) -> dict[str, float | None]:
    """Flat figures by way and load; null where a cell is invalid."""
    found: dict[str, float | None] = {}
    for row in rows:
        if row.way == DIRECT or row.cell is None:
            continue
        key, cell = f"{row.way}_{row.load}", row.cell
        found[f"tok_s_ratio_{key}"] = None if cell.invalid else round(cell.compared["tok_s_ratio"].median, 4)
        found[f"ttft_added_p50_ms_{key}"] = (
            None if cell.invalid else round(cell.compared["ttft_added_p50_ms"].median, 3)
        )
        found[f"ttft_added_p99_ms_{key}"] = (
            None if cell.invalid else round(cell.compared["ttft_added_p99_ms"].median, 3)
        )
        if row.cpu_ms_per_request is not None and row.rss_mib is not None:
            found[f"cpu_ms_per_request_{key}"] = round(row.cpu_ms_per_request.median, 3)
            found[f"rss_mib_{key}"] = round(row.rss_mib.high, 1)
    return found


def _json(row: Row) -> dict[str, Any]:
    return {
        "way": row.way,
        "load": row.load,
        "problem": row.problem,
        "caveat": row.caveat or None,
        "cell": None if row.cell is None else row.cell.as_json(),
    }
