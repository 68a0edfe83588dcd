"""`python -m loadtest`."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table

from loadtest import scenario
from loadtest.cli.compare import compare
from loadtest.cli.profile import profile
from loadtest.cli.report import report
from loadtest.cli.run import run
from loadtest.cli.sweep import sweep
from loadtest.errors import LoadtestError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Load tests of OpenAI-compatible servers: open loop, real traces, honest percentiles.",
)
app.command()(run)
app.command()(report)
app.command()(sweep)
app.command()(compare)
app.command()(profile)


@app.command()
def scenarios() -> None:
    """List the bundled scenarios."""
    table = Table("scenario", "tenants", "models", "warm-up s", "run s")
    for name in scenario.bundled():
        held = scenario.load(name)
        models = sorted({stream.model for stream in held.streams})
        table.add_row(
            name, ", ".join(sorted(held.tenants)), ", ".join(models), f"{held.warm_up_s:g}", f"{held.duration_s:g}"
        )
    Console().print(table)


def main() -> int:
    """The command line; its exit code. Wrong use is 2, what cannot be done 1 with the reason."""
    try:
        app()
    except LoadtestError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
