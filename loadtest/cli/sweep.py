"""`loadtest sweep`: how much a cluster carries within the scenario's targets."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtest import progress, run_file, scenario
from loadtest.cli.output import REPORT_WIDTH, report_files
from loadtest.cli.run import DEFAULT_URL, OUT
from loadtest.errors import LoadtestError
from loadtest.report import table
from loadtest.reports.model import ReportRun, counted, figures
from loadtest.session import SessionSettings, run_scenario
from loadtest.sweep import Capacity, SearchSettings, search, told


def sweep(
    wanted: Annotated[str, typer.Argument(metavar="SCENARIO", help="a bundled scenario's name, or a YAML file")],
    url: Annotated[str, typer.Option(help="the server: http://HOST:PORT")] = DEFAULT_URL,
    workers: Annotated[int, typer.Option(min=1, help="processes that send")] = 1,
    start: Annotated[float, typer.Option(min=0.01, help="the first factor of the scenario's rates")] = 1.0,
    good_share: Annotated[float, typer.Option(min=0.01, max=1, help="share of requests that must be good")] = 0.95,
    precision: Annotated[float, typer.Option(min=0.01, help="how close the search comes, relative")] = 0.1,
    duration_s: Annotated[float | None, typer.Option(min=1, help="of each run; default the scenario's")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default build/loadtest/sweep-NAME-TIME")] = None,
) -> None:
    """Find the highest rate at which a request is still good: completed, within every latency target of the scenario.

    A run in which the client was the bottleneck ends the search: beyond it nothing is known of the server.
    """
    console = Console()
    planned = scenario.load(wanted)
    if duration_s is not None:
        planned = planned.model_copy(update={"duration_s": duration_s})
    runs: list[ReportRun] = []
    folder = out or OUT / f"sweep-{planned.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"

    def measure(factor: float) -> tuple[int, int]:
        with progress.shown(console, f"{planned.name} × {factor:.3g}", planned.total_s) as on_progress:
            ran = run_scenario(planned, SessionSettings(url=url, workers=workers, speed=factor), on_progress)
        if ran.invalid:
            raise LoadtestError(f"the run at × {factor:.3g} is invalid: {'; '.join(ran.invalid)}")
        runs.append(ran)
        run_file.save(ran, folder / f"run-{len(runs):02}.json.gz")
        found = figures(counted(ran.records), ran.slo)
        return int(found["good"] or 0), int(found["requests"] or 0)

    found = search(SearchSettings(start=start, good_share=good_share, precision=precision), measure)
    page = report_files(runs, folder)
    document = summary(found, runs)
    (folder / "capacity.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    wide = console if console.is_terminal else Console(width=REPORT_WIDTH)
    rows = (
        [
            f"× {tried.factor:.3g}",
            f"{tried.requests}",
            f"{tried.good / max(1, tried.requests):.1%}",
            f"{tried.interval[0]:.1%} … {tried.interval[1]:.1%}",
            tried.decision.value,
        ]
        for tried in found.steps
    )
    wide.print(table(f"{planned.name}: steps", ["rate", "requests", "good", "95 %", "judged"], rows))
    for sentence in told(found.steps):
        wide.print(sentence, markup=False)
    wide.print(_conclusion(document), markup=False)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


def summary(found: Capacity, runs: list[ReportRun]) -> dict[str, Any]:
    """The capacity as a document: factors of the scenario's rates, and what the last run that passed carried."""
    at = next((run for run in reversed(runs) if _factor(run) == found.passed), None)
    carried = {} if at is None else figures(counted(at.records), at.slo)
    return {
        "passed_factor": found.passed,
        "failed_factor": found.failed,
        "simulated": any(run.simulated for run in runs),
        **{key: carried.get(key) for key in ("offered_rps", "goodput_rps", "output_tok_s", "ttft_p95_s", "itl_p95_s")},
        "steps": [
            {"factor": t.factor, "requests": t.requests, "good": t.good, "judged": t.decision.value, "close": t.close}
            for t in found.steps
        ],
    }


def _factor(run: ReportRun) -> float:
    return float(run.scenario["run"]["speed"])


def _conclusion(document: dict[str, Any]) -> str:
    passed, failed = document["passed_factor"], document["failed_factor"]
    if passed is None:
        return f"No rate that was tried keeps the targets, down to × {failed:.3g} of the scenario's."
    kept = (
        f"The targets are kept at × {passed:.3g} of the scenario's rates: {document['offered_rps']:.3g} requests/s, "
        f"{document['output_tok_s']:.0f} output tokens/s"
    )
    return kept + (f"; not at × {failed:.3g}." if failed is not None else "; no rate that was tried was too high.")
