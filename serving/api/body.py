"""Reads a request body once, bounded in bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.errors import BadRequest, GalerneError, PayloadTooLarge, RequestTimeout

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


# More digits than any length has; Python refuses to read some thousands of them.
MAX_LENGTH_DIGITS = 18


class ClientLeft(GalerneError):
    """The client closed its connection; there is nobody to answer."""

    # As nginx and HAProxy log it.
    status = 499


async def read_body(content_length: bytes | None, receive: Receive, *, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body; raises PayloadTooLarge, RequestTimeout, BadRequest or ClientLeft.

    A declared length over the limit is refused before a byte is read; an undeclared one when it gets there.
    """
    if content_length is not None:
        if not content_length.isdigit():
            raise BadRequest("The content-length header is not a number.")
        if len(content_length) > MAX_LENGTH_DIGITS or int(content_length) > limit_bytes:
            raise _too_large(limit_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft("the client left before its request was whole")
                part: bytes = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > limit_bytes:
                    raise _too_large(limit_bytes)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError:
        raise _too_slow(timeout_s) from None


def _too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request body is larger than the limit of {limit_bytes} bytes. Send less, or ask the operator "
        "to raise limits.body_bytes."
    )


def _too_slow(timeout_s: float) -> RequestTimeout:
    return RequestTimeout(f"The request body did not arrive within {timeout_s:g} seconds.")
