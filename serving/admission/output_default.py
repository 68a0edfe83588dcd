"""The number of output tokens for requests that name none, where a tenant has a bound of its own.

Without it such a request would run to the model's context, and the tenant's bound would hold only for the polite. It
goes behind the client's fields as the cache salt does: of a key that stands twice the engine takes the last, so a null
that the client sent is void. A prompt that leaves less room in the context than that number is refused by the engine,
as it is for a client that asked for as much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serving.admission.bounds import BodyKind, RequestFacts

# /v1/completions has a default of its own, far below any bound.
_FIELDS: Final = {BodyKind.CHAT: b"max_completion_tokens", BodyKind.RESPONSES: b"max_output_tokens"}
_JSON_SPACE: Final = b" \t\r\n"


def bounded(kind: BodyKind, body: bytes, facts: RequestFacts, tokens: int | None) -> tuple[bytes, RequestFacts]:
    """Body and facts with the default, where the request needs one; `body` is a JSON object that is not empty."""
    field = _FIELDS.get(kind)
    if tokens is None or field is None or facts.max_output_tokens is not None:
        return body, facts
    whole = body.rstrip(_JSON_SPACE)[:-1] + b',"%b":%d}' % (field, tokens)
    return whole, replace(facts, max_output_tokens=tokens)
