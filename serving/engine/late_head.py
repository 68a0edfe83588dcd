"""Streams of vLLM's /v1/responses begin when there is something to say.

vLLM sends the events `response.created` and `response.in_progress` before its engine has looked at the request. What
the engine refuses then (a schema that does not compile, a value beyond the model) ends in a closed connection: whoever
waits for an answer hears nothing of why.

Promise: the head and those two events go out with the first event after them, so nothing is later than before that a
model has computed; what is refused until then is an answer with vLLM's own status and words.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Final

import msgspec

PATH: Final = "/v1/responses"
EVENT_STREAM: Final = b"text/event-stream"
BEFORE: Final = (b"event: response.created\n", b"event: response.in_progress\n")
START, BODY = "http.response.start", "http.response.body"

Message = MutableMapping[str, Any]
# An exception's status and vLLM's error object for it.
Told = Callable[[Exception], tuple[int, dict[str, Any]]]


class LateHead:
    """vLLM's app behind it (ASGI 3)."""

    def __init__(self, app: Any, told: Told) -> None:
        self._app = app
        self._told = told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        held: list[Message] = []
        begun = False

        async def hold(message: Message) -> None:
            nonlocal begun
            if not begun:
                held.append(message)
                if _waits(message):
                    return
                begun = True
                for early in held[:-1]:
                    await send(early)
            await send(message)

        try:
            await self._app(scope, receive, hold)
        except Exception as error:
            if begun or not held:
                raise
            # Starlette's way to say that an answer has begun when something is raised.
            cause = error.__cause__ if isinstance(error, RuntimeError) else None
            status, body = self._told(cause if isinstance(cause, Exception) else error)
            content = msgspec.json.encode(body)
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
            await send({"type": START, "status": status, "headers": headers})
            await send({"type": BODY, "body": content, "more_body": False})


def _waits(message: Message) -> bool:
    """Whether an answer goes on without having said anything yet."""
    if message["type"] == START:
        kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
        return any(kind.startswith(EVENT_STREAM) for kind in kinds)
    return bool(message.get("more_body")) and message.get("body", b"").startswith(BEFORE)
