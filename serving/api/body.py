"""Reads a request body once, bounded in bytes and time, and in what all bodies under way take together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from serving.errors import BadRequest, GalerneError, PayloadTooLarge, RequestTimeout, UnsupportedEncoding

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


# More digits than any length has; Python refuses to read some thousands of them.
MAX_LENGTH_DIGITS = 18
# A body as it is: no coding at all.
IDENTITY = frozenset({b"", b"identity"})


class ClientLeft(GalerneError):
    """The client closed its connection; there is nobody to answer."""

    # As nginx and HAProxy log it.
    status = 499


async def read_body(
    headers: Mapping[bytes, bytes],
    receive: Receive,
    *,
    limit_bytes: int,
    timeout_s: float,
    room: Callable[[int], None],
) -> bytes:
    """The whole body; raises PayloadTooLarge, UnsupportedEncoding, RequestTimeout, BadRequest or ClientLeft.

    `room(bytes)` is asked before so many more are taken, and raises where there is none: for a declared length at once
    and as a whole, else for each part. A declared length over the limit is refused before a byte is read; an undeclared
    one when it gets there.
    """
    if headers.get(b"content-encoding", b"").strip().lower() not in IDENTITY:
        raise UnsupportedEncoding(
            "The request body has a Content-Encoding; compressed bodies are not read here. Send it as plain JSON."
        )
    content_length = headers.get(b"content-length")
    if content_length is not None:
        if not content_length.isdigit():
            raise BadRequest("The content-length header is not a number.")
        if len(content_length) > MAX_LENGTH_DIGITS or int(content_length) > limit_bytes:
            raise _too_large(limit_bytes)
        room(int(content_length))
    # One buffer, not a list: a body that comes byte by byte must not cost an object a byte.
    first, rest, size = b"", bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft("the client left before its request was whole")
                part: bytes = message.get("body", b"")
                size += len(part)
                if size > limit_bytes:
                    raise _too_large(limit_bytes)
                if content_length is None:
                    room(len(part))
                if size == len(part):
                    first = part
                else:
                    rest += part
                if not message.get("more_body", False):
                    return first + rest if rest else first
    except TimeoutError:
        raise _too_slow(timeout_s) from None


def _too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request body is larger than the limit of {limit_bytes} bytes. Send less, or ask the operator "
        "to raise limits.body_bytes."
    )


def _too_slow(timeout_s: float) -> RequestTimeout:
    return RequestTimeout(f"The request body did not arrive within {timeout_s:g} seconds.")
