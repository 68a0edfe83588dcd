"""What the server under test says of itself, asked once before a run: a wrong key fails here, not a thousand times."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any

from loadtest.errors import LoadtestError
from loadtest.request import ENGINE_TOKEN_HEADER, Target

_TIMEOUT_S = 10.0
_MOST_BYTES = 4 * 2**20
_SHOWN = 300
_OK = 200
# What a server that starts, or a proxy in front of one, says; any other refusal stays one.
_NOT_YET = (404, 500, 502, 503, 504)
# What a fake engine, asked without a gateway, calls its owner.
_FAKE_OWNER = "galerne-fake"


class NotYet(LoadtestError):
    """Nobody answers, or with what a server says while it starts."""


@dataclass(frozen=True, slots=True)
class Model:
    """One of the server's models."""

    id: str
    # The server says that the engine behind it computes nothing.
    simulated: bool
    # It has a replica, or sleeps until it is asked for; a server that tells neither is taken to be ready.
    ready: bool = True


def models(target: Target) -> dict[str, Model]:
    """The models that this target's key may use, by id.

    Raises LoadtestError with the server's own words; NotYet where the same question may have an answer later.
    """
    where = f"http://{target.host}:{target.port}/v1/models"
    headers = {} if target.key is None else {"Authorization": f"Bearer {target.key}"}
    if target.engine_token is not None:
        headers[ENGINE_TOKEN_HEADER] = target.engine_token
    connection = http.client.HTTPConnection(target.host, target.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/v1/models", headers=headers)
        response = connection.getresponse()
        body = response.read(_MOST_BYTES)
    except (OSError, http.client.HTTPException) as problem:
        raise NotYet(f"{where}: no answer ({problem}); is the server running there?") from problem
    finally:
        connection.close()
    if response.status != _OK:
        said = body[:_SHOWN].decode("utf-8", "replace")
        kind = NotYet if response.status in _NOT_YET else LoadtestError
        raise kind(f"{where}: HTTP {response.status} for tenant {target.name}: {said}")
    try:
        return {
            entry["id"]: Model(entry["id"], _is_simulated(entry), _is_ready(entry))
            for entry in json.loads(body)["data"]
        }
    except (ValueError, KeyError, TypeError) as problem:
        raise LoadtestError(f"{where}: not a list of models as OpenAI's API has it: {body[:_SHOWN]!r}") from problem


def _is_simulated(entry: dict[str, Any]) -> bool:
    return bool(entry.get("simulated")) or entry.get("owned_by") == _FAKE_OWNER


def _is_ready(entry: dict[str, Any]) -> bool:
    return entry.get("ready_replicas") != 0 or entry.get("min_replicas") == 0
