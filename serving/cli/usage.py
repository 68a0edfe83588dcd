"""`galerne usage`: what was used, by whom; `galerne usage reconcile`: whether the engines agree."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serving.cli import scraped, state
from serving.cluster.edge import ENGINE_TOKEN_HEADER
from serving.config import ENV_LEDGER_DIR, ENV_RELEASE, LedgerConfig
from serving.config_file import load
from serving.engine.work import ACCOUNTS
from serving.errors import ClusterError
from serving.metering.moments import MOMENTS, moment
from serving.metering.reconcile import Evidence, Lost, Tokens, Verdict, counters, lost_of, verdict
from serving.metering.settings import LedgerSettings, settings
from serving.metering.spill import Spill

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

app = typer.Typer(help="What tenants used, from the ledger; and whether the engines' counters agree.")

ENGINE_TIMEOUT_S = 10.0
# A row is in the database a moment after its request has ended.
SETTLE_S = 10.0
POLL_S = 0.5
LOST_LEAST, LOST_MOST = "lost_attempts_at_least", "lost_attempts_at_most"
SHOWN = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "estimated")


class By(StrEnum):
    """What sums are grouped by."""

    DAY = "day"
    TENANT = "tenant"
    MODEL = "model"
    KEY = "key"
    ROUTE = "route"
    OUTCOME = "outcome"


class Format(StrEnum):
    """How sums are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


PortOption = Annotated[int, typer.Option(help="Port of the cluster on this machine whose ledger it is.")]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Configuration file that names the ledger (or set GALERNE_LEDGER_URL).")
]


@app.callback(invoke_without_command=True)
def usage(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    since: Annotated[str | None, typer.Option("--from", help=f"Requests that began at or after: {MOMENTS}.")] = None,
    until: Annotated[str | None, typer.Option("--to", help=f"Requests that began before: {MOMENTS}.")] = None,
    by: Annotated[list[By] | None, typer.Option(help="Group by it; may stand several times.")] = None,
    shape: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
    port: PortOption = 8000,
    config: ConfigOption = None,
) -> None:
    """Sums of the ledger: requests, tokens of prompts (cached ones among them) and answers."""
    if context.invoked_subcommand is not None:
        return
    columns = [{By.KEY: "key_id"}.get(name, name.value) for name in by or [By.TENANT, By.MODEL]]
    with _ledger(_settings(config, port)) as connection:
        from serving.metering import store

        rows = store.totals(connection, columns, tenant=tenant, since=_moment(since), until=_moment(until))
    _print(columns, rows, shape)


@app.command()
def reconcile(
    port: PortOption = 8000,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the balances as JSON.")] = False,
    prometheus: Annotated[
        str | None, typer.Option(help="Take the counters from this Prometheus: for clusters of several machines.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--from", help=f"With --prometheus: {MOMENTS}. Default: an hour before --to.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", help="With --prometheus, the same. Default: a moment ago.")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(
            envvar=ENV_RELEASE,
            help="With --prometheus, where it has scraped several releases: the one that is meant (NAMESPACE/RELEASE).",
        ),
    ] = None,
    match: Annotated[
        str, typer.Option(help="With --prometheus: matchers of this cluster's series, such as 'namespace=\"galerne\"'.")
    ] = "",
) -> None:
    """Hold the ledger against the engines' counters of tokens: of running ones, since each became ready.

    With --prometheus: of all that were scraped in a window, and between their first and last scrape of it. Status 0:
    every token has its row or another cause. Status 1: some are unexplained.
    """
    if prometheus is not None:
        told = _settings(config, port)
        found = scraped.compare(
            prometheus, match, release, _moment(since), _moment(until), lambda: _ledger(told), time.time()
        )
        scraped.show(found, as_json=as_json)
        if not found.balanced:
            raise typer.Exit(1)
        return
    if since is not None or until is not None or match:
        raise typer.BadParameter("--from, --to and --match go with --prometheus")
    directory = state.state_dir(port)
    cluster = state.read(directory)
    told = _settings(config, port)
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        try:
            verdicts = _verdicts(cluster, told)
        except ClusterError:  # a cluster this young has no ledger yet
            if time.monotonic() > deadline_s:
                raise
        else:
            if all(v.unexplained == Tokens() for v in verdicts) or time.monotonic() > deadline_s:
                break
        time.sleep(POLL_S)
    if as_json:
        print(json.dumps([_document(v) for v in verdicts], indent=1))
    else:
        _balances(verdicts)
    if not all(v.balanced for v in verdicts):
        raise typer.Exit(1)


