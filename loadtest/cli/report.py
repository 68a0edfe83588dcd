"""`loadtest report`: reports from the files of earlier runs, one run or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest import run_file
from loadtest.cli.output import REPORT_WIDTH, report_files
from loadtest.reports import terminal
from loadtest.reports.verdict import judge


def report(
    files: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run.json.gz files, or their folders")],
    out: Annotated[Path, typer.Option(help="folder to write report.html and summary.json to")] = Path(
        "build/loadtest/report"
    ),
) -> None:
    """Make the report of one run again, or compare several with the first; the exit code is the worst verdict."""
    runs = [run_file.load(file / "run.json.gz" if file.is_dir() else file) for file in files]
    page = report_files(runs, out)
    console = Console()
    wide = console if console.is_terminal else Console(width=REPORT_WIDTH)
    if len(runs) > 1:
        wide.print(terminal.comparison(runs))
    else:
        for shown in terminal.tables(runs[0]):
            wide.print(shown)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    raise typer.Exit(max(judge(one).exit_code for one in runs))
