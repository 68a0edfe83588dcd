"""`galerne explain`: asks a running gateway which replica a request would go to, and why."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from serving.errors import ClusterError

KEY_VARIABLE: Final = "GALERNE_ADMIN_KEY"
TIMEOUT_S: Final = 10.0
COLUMNS: Final = (
    *("cost_s", "cached_tokens", "waiting_tokens", "in_flight", "in_flight_tokens", "recent_surplus_tokens"),
    *("others_in_flight", "others_waiting_tokens", "engine_running", "engine_waiting", "engine_kv_use"),
)
_MOST_ERROR_BYTES: Final = 65536


def explain(
    body: Annotated[Path, typer.Argument(help="A file with the request's JSON body; - for standard input.")],
    tenant: Annotated[str, typer.Option(help="Id of the tenant that would send it.")],
    path: Annotated[str, typer.Option(help="Where it would be sent.")] = "/v1/chat/completions",
    session: Annotated[str | None, typer.Option(help="Its x-session-id.")] = None,
    url: Annotated[str, typer.Option(help="The cluster.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Ask a gateway where a request would go now, and why; nothing is sent. GALERNE_ADMIN_KEY holds an admin's key."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise ClusterError(f"set {KEY_VARIABLE} to an administrator's key (`admins` in the configuration)")
    try:
        request = json.loads(sys.stdin.read() if str(body) == "-" else body.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClusterError(f"{body}: no JSON body: {error}") from error
    question = {"tenant": tenant, "path": path, "body": request} | ({} if session is None else {"session": session})
    found = _asked(url.rstrip("/") + "/ops/route", key, question)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    console = Console(file=sys.stdout, highlight=False)
    chosen = found["chosen"]
    where = "not settled before it is sent" if chosen is None else f"{chosen['replica']} ({chosen['reason']})"
    console.print(
        f"{found['model']}, policy {found['policy']}, {found['prompt_tokens']:,} tokens (four bytes each): {where}",
        soft_wrap=True,
    )
    table = Table("replica", *(column.replace("_", " ") for column in COLUMNS))
    for row in found["candidates"]:
        mark = "* " if chosen is not None and row["replica"] == chosen["replica"] else "  "
        table.add_row(mark + row["replica"], *(_cell(row.get(column)) for column in COLUMNS))
    console.print(table)
    console.print(
        f"{len(found['candidates'])} of {found['replicas']} replicas looked at, as gateway process {found['gateway']} "
        "knows them; others: other gateways' requests, part of in flight and waiting tokens",
        soft_wrap=True,
    )


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _asked(url: str, key: str, question: dict[str, Any]) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ClusterError(f"{url}: not the address of a cluster; it begins with http:// or https://")
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(question).encode(), headers)  # noqa: S310 - http or https, checked
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read(_MOST_ERROR_BYTES).decode("utf-8", "replace")
        raise ClusterError(f"{url}: HTTP {error.code}: {_message(said)}") from error
    except (OSError, ValueError) as error:
        raise ClusterError(f"{url}: no answer: {error}") from error
    return found


def _message(said: str) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said[:200]
