"""What browsers ask before a page of another origin may call the API (the Fetch standard's CORS protocol).

A browser sends no key with its question (the preflight), so it is answered before keys are looked at; it says which
origins may call, and nothing about any model or tenant. Promises: without `gateway.cors` no origin may; cookies and
other credentials of the browser's own are never allowed, because keys travel in `Authorization`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from serving.config import CorsConfig

Headers = list[tuple[bytes, bytes]]

ANY: Final = "*"
# What scripts may read of an answer; everything else is hidden from them.
EXPOSED: Final = b"retry-after, x-request-id, x-galerne-left-out, x-galerne-lowered, x-galerne-route"
# Names of headers as a browser lists them; SDKs in browsers send a dozen of their own.
_NAMES: Final = re.compile(rb"[A-Za-z0-9\-_, ]{1,2048}")


def answer_headers(cors: CorsConfig | None, origin: bytes | None) -> Headers:
    """Headers of every answer to a page of this origin; none where it may not call."""
    if cors is None or origin is None:
        return []
    allowed = _allowed(cors, origin)
    if allowed is None:
        return []
    return [
        (b"access-control-allow-origin", allowed),
        (b"access-control-expose-headers", EXPOSED),
        (b"vary", b"origin"),
    ]


def preflight(cors: CorsConfig | None, headers: Mapping[bytes, bytes], methods: tuple[str, ...]) -> Headers | None:
    """Headers of the answer to a browser's question, beside `answer_headers`; None where it is refused or none."""
    origin = headers.get(b"origin")
    if cors is None or origin is None or b"access-control-request-method" not in headers:
        return None
    if _allowed(cors, origin) is None:
        return None
    found = [
        (b"access-control-allow-methods", ", ".join(methods).encode()),
        (b"access-control-max-age", b"%d" % cors.max_age_s),
    ]
    asked = headers.get(b"access-control-request-headers", b"")
    if _NAMES.fullmatch(asked):
        found.append((b"access-control-allow-headers", asked))
    return found


def _allowed(cors: CorsConfig, origin: bytes) -> bytes | None:
    if ANY in cors.origins:
        return ANY.encode()
    return origin if origin.decode("latin-1") in cors.origins else None
