"""`galerne usage reconcile --prometheus`: the ledger against what was scraped of a whole cluster's engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from serving.errors import ClusterError
from serving.metering.prometheus_counters import Counters
from serving.metering.reconcile import Tokens
from serving.metering.scrapes import MARGIN_S, Balance, Ran, balance
from serving.metrics.release import matcher

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

# A request's row is in the database by then, and the last scrapes in Prometheus.
SETTLE_S: Final = 15.0
WINDOW_S: Final = 3600.0
MOST_S: Final = 31 * 86_400


@dataclass(frozen=True, slots=True)
class Comparison:
    """All replicas that were scraped; `unseen`: rows of replicas that were not; `behind`: rows that gateways keep."""

    balances: tuple[Balance, ...]
    unseen: int
    behind: int

    @property
    def balanced(self) -> bool:
        """Whether every token has a cause."""
        return all(found.balanced for found in self.balances)


def compare(
    url: str,
    match: str,
    release: str | None,
    since: datetime | None,
    until: datetime | None,
    ledger: Callable[[], AbstractContextManager[Connection]],
    now_s: float,
) -> Comparison:
    """Hold every replica's counters against its rows, of one release where it is named.

    Raises ClusterError, and BadParameter for a window.
    """
    from serving.metering import store

    settled_s = now_s - SETTLE_S
    until_s = settled_s if until is None else min(until.timestamp(), settled_s)
    from_s = until_s - WINDOW_S if since is None else since.timestamp()
    if not 0 < until_s - from_s <= MOST_S:
        raise typer.BadParameter(f"--from must lie before --to, by {MOST_S // 86_400} days at most")
    own = () if release is None else (matcher(release),)
    counters = Counters(url, ",".join((*filter(None, [match.strip().strip(",")]), *own)))
    if release is None and len(known := counters.releases(from_s, until_s)) > 1:
        names = ", ".join(repr(name) for name in known)
        raise ClusterError(f"{url} has scraped engines of several releases ({names}): name yours with --release")
    increases = counters.increases(from_s, until_s, settled_s)
    if not increases:
        raise ClusterError(
            f"{url} has scraped no engine's counters from {_told(from_s)} to {_told(until_s)}: is it this cluster's?"
        )
    rows: dict[str, list[Ran]] = {name: [] for name in increases}
    unseen = 0
    with ledger() as connection:
        for row in store.ran(connection, from_s - MARGIN_S, until_s + MARGIN_S):
            if row["engine"] in rows:
                rows[row["engine"]].append(_ran(row))
            else:
                unseen += 1
            if row["lost_engine"] in rows:
                rows[row["lost_engine"]].append(_lost(row))
    found = tuple(balance(name, increase, rows[name]) for name, increase in increases.items())
    return Comparison(found, unseen, counters.rows_behind())


def show(found: Comparison, *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        whole = {
            "replicas": [_document(balance) for balance in found.balances],
            "rows_of_replicas_not_scraped": found.unseen,
            "rows_not_yet_in_the_database": found.behind,
        }
        print(json.dumps(whole, indent=1))
        return
    console = Console()
    for one in found.balances:
        document: dict[str, Any] = _document(one)
        title = f"replica {one.engine}, {document['from']} to {document['until']}"
        table = Table("tokens", title=title, title_justify="left")
        for name in ("prompt", "completion"):
            table.add_column(name, justify="right")
        for name in _PARTS:
            table.add_row(name.replace("_", " "), str(document[name]["prompt"]), str(document[name]["completion"]))
        console.print(table)
        for sentence in _remarks(one):
            console.print(sentence)
        console.print("balanced" if one.balanced else "[red]NOT balanced[/]")
    if found.unseen:
        console.print(f"{found.unseen} rows are of replicas that Prometheus did not scrape: they were not checked.")
    if found.behind:
        console.print(f"{found.behind} rows wait at gateways for the database: look again when they are there.")


_PARTS: Final = ("engine_counted", "ledger", "lost_attempts", "partly_in_the_window", "unexplained")


def _remarks(one: Balance) -> list[str]:
    found = []
    if one.increase.resets:
        found.append(f"Counters began anew {one.increase.resets} times: what was under way then is partly counted.")
    if one.increase.under_way:
        found.append(
            f"Up to {one.increase.under_way} requests have run since before the end and have no row yet: "
            "they may be what is unexplained. An earlier --to leaves them out."
        )
    if one.guesses:
        found.append(f"{one.guesses} rows are guesses: their engine did not answer when their client had left.")
    return found


def _document(one: Balance) -> dict[str, Any]:
    parts = (one.increase.tokens, one.ledger, one.lost, one.edges, one.unexplained)
    shown = {k: {"prompt": v.prompt, "completion": v.completion} for k, v in zip(_PARTS, parts, strict=True)}
    return {
        "engine": one.engine,
        "from": _told(one.increase.from_s),
        "until": _told(one.increase.until_s),
        **shown,
        "counters_began_anew": one.increase.resets,
        "under_way": one.increase.under_way,
        "guessed_rows": one.guesses,
        "balanced": one.balanced,
    }


def _ran(row: Any) -> Ran:
    began_s = row["started_at"].timestamp()
    tokens = Tokens(int(row["counted_prompt_tokens"]), int(row["completion_tokens"]))
    return Ran(began_s, began_s + float(row["duration_s"]), tokens, bool(row["exact"]))


def _lost(row: Any) -> Ran:
    """The attempt at another replica, some time within the request's."""
    prompt, completion, exact = row["lost_prompt_tokens"], row["lost_completion_tokens"], bool(row["lost_exact"])
    bounded = prompt is not None and completion is not None
    ran = replace(_ran(row), tokens=Tokens(int(prompt or 0), int(completion or 0)))
    return replace(ran, lost=True, at_most=not exact, exact=exact or bounded)


def _told(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
