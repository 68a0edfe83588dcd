"""One request and its answer over raw ASGI, with the faults the fake engine plays on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from serving.engine.fake.protocol import RefusalError

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"


class Exchange:
    """Reads the request, writes the answer, and tells when the client has gone."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        # A fault may put itself before it.
        self.send = send

    async def body(self) -> bytes:
        """The whole request body. Raises ConnectionError where the client goes before it is complete."""
        parts = []
        while True:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise ConnectionResetError
            parts.append(event.get("body", b""))
            if not event.get("more_body", False):
                return b"".join(parts)

    async def disconnected(self) -> None:
        """Returns when the client has gone (or the answer is complete)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def watch(self, on_disconnect: Callable[[], None]) -> asyncio.Task[None]:
        """Calls back when the client goes; the caller cancels the task once it no longer matters."""
        task = asyncio.create_task(self.disconnected())
        task.add_done_callback(lambda done: None if done.cancelled() else on_disconnect())
        return task

    async def start_stream(self) -> None:
        """Status and headers of an event stream."""
        await self._start(200, EVENT_STREAM, None)

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Part of the answer's body."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, body: bytes, *, status: int = 200, content_type: bytes = JSON) -> None:
        """A whole answer."""
        await self._start(status, content_type, len(body))
        await self.write(body, more=False)

    async def json(self, value: object) -> None:
        """A whole answer in JSON."""
        await self.answer(msgspec.json.encode(value))

    async def refuse(self, refusal: RefusalError) -> None:
        """An error answer."""
        await self.answer(msgspec.json.encode(refusal.body()), status=refusal.status)

    async def _start(self, status: int, content_type: bytes, length_bytes: int | None) -> None:
        headers = [(b"content-type", content_type)]
        if length_bytes is not None:
            headers.append((b"content-length", b"%d" % length_bytes))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
