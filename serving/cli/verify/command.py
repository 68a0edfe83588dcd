"""The command: asks, prints a table as it goes, and ends with one signed line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving import __version__
from serving.cli.verify import isolation
from serving.cli.verify.checks import Serving
from serving.cli.verify.http import Client
from serving.cli.verify.result import FAILED, PASSED, SKIPPED, Check, checked, outcome, signed_line
from serving.errors import GalerneError

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_KEY_ENV = "GALERNE_KEY"
# A model that sleeps is woken by the first request, which waits for it.
DEFAULT_TIMEOUT_S = 180.0
WIDTH = 150
STYLES = {PASSED: "green", FAILED: "bold red", SKIPPED: "yellow"}


class NoKey(GalerneError):
    """The variable that should hold the key is empty or not set."""


def verify(
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = DEFAULT_URL,
    key_env: Annotated[
        str, typer.Option(help="Name of the environment variable that holds an API key.", metavar="NAME")
    ] = DEFAULT_KEY_ENV,
    model: Annotated[str | None, typer.Option(help="Ask this model; without: the first of each task.")] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Also try to reach the outside from here; it must fail.")
    ] = False,
    outside: Annotated[
        list[str] | None,
        typer.Option(
            help="With --isolated, what counts as outside instead of public resolvers and metadata services: "
            "dns:NAME, tcp:HOST:PORT, http:HOST:PORT. Repeatable."
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one answer.")] = DEFAULT_TIMEOUT_S,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result line (JSON) and nothing else.")] = False,
    check: Annotated[
        str | None,
        typer.Option(
            help="Verify a result line of an earlier run under the same key instead; - reads it.", metavar="LINE"
        ),
    ] = None,
) -> None:
    """Prove that a cluster serves: models, answers, a stream, refusals. Exit status 0 where every check passed.

    The last line printed is the result, signed with HMAC-SHA256 under the API key; `--check LINE` verifies it.
    """
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise NoKey(f"the environment variable {key_env} holds no API key; set it, or name another with --key-env")
    console = Console(file=sys.stdout, width=max(WIDTH, Console().width))
    if check is not None:
        sys.exit(_check(sys.stdin.read() if check == "-" else check, key, console))
    targets = tuple(isolation.target(text) for text in outside) if outside else isolation.OUTSIDE
    client = Client(url, timeout_s)
    found = tuple(_told(_checks(Serving(client, key, model), targets if isolated else ()), console, quiet=as_json))
    if not as_json:
        console.print(_table(url, found))
    # Not through the console: a line must stay one line.
    print(signed_line(found, url=url, version=__version__, at=datetime.now(UTC), key=key), flush=True)
    sys.exit(0 if outcome(found) == PASSED else 1)


def _checks(serving: Serving, targets: Iterable[isolation.Target]) -> Iterator[Check]:
    yield from serving.run()
    yield from isolation.probe(targets)


def _told(checks: Iterator[Check], console: Console, *, quiet: bool) -> Iterator[Check]:
    """The checks, with a sign of life on a terminal while one takes its time."""
    if quiet or not console.is_terminal:
        yield from checks
        return
    with console.status("verifying") as status:
        for check in checks:
            status.update(f"{check.name}: {check.verdict}")
            yield check


def _table(url: str, checks: Iterable[Check]) -> Table:
    view = Table("check", "verdict", "seconds", "what was seen", title=f"{url}, asked by Galerne {__version__}")
    for check in checks:
        view.add_row(
            check.name, f"[{STYLES[check.verdict]}]{check.verdict}[/]", f"{check.seconds:.2f}", escape(check.detail)
        )
    return view


def _check(text: str, key: str, console: Console) -> int:
    lines = [line for line in text.splitlines() if line.strip()]
    result = checked(lines[-1] if lines else "", key)
    good = result.get("outcome") == PASSED
    console.print(
        f"signature good: {result.get('url')} {result.get('outcome')} at {result.get('at')} "
        f"(Galerne {result.get('version')}, {len(result.get('checks', ()))} checks)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0 if good else 1
