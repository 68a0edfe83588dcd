"""The number of output tokens: for requests that name none, where a tenant has a bound of its own; and none for
requests that name more than the model has room for.

Without it such a request would run to the model's context, and the tenant's bound would hold only for the polite. It
goes behind the client's fields as the cache salt does: of a key that stands twice the engine takes the last, so a null
that the client sent is void.

A prompt that leaves less room in the context than that number, the client's or the tenant's, is refused by the engine.
Clients such as coding agents always ask for the same large number, and would have to know each model's context. So the
request goes to the engine again without a number: the answer then ends where the context does, which is less than was
asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serving.admission.bounds import BodyKind, RequestFacts

# /v1/completions has a default of its own, far below any bound.
_FIELDS: Final = {BodyKind.CHAT: b"max_completion_tokens", BodyKind.RESPONSES: b"max_output_tokens"}
# Null: as much as there is room for.
_ROOM: Final = {
    "/v1/chat/completions": b',"max_tokens":null,"max_completion_tokens":null}',
    "/v1/completions": b',"max_tokens":null}',
    "/v1/responses": b',"max_output_tokens":null}',
}
_JSON_SPACE: Final = b" \t\r\n"


def bounded(kind: BodyKind, body: bytes, facts: RequestFacts, tokens: int | None) -> tuple[bytes, RequestFacts]:
    """Body and facts with the default, where the request needs one; `body` is a JSON object that is not empty."""
    field = _FIELDS.get(kind)
    if tokens is None or field is None or facts.max_output_tokens is not None:
        return body, facts
    whole = body.rstrip(_JSON_SPACE)[:-1] + b',"%b":%d}' % (field, tokens)
    return whole, replace(facts, max_output_tokens=tokens)


def with_room(path: str, body: bytes) -> bytes | None:
    """The body of a request on this route, for as many output tokens as there is room for; None where it has none.

    `body` is a JSON object that is not empty, and ends with it.
    """
    end = _ROOM.get(path)
    return None if end is None else body[:-1] + end
