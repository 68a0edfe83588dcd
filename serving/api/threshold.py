"""What stands between uvicorn and Ray Serve, in every process of the cluster that speaks HTTP to clients.

Ray reads headers and paths of its own before the gateway's app sees a request, decodes them, and answers some itself,
in its own words. HAProxy keeps those out, but whoever reaches a gateway's port or Ray's fallback proxy comes past it.
Ray lets a middleware stand in front of its own app (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `middlewares`).

It promises: no header steers Ray or makes it fail; the id that Ray logs and echoes is the gateway's own; Ray's pages
answer nobody; and an answer that is given before the request has ended closes its connection.
"""

from __future__ import annotations

import math
from typing import Any, Final

from starlette.middleware import Middleware

from serving.api import errors
from serving.api.body import Message, Receive, Scope, Send
from serving.api.call import REQUEST_ID
from serving.cluster import edge
from serving.cluster.haproxy import RAY_HEADERS
from serving.errors import NotFound

_STEERING: Final = frozenset(name.encode() for name in RAY_HEADERS)
# Ray decodes it as UTF-8, in each spelling. The gateway takes any bytes; what Ray cannot read names no conversation.
_SESSION: Final = b"x-session-id"
_ID: Final = b"x-request-id"
# HAProxy asks it of every gateway; it says whether one is up, and nothing else.
_HEALTH: Final = "/-/healthz"
_RAYS_OWN: Final = "/-/"
# HAProxy takes such an answer whole before it hands it on; it fits in the smallest buffer beside its headers.
EARLY_BYTES: Final = 8192

Headers = list[tuple[bytes, bytes]]


class Threshold:
    """ASGI 3 middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        scope["headers"] = kept(scope["headers"])
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        request = _Request(scope["headers"], receive, send)
        path: str = scope["path"]
        if not path.startswith("/") or (path.startswith(_RAYS_OWN) and path != _HEALTH):
            await _no_route(request.send)
        else:
            await self._app(scope, request.receive, request.send)


class _Request:
    """Knows whether the request's body has been read to its end."""

    __slots__ = ("_receive", "_send", "_whole")

    def __init__(self, headers: Headers, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._whole = not _has_body(headers)

    async def receive(self) -> Message:
        message = await self._receive()
        self._whole = self._whole or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._whole:
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            if _length(headers) <= EARLY_BYTES:
                headers.append((edge.EARLY.encode(), b"1"))
            message = {**message, "headers": headers}
        await self._send(message)


def kept(headers: Headers) -> Headers:
    """The headers of a request without those that Ray obeys or fails on, and with at most one id, of an id's form."""
    ids = [value for name, value in headers if name == _ID]
    good = len(ids) == 1 and REQUEST_ID.fullmatch(ids[0]) is not None

    def keep(name: bytes, value: bytes) -> bool:
        # As Ray reads them.
        plain = name.replace(b"_", b"-")
        return plain not in _STEERING and (plain != _SESSION or _is_utf8(value)) and (good or name != _ID)

    return [(name, value) for name, value in headers if keep(name, value)]


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(Threshold)]


def _length(headers: Headers) -> float:
    return next((int(value) for name, value in headers if name == b"content-length"), math.inf)


def _has_body(headers: Headers) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


async def _no_route(send: Send) -> None:
    error = NotFound("There is no such route here.")
    await send({"type": "http.response.start", "status": error.status, "headers": errors.headers(error)})
    await send({"type": "http.response.body", "body": errors.body(error)})