def _verdicts(cluster: Mapping[str, Any], told: LedgerSettings) -> list[Verdict]:
    engines = [engine for replicas in cluster["engines"].values() for engine in replicas]
    # The spill before the database: a row on its way is seen at least once, and told apart by its id.
    spill = Spill(told.spill_dir)
    waiting = {row.id: row for batch in spill.batches() for row in spill.read(batch) or ()}
    read = {engine["replica_id"]: _engine(engine, cluster["engine_token"]) for engine in engines}
    with _ledger(told) as connection:
        from serving.metering import store

        written = store.known(connection, list(waiting))
        computed = store.computed(connection)
        sums = {found["engine"]: found for found in store.totals(connection, ["engine"])}
        lost = store.lost(connection)
    verdicts = []
    for name, (counted, others, under_way) in read.items():
        unwritten = [row for row in waiting.values() if row.id not in written]
        own = [row for row in unwritten if row.engine == name]
        total = sums.get(name, {})
        billed = Tokens(int(total.get("prompt_tokens", 0)), int(total.get("completion_tokens", 0)))
        evidence = Evidence(
            engine=name,
            counted=counted,
            ledger=billed,
            unbilled=computed.get(name, Tokens()) - billed,
            waiting=Tokens(sum(r.counted_prompt_tokens for r in own), sum(r.computed_completion_tokens for r in own)),
            others=others,
            under_way=under_way,
            guesses=int(total.get("estimated", 0)) + sum(not r.exact for r in own),
            lost=lost.get(name, Lost()) + lost_of(row for row in unwritten if row.lost_engine == name),
        )
        verdicts.append(verdict(evidence))
    return verdicts


def _engine(engine: Mapping[str, Any], token: str) -> tuple[Tokens, Tokens, Tokens]:
    host = f"[{engine['host']}]" if ":" in engine["host"] else engine["host"]
    url = f"http://{host}:{engine['port']}"
    account = json.loads(_get(f"{url}{ACCOUNTS}", token))
    counted = counters(_get(f"{url}/metrics", token).decode())
    return counted, _tokens(account["others"]), _tokens(account["under_way"])


def _tokens(account: Mapping[str, Any]) -> Tokens:
    return Tokens(int(account["counted_prompt_tokens"]), int(account["completion_tokens"]))


def _get(url: str, token: str) -> bytes:
    request = urllib.request.Request(url, headers={ENGINE_TOKEN_HEADER: token})  # noqa: S310 - an engine of our own
    try:
        with urllib.request.urlopen(request, timeout=ENGINE_TIMEOUT_S) as answer:  # noqa: S310
            body: bytes = answer.read()
            return body
    except OSError as error:
        raise ClusterError(f"an engine does not answer at {url}: {error}") from None


def _document(found: Verdict) -> dict[str, Any]:
    e = found.evidence
    parts = {
        "engine_counted": e.counted,
        "ledger": e.ledger,
        "not_billed": e.unbilled,
        "not_yet_in_the_database": e.waiting,
        "not_through_a_gateway": e.others,
        "under_way": e.under_way,
        LOST_LEAST: e.lost.least,
        LOST_MOST: e.lost.most,
        "unexplained": found.unexplained,
    }
    shown: dict[str, Any] = {k: {"prompt": v.prompt, "completion": v.completion} for k, v in parts.items()}
    counts = {"guessed_rows": e.guesses, "lost_attempts_without_a_bound": e.lost.unbounded}
    return {"engine": e.engine, **shown, **counts, "balanced": found.balanced}


def _balances(verdicts: Sequence[Verdict]) -> None:
    for found in verdicts:
        document = _document(found)
        table = Table(title=f"engine {document.pop('engine')}", title_justify="left")
        for name in ("tokens", "prompt", "completion"):
            table.add_column(name, justify="left" if name == "tokens" else "right")
        guesses, balanced = document.pop("guessed_rows"), document.pop("balanced")
        unbounded, least = document.pop("lost_attempts_without_a_bound"), document.pop(LOST_LEAST)
        for name, value in document.items():
            if name == LOST_MOST:
                ranges = (_range(least[kind], value[kind]) for kind in ("prompt", "completion"))
                table.add_row("lost attempts", *ranges)
            else:
                table.add_row(name.replace("_", " "), str(value["prompt"]), str(value["completion"]))
        Console().print(table)
        if unbounded:
            Console().print(f"{unbounded} lost attempts may have cost more: their engine did not answer.")
        if guesses:
            Console().print(f"{guesses} rows are guesses: their engine did not answer when their client had left.")
        Console().print("balanced" if balanced else "[red]NOT balanced[/]")


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _settings(config: Path | None, port: int) -> LedgerSettings:
    ledger = LedgerConfig() if config is None else load(config).ledger
    return settings(ledger, {ENV_LEDGER_DIR: str(state.state_dir(port))} | dict(os.environ))


@contextmanager
def _ledger(told: LedgerSettings) -> Iterator[Connection]:
    from sqlalchemy import exc

    from serving.metering import store

    if not told.is_shared and not Path(told.url.removeprefix("sqlite:///")).exists():
        raise ClusterError(
            f"there is no ledger at {told.url.removeprefix('sqlite:///')}: name its cluster's --port or --config"
        )
    engine = store.connect(told.url)
    try:
        with engine.connect() as connection:
            yield connection
    except exc.SQLAlchemyError as error:
        raise ClusterError(f"the ledger cannot be read: {store.reason(error)}") from None
    finally:
        engine.dispose()


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return moment(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not {MOMENTS}") from None


def _print(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], shape: Format) -> None:
    names = [*columns, *SHOWN]
    plain = [{name: str(row[name]) if name in columns else int(row[name]) for name in names} for row in rows]
    if shape is Format.JSON:
        print(json.dumps(plain, indent=1))
    elif shape is Format.CSV:
        out = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        out.writeheader()
        out.writerows(plain)
    else:
        table = Table()
        for name in names:
            table.add_column(name.replace("_", " "), justify="left" if name in columns else "right")
        for row in plain:
            table.add_row(*(f"{row[name]:,}" if name in SHOWN else str(row[name]) for name in names))
        Console().print(table)
