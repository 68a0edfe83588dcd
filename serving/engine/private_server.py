"""The private HTTP server of an engine replica: its own OpenAI app, for the gateway alone.

An engine's app can pause it, load weights or run code, so its port asks for the cluster's engine token on every
route but `/health` and `/metrics`, whatever network policy is around it. The server also knows what is in
flight, which is what a graceful drain waits for: Ray does not see these requests. Whose they are it tells gateways
(serving.engine.load), with the engine's own load, in the head of every answer, and
hands on what they tell one another (serving.engine.placements).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import uvicorn

from serving.cluster.edge import ENGINE_TOKEN_HEADER
from serving.engine.load import GATEWAY_HEADER, LOAD_HEADER, EngineLoad, Said, Shares, Visit, written
from serving.engine.placements import EXCHANGE, MOST_BYTES, NUMBER_BYTES, Placements, is_message
from serving.engine.work import ACCOUNTS, Accounts, current
from serving.errors import EngineError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_HEADER = ENGINE_TOKEN_HEADER.encode()
REQUEST_ID = b"x-request-id"
BEARER = b"Bearer "
OCTETS = b"application/octet-stream"
OPEN_PATHS = frozenset({"/health", "/metrics"})
# Longer than the gateway keeps an idle connection, so that the gateway is always the one to close.
KEEP_ALIVE_S = 75
BACKLOG = 2048
# What is still in flight when the server stops gets this long, and is then cut.
STOP_GRACE_S = 1
REFUSAL = b'{"error":{"message":"This port is for the gateway.","type":"invalid_request_error","param":null,"code":"permission_denied"}}'  # noqa: E501


class Gate:
    """Lets requests with the token through to the engine's app, and counts them."""

    def __init__(self, app: App, token: str, load: Callable[[], EngineLoad] | None = None) -> None:
        self._app = app
        self._load = load
        self._shares = Shares()
        self._placements = Placements()
        self._token = token.encode()
        # Set when it has drained: what still comes is refused, and goes to another replica.
        self.closed = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._accounts = Accounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            if scope["type"] == "http":
                asking = next((value for name, value in scope["headers"] if name == GATEWAY_HEADER), b"")
                send = self._saying(asking, send)
            if scope["type"] != "websocket":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._knows(headers):
            await send(
                {
                    "type": "http.response.start",
                    "status": 403,
                    "headers": [(b"content-type", b"application/json")],
                }
            )
            await send({"type": "http.response.body", "body": REFUSAL})
            return
        if scope["path"].startswith(ACCOUNTS):
            await self._account(scope["path"], send)
            return
        if scope["path"] == EXCHANGE and TOKEN_HEADER in headers:
            gateway = headers.get(GATEWAY_HEADER, b"")
            await self._exchange(gateway, receive, self._saying(gateway, send))
            return
        if self.closed:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b""})
            return
        self.in_flight += 1
        self._idle.clear()
        # Others than gateways come with a bearer key, and with ids of their own that no ledger has.
        own = TOKEN_HEADER in headers
        request_id = headers.get(REQUEST_ID, b"").decode("latin-1") if own else ""
        signature = headers.get(GATEWAY_HEADER, b"") if own else b""
        visit = self._shares.begin(signature)
        account = self._accounts.open(request_id)
        current.set(account)
        try:
            await self._app(scope, receive, self._saying(signature, send, visit))
        finally:
            visit.end()
            self._accounts.close(request_id)
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    def _saying(self, signature: bytes, send: Send, visit: Visit | None = None) -> Send:
        """`send` that adds the load to the answer's head, and notes its first byte."""
        load = self._load
        if load is None:
            return send

        # Not a coroutine of its own: it is called once a token.
        def saying(message: MutableMapping[str, Any]) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                said = written(Said(load(), self._shares.others(signature)))
                message = {**message, "headers": [*message.get("headers", ()), (LOAD_HEADER, said)]}
            elif visit is not None and visit.waiting_tokens and message.get("body"):
                visit.answered()
            return send(message)

        return saying

    async def _account(self, path: str, send: Send) -> None:
        body = self._accounts.answer(path)
        await _answer(send, 404 if body is None else 200, body or b"{}", b"application/json")

    async def _exchange(self, gateway: bytes, receive: Receive, send: Send) -> None:
        message, more = bytearray(), True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            message += event.get("body", b"")
            more = event.get("more_body", False)
            if len(message) > MOST_BYTES + NUMBER_BYTES:
                await _answer(send, 413, b"", OCTETS, close=more)
                return
        if is_message(message):
            await _answer(send, 200, self._placements.exchange(gateway, bytes(message)), OCTETS)
        else:
            await _answer(send, 400, b"", OCTETS)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        """The token in its own header, or as a bearer key for what can send no other (routers of other makers)."""
        own = headers.get(TOKEN_HEADER, b"")
        bearer = headers.get(b"authorization", b"").removeprefix(BEARER)
        # Both are compared, whatever the first says: the time taken tells nothing.
        return hmac.compare_digest(own, self._token) | hmac.compare_digest(bearer, self._token)

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()


async def _answer(send: Send, status: int, body: bytes, media_type: bytes, *, close: bool = False) -> None:
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body))]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process belongs to Ray; its signals too


class PrivateServer:
    """Serves an engine's app on a free port of one interface."""

    def __init__(self, app: App, *, host: str, token: str, load: Callable[[], EngineLoad] | None = None) -> None:
        """`load` is asked for each answer's head; without it the load is not said."""
        self.gate = Gate(app, token, load)
        self.host = host
        self.port = 0
        # The lifespan runs in `start`'s server: vLLM's app starts its statistics there.
        config = uvicorn.Config(
            self.gate,
            # uvicorn's own configuration of logs closes every handler of the process. In a replica's these are Ray
            # Serve's, and a controller that comes back stops each replica that has lost them.
            log_config=None,
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
        """Wait until nothing is in flight, and then refuse what comes; False where `timeout_s` ended first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.gate.in_flight:  # one may have come since the last one ended
                    await self.gate.idle()
        except TimeoutError:
            return False
        finally:
            # In the same turn of the loop: no answer begins between the last and the end.
            self.gate.closed = True
        return True

    async def stop(self) -> None:
        """Close the port and every connection, and end the app's lifespan."""
        # Not force_exit: uvicorn then leaves open connections and the lifespan's task behind.
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=5)
