"""The gateway's OpenAPI document: the allow-list, and of each body what the gateway reads of it.

Made from the very structs that requests are decoded with, so that it cannot say what they do not. A field that is
refused everywhere is left out; one that is not named is passed on to the engine, whose own document says what it means.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

import msgspec

from serving import __version__
from serving.admission import shapes
from serving.admission.bounds import REFUSED, BodyKind
from serving.api import routes, usage

_BODIES: Final[dict[BodyKind, tuple[type[msgspec.Struct], tuple[str, ...]]]] = {
    BodyKind.CHAT: (shapes.Chat, ("model", "messages")),
    BodyKind.COMPLETION: (shapes.Completion, ("model", "prompt")),
    BodyKind.EMBEDDING: (shapes.Embedding, ("model",)),
    BodyKind.RESPONSES: (shapes.Responses, ("model", "input")),
    BodyKind.RERANK: (shapes.Rerank, ("model", "query", "documents")),
    BodyKind.SCORE: (shapes.Score, ("model",)),
    BodyKind.TOKENIZE: (shapes.Tokenize, ("model",)),
    BodyKind.DETOKENIZE: (shapes.Detokenize, ("model", "tokens")),
}
_REF: Final = "#/components/schemas/{name}"
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                # An engine's own refusals number it.
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_EVERY: Final = {
    401: "No key, or one that is not good.",
    403: "The key lacks the scope.",
    404: "No such route, or no such model for this key.",
    405: "The route takes another method.",
    431: "The headers are too large.",
    500: "The gateway failed.",
    503: "No replica yet, or too many requests; see Retry-After.",
}
_RELAYED: Final = {
    400: "Malformed, or out of bounds.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "A quota is spent; see Retry-After.",
    502: "The engine broke off before its first byte.",
    504: "The engine did not answer in time.",
}
_OWN: Final = {
    routes.MODELS: "The models of this key.",
    routes.VERSION: "Galerne's version.",
    routes.OPENAPI: "This document.",
}
_USAGE: Final = "What the key's tenant used, what is left of its quota, and what of it waits; for the scope 'usage'."
_MOMENT: Final = {
    "oneOf": [
        {"type": "string", "format": "date"},
        {"type": "string", "format": "date-time"},
        {"type": "integer", "minimum": 0, "maximum": 10**usage.SECONDS_LENGTH - 1},
    ]
}
_COUNT: Final = {"type": "integer", "minimum": 0}


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    kinds = {kind: _shown(struct) for kind, (struct, _) in _BODIES.items()}
    _, schemas = msgspec.json.schema_components(kinds.values(), ref_template=_REF)
    for kind, (struct, required) in _BODIES.items():
        schemas[struct.__name__]["required"] = list(required)
        schemas[struct.__name__]["description"] = f"What the gateway reads of a {kind} body; the engine reads it too."
    paths: dict[str, Any] = {path: {"post": _relayed(route)} for path, route in routes.RELAYED.items()}
    paths |= {path: {"get": _operation(summary)} for path, summary in _OWN.items()}
    paths[routes.USAGE] = {"get": _usage()}
    told = _operation(
        "A model's tokenizer, as vLLM tells of it.", {400: "The key has several models and none is named."}
    )
    told["parameters"] = [_parameter("model", "Absent: the key's only model.", {"type": "string", "minLength": 1})]
    paths[routes.TOKENIZER_INFO] = {"get": told}
    one = _operation("One model; an id may hold a slash.")
    one["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    paths[routes.MODEL_PREFIX + "{id}"] = {"get": one}
    for path, statuses in ((routes.LIVE, (200,)), (routes.READY, (200, 503))):
        answers = {
            str(status): {"description": "Live, ready or starting.", "content": _json({})} for status in statuses
        }
        paths[path] = {
            "get": {
                "summary": "Health, for probes.",
                "security": [],
                "responses": answers | _errors({405: _EVERY[405]}),
            }
        }
    for path in (routes.HEALTH, routes.PING):
        probe = {str(status): {"description": "Without a body."} for status in (200, 503)}
        paths[path] = {
            "get": {
                "summary": "Ready or not, for tools made for vLLM's servers.",
                "security": [],
                "responses": probe | _errors({405: _EVERY[405]}),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Galerne",
            "version": __version__,
            "description": "OpenAI's API on open-weight models of one's own. Differences: docs/api.md.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": _ERROR},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key, or a token of an issuer."}
            },
        },
    }


def _relayed(route: routes.EngineRoute) -> dict[str, Any]:
    struct, _ = _BODIES[route.kind]
    found = _operation(f"For models of the task {' or '.join(sorted(route.tasks))}.", _RELAYED)
    found["requestBody"] = {"required": True, "content": _json({"$ref": _REF.format(name=struct.__name__)})}
    # The engine's answer, or with `stream` its events.
    found["responses"]["200"]["content"]["text/event-stream"] = {}
    return found


def _usage() -> dict[str, Any]:
    more = {400: "A parameter that is not known or out of bounds.", 429: "One question of a tenant at a time."}
    found = _operation(_USAGE, more)
    found["parameters"] = [
        _parameter("from", "Requests that began at or after it; absent: the month's beginning.", _MOMENT),
        _parameter("to", "Requests that began before it; absent: now.", _MOMENT),
        _parameter("model", "Of these models alone.", _several({"type": "string", "minLength": 1}, usage.MOST_MODELS)),
        _parameter("group_by", "Absent: totals.", _several({"enum": list(usage.GROUPS)}, len(usage.GROUPS))),
    ]
    result = _object(
        dict.fromkeys(usage.RESULT_COUNTS, _COUNT) | {name: _or_null("string") for name in ("model", "api_key_id")}
    )
    bucket = _object({"start_time": _COUNT, "end_time": _COUNT, "results": {"type": "array", "items": result}})
    limit = _object(
        {
            "limit": _COUNT,
            "used": _or_null("integer"),
            "remaining": _or_null("integer"),
            "resets_in_s": _or_null("number"),
        }
    )
    lane = {"waiting": _COUNT, "in_flight": _COUNT}
    models = {"type": "array", "items": _object({"model": {"type": "string"}} | lane)}
    page = _object(
        {
            "object": {"const": "page"},
            "data": {"type": "array", "items": bucket},
            "covers": {"enum": ["cluster", "host"]},
            "quota": {"type": "object", "additionalProperties": limit},
            "queue": _object(lane | {"models": models}),
        }
    )
    found["responses"]["200"]["content"] = _json(page)
    return found


def _parameter(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _several(item: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _or_null(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


def _operation(summary: str, more: dict[int, str] | None = None) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": "As asked for.", "content": _json({})}} | _errors(_EVERY | (more or {})),
    }


def _errors(statuses: dict[int, str]) -> dict[str, Any]:
    error = _json({"$ref": _REF.format(name="Error")})
    return {str(status): {"description": text, "content": error} for status, text in sorted(statuses.items())}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


@cache
def _shown(struct: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """The struct as it is documented: without what is refused, and with anything where it keeps the client's bytes."""
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(struct):
        media = struct is shapes.Part and field.type is msgspec.Raw
        if field.name in REFUSED or media:
            continue
        default = None if field.default is shapes.ABSENT else field.default
        fields.append((field.encode_name, _plain(field.type), default))
    return msgspec.defstruct(struct.__name__, fields, kw_only=True, module=__name__)


def _plain(found: Any) -> Any:
    """A type without what only a decoder knows."""
    origin = get_origin(found)
    if found is msgspec.Raw:
        return Any
    if origin is Annotated:
        inner, *meta = get_args(found)
        return Annotated[(_plain(inner), *meta)]
    if origin in {Union, UnionType}:
        return Union[tuple(_plain(part) for part in get_args(found))]  # noqa: UP007 - parts made as it runs
    if origin in {list, dict}:
        return origin[tuple(_plain(part) for part in get_args(found))]
    return _shown(found) if isinstance(found, type) and issubclass(found, msgspec.Struct) else found
