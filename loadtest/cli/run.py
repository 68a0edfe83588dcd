"""`loadtest run`: one scenario against one server, and its report."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest import progress, run_file, scenario
from loadtest.cli.output import REPORT_WIDTH, report_files
from loadtest.reports import terminal
from loadtest.reports.verdict import judge
from loadtest.session import SessionSettings, run_scenario

DEFAULT_URL = "http://127.0.0.1:8000"
OUT = Path("build/loadtest")


def run(
    wanted: Annotated[str, typer.Argument(metavar="SCENARIO", help="a bundled scenario's name, or a YAML file")],
    url: Annotated[str, typer.Option(help="the server: http://HOST:PORT")] = DEFAULT_URL,
    workers: Annotated[int, typer.Option(min=1, help="processes that send")] = 1,
    speed: Annotated[float, typer.Option(min=0.001, help="multiplies every rate; the run's length stays")] = 1.0,
    users: Annotated[int | None, typer.Option(min=1, help="closed loop of so many users instead")] = None,
    think_s: Annotated[float, typer.Option(min=0, help="a user's pause between two requests")] = 0.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="bound on one request")] = 600.0,
    drain_s: Annotated[float, typer.Option(min=0, help="bound on the wait after the last request's time")] = 120.0,
    max_connections: Annotated[int, typer.Option(min=1, help="bound on connections of each tenant")] = 5000,
    wait_ready_s: Annotated[
        float, typer.Option(min=0, help="wait so long for a server that starts and models that load")
    ] = 0.0,
    prometheus: Annotated[str | None, typer.Option(help="a Prometheus to read replicas over time from")] = None,
    simulated: Annotated[bool, typer.Option(help="label the run as simulated, whatever the server says")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the report; default build/loadtest/NAME-TIME")] = None,
) -> None:
    """Send a scenario's requests at their times and report what became of every one.

    Exit code: 0 all targets met, 3 not met, 4 the run is invalid (the client was the bottleneck, say), 1 it could not
    be run.
    """
    console = Console()
    planned = scenario.load(wanted)
    settings = SessionSettings(
        url=url,
        workers=workers,
        speed=speed,
        users=users,
        think_s=think_s,
        timeout_s=timeout_s,
        drain_s=drain_s,
        max_connections=max_connections,
        prometheus=prometheus,
        simulated=simulated,
        wait_ready_s=wait_ready_s,
    )
    with progress.shown(console, planned.name, planned.total_s) as on_progress:
        ran = run_scenario(planned, settings, on_progress)
    folder = out or OUT / f"{planned.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    run_file.save(ran, folder / "run.json.gz")
    page = report_files([ran], folder)
    wide = console if console.is_terminal else Console(width=REPORT_WIDTH)
    for shown in terminal.tables(ran):
        wide.print(shown)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    raise typer.Exit(judge(ran).exit_code)
