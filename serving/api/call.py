"""One HTTP request as the gateway's story reads it, and how to answer it without an engine."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, Final

from serving.api import errors
from serving.api.body import Receive, Scope, Send
from serving.api.ops import Answer
from serving.errors import MethodNotAllowed, RequestError
from serving.metrics.table import NO_MODEL, NO_TENANT

REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
WEBSOCKET_POLICY: Final = 1008
OTHER_ROUTE: Final = "other"

Headers = list[tuple[bytes, bytes]]


class Call:
    """One HTTP request as the story reads it, and how to answer it without an engine.

    `route`, `model` and `tenant` are label values of the metrics, filled in as the story learns them; all come
    from bounded sets.
    """

    __slots__ = (
        "extra",
        "headers",
        "method",
        "model",
        "path",
        "receive",
        "request_id",
        "route",
        "scope",
        "send",
        "tenant",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, echo_request_id: bool) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = _request_id(self.headers.get(b"x-request-id"))
        self.extra: Headers = [(b"x-request-id", self.request_id.encode())] if echo_request_id else []
        self.route = OTHER_ROUTE
        self.model = NO_MODEL
        self.tenant = NO_TENANT

    def takes(self, methods: tuple[str, ...]) -> None:
        """Refuse every other method of `route`; raises MethodNotAllowed."""
        if self.method not in methods:
            raise MethodNotAllowed(f"{self.route} takes {' or '.join(methods)}.", allow=methods)

    async def refuse(self, error: RequestError) -> None:
        """Answer with OpenAI's error body."""
        await self._answer(error.status, errors.body(error), errors.headers(error))

    async def answer(self, answer: Answer) -> int:
        """Give an answer that is ready; returns its status."""
        await self._answer(answer.status, answer.body, list(answer.headers))
        return answer.status

    async def answer_json(self, status: int, content: dict[str, Any]) -> int:
        """Answer with JSON; returns the status."""
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._answer(status, body, headers)
        return status

    async def _answer(self, status: int, body: bytes, headers: Headers) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers + self.extra})
        # The server drops the body of an answer to HEAD.
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _request_id(presented: bytes | None) -> str:
    if presented is not None and REQUEST_ID.fullmatch(presented):
        return presented.decode()
    return uuid.uuid4().hex


async def refuse_other_protocols(scope: Scope, receive: Receive, send: Send) -> None:
    """End what is not HTTP: WebSockets are refused, the server's lifespan is acknowledged."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": WEBSOCKET_POLICY})
    elif scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
