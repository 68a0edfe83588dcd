"""The private HTTP server of an engine replica: its own OpenAI app, for the gateway alone.

An engine's app can pause it, load weights or run code, so its port asks for the cluster's engine token on every
route but `/health` and `/metrics`, whatever network policy is around it. The server also knows what is in
flight, which is what a graceful drain waits for: Ray does not see these requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import uvicorn

from serving.errors import EngineError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_HEADER = b"x-galerne-engine-token"
OPEN_PATHS = frozenset({"/health", "/metrics"})
# Longer than the gateway keeps an idle connection, so that the gateway is always the one to close.
KEEP_ALIVE_S = 75
BACKLOG = 2048
# What is still in flight when the server stops gets this long, and is then cut.
STOP_GRACE_S = 1
REFUSAL = b'{"error":{"message":"This port is for the gateway.","type":"invalid_request_error","param":null,"code":"permission_denied"}}'  # noqa: E501


class Gate:
    """Lets requests with the token through to the engine's app, and counts them."""

    def __init__(self, app: App, token: str) -> None:
        self._app = app
        self._token = token.encode()
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            if scope["type"] != "websocket":
                await self._app(scope, receive, send)
            return
        presented = next((v for n, v in scope["headers"] if n == TOKEN_HEADER), b"")
        if not hmac.compare_digest(presented, self._token):
            await send(
                {
                    "type": "http.response.start",
                    "status": 403,
                    "headers": [(b"content-type", b"application/json")],
                }
            )
            await send({"type": "http.response.body", "body": REFUSAL})
            return
        self.in_flight += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process belongs to Ray; its signals too


class PrivateServer:
    """Serves an engine's app on a free port of one interface."""

    def __init__(self, app: App, *, host: str, token: str) -> None:
        self.gate = Gate(app, token)
        self.host = host
        self.port = 0
        # The lifespan runs in `start`'s server: vLLM's app starts its statistics there.
        config = uvicorn.Config(
            self.gate,
            log_level="warning",
            access_log=False,
            http="httptools",
            loop="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
            server_header=False,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def server(self) -> uvicorn.Server:
        """The uvicorn server; vLLM's app asks it to stop when its core has died."""
        return self._server

    async def start(self) -> None:
        """Bind and serve; raises EngineError where the interface cannot be bound."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family)
        try:
            listener.bind((self.host, 0))
        except OSError as error:
            listener.close()
            raise EngineError(f"the engine cannot listen on {self.host}: {error.strerror}") from error
        self.port = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="engine-http")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise EngineError("the engine's HTTP server ended while it was starting")
            await asyncio.sleep(0.01)

    def check_health(self) -> None:
        """Raise EngineError where the server no longer takes requests."""
        if self._task is None or self._task.done() or self._server.should_exit:
            raise EngineError("the engine's HTTP server has ended")

    async def wait_ended(self) -> None:
        """Return when the server no longer takes requests: vLLM's app stops it when its core has died."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False where `timeout_s` ended first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.gate.idle()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Close the port and every connection, and end the app's lifespan."""
        # Not force_exit: uvicorn then leaves open connections and the lifespan's task behind.
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=5)
