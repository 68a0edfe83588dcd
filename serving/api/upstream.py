"""HTTP/1.1 towards engine replicas: pooled connections whose response bytes are handed on as they come.

The relay's cost is a cost per token of every stream, so this is the one place where a general HTTP client is not
used: httptools (uvicorn's parser) on a bare asyncio protocol, with nothing between the socket and the relay
(`make bench-overhead` measures the sum). It speaks to vLLM's uvicorn alone: no redirects, no compression, no TLS,
one request at a time on a connection.

A request whose bytes went out is never sent again. That needs idle connections that are surely alive: they
are dropped here well before the engine's keep-alive ends, and at once when the engine closes them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Literal

import httptools

from serving.cluster.edge import ENGINE_TOKEN_HEADER
from serving.engine.load import GATEWAY_HEADER, LOAD_HEADER, Said, read
from serving.errors import GalerneError
from serving.routing.replicas import Endpoint

IDLE_EXPIRY_S = 30.0  # the engine's server keeps idle connections 75 s
MAX_IDLE_PER_ENGINE = 1024
BUFFER_HIGH_BYTES = 256 * 1024  # a slow reader stops the engine's socket here

FailureKind = Literal["connect", "broken", "timeout", "server_error", "stalled"]


class UpstreamError(GalerneError):
    """The engine side failed: `kind` is connect (nothing was sent), broken, timeout (no first byte in time),
    server_error (an answer of 500 and above) or stalled (nothing comes, and the replica does not answer probes).
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message


class Connection(asyncio.Protocol):
    """One connection to an engine; carries one request at a time."""

    __slots__ = (
        "_bytes",
        "_chunks",
        "_closed",
        "_error",
        "_head_done",
        "_keep_alive",
        "_loop",
        "_on_closed",
        "_on_said",
        "_parser",
        "_paused",
        "_transport",
        "_waiter",
        "done",
        "fingerprint",
        "headers",
        "idle_since",
        "reads",
        "received",
        "status",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_closed: Callable[[Connection], None],
        on_said: Callable[[Said], None] = lambda _: None,
    ) -> None:
        """`on_said` is told of the load that an answer's head says; it is not among the answer's headers."""
        self._loop = loop
        self._on_closed = on_closed
        self._on_said = on_said
        self._transport: asyncio.Transport | None = None
        self._closed = False
        self.idle_since = 0.0
        # How its engine marks a stream's last token (serving.metering.answers); None: not seen yet.
        self.fingerprint: bytes | None = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamError | None = None
        self._head_done = False
        self._keep_alive = False
        self.done = True
        # How often bytes came and were taken: what the gateway's watch looks at.
        self.received = 0
        self.reads = 0
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self.done:  # bytes nobody asked for: never trust what comes next on this connection
            self.abort()
            return
        self.received += 1
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(UpstreamError("broken", f"the engine's answer is not HTTP: {error}"))
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol names it
        self._closed = True
        if not self.done:
            self._fail(UpstreamError("broken", "the engine closed the connection before its answer ended"))
        self._on_closed(self)

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self.done:  # stops the parser: an answer nobody asked for must not run into the one before it
            raise UpstreamError("broken", "the engine sent more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name != LOAD_HEADER:
            self.headers.append((name, value))
        elif (said := read(value)) is not None:
            self._on_said(said)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status >= 200:  # noqa: PLR2004 - 1xx are interim, the real head follows
            self._head_done = True
            self._wake()
        else:
            self.headers.clear()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._bytes += len(body)
        if self._bytes > BUFFER_HIGH_BYTES and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True
        self._wake()

    def on_message_complete(self) -> None:
        if self._head_done:
            # Only here does the parser know; afterwards it has forgotten.
            self._keep_alive = self._parser.should_keep_alive()
            self.done = True
            self._wake()

    # -- the request

    @property
    def closed(self) -> bool:
        """Whether no bytes pass any more; the loop tells the protocol a moment later than the transport."""
        return self._closed or (self._transport is not None and self._transport.is_closing())

    def send(self, head: bytes, body: bytes) -> None:
        """Write one request; the connection must be idle."""
        if self._transport is None or self.closed or not self.done:
            raise RuntimeError("send on a connection that is not idle")
        self._reset()
        self.done = False
        self._transport.writelines((head, body))

    async def head(self) -> int:
        """The response's status, when its headers are here; raises UpstreamError."""
        while not self._head_done:
            await self._wait()
        return self.status

    @property
    def has_begun(self) -> bool:
        """Whether the body's first bytes are here, or it has none."""
        return self._head_done and (bool(self._chunks) or self.done)

    async def begun(self) -> bytes:
        """The body's first bytes, which `read` gives again; b"" where it has none; raises UpstreamError."""
        while not self.has_begun:
            await self._wait()
        return b"".join(self._chunks)

    async def read(self) -> bytes:
        """The next body bytes, everything that has come so far; b"" at the end; raises UpstreamError."""
        self.reads += 1
        while not self._chunks:
            if self.done:
                return b""
            await self._wait()
        chunk = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._bytes = 0
        if self._paused and self._transport is not None and not self.closed:
            self._transport.resume_reading()
            self._paused = False
        return chunk

    @property
    def read_waits(self) -> bool:
        """Whether the reader waits for the engine; if not it is busy, perhaps with a client that does not read."""
        return self._waiter is not None

    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        # With bytes left unread the transport may be paused, and the next answer would never come.
        return self.done and not self._chunks and not self.closed and self._error is None and self._keep_alive

    def abort(self) -> None:
        """Close at once; an engine takes it as the client's leaving and stops computing."""
        if self._transport is not None and not self.closed:
            self._transport.abort()

    def fail(self, error: UpstreamError) -> None:
        """Make the reader see `error` now (a stalled stream, a client that left)."""
        self._fail(error)
        self.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not self._chunks:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None and not self.done:
            self._error = error
        self._wake()


class Pool:
    """Idle connections, of those engines that are to be kept. Used from one event loop only."""

    def __init__(
        self,
        connect_timeout_s: float,
        gateway: bytes = b"",
        on_said: Callable[[Endpoint, Said], None] = lambda *_: None,
    ) -> None:
        """`gateway`: what this one is called at engines; `on_said` is told of the load in any answer's head."""
        self._connect_timeout_s = connect_timeout_s
        self.gateway = gateway
        self._on_said = on_said
        self._idle: dict[Endpoint, deque[Connection]] = {}

    def keep(self, endpoint: Endpoint) -> None:
        """Keep this engine's connections for its next requests, until it is dropped."""
        self._idle.setdefault(endpoint, deque())

    def engines(self) -> frozenset[Endpoint]:
        """Those whose connections are kept."""
        return frozenset(self._idle)

    async def connection(self, endpoint: Endpoint) -> Connection:
        """An idle connection, or a new one; raises UpstreamError("connect")."""
        loop = asyncio.get_running_loop()
        # An engine that was dropped may be asked still, about a bill or for its health; nothing is kept for it.
        idle = self._idle.get(endpoint)
        while idle:
            connection = idle.pop()  # the latest used: the others grow old and expire
            if not connection.closed and loop.time() - connection.idle_since < IDLE_EXPIRY_S:
                return connection
            connection.abort()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(
                        loop, lambda c: self._forget(endpoint, c), lambda said: self._on_said(endpoint, said)
                    ),
                    endpoint.host,
                    endpoint.port,
                )
        except (OSError, TimeoutError) as error:
            raise UpstreamError("connect", f"engine replica {endpoint.replica_id} cannot be reached") from error
        if connection.closed:  # taken and given up in one turn of the loop
            raise UpstreamError("connect", f"engine replica {endpoint.replica_id} closed a new connection")
        return connection

    async def get(self, endpoint: Endpoint, path: str, token: str = "", *, most_bytes: int) -> tuple[int, bytes]:
        """Status and body of a short answer that an engine's port gives; what is longer is cut off at `most_bytes`.

        Raises UpstreamError.
        """
        return await self._ask(endpoint, f"GET {path}", token, None, most_bytes)

    async def post(
        self, endpoint: Endpoint, path: str, token: str, body: bytes, *, most_bytes: int
    ) -> tuple[int, bytes]:
        """The same for a request with a body."""
        return await self._ask(endpoint, f"POST {path}", token, body, most_bytes)

    async def _ask(
        self, endpoint: Endpoint, what: str, token: str, content: bytes | None, most_bytes: int
    ) -> tuple[int, bytes]:
        connection = await self.connection(endpoint)
        try:
            head = f"{what} HTTP/1.1\r\nhost: engine\r\n{ENGINE_TOKEN_HEADER}: {token}\r\n"
            length = b"" if content is None else b"content-length: %d\r\n" % len(content)
            connection.send(
                b"%b%b: %b\r\n%b\r\n" % (head.encode(), GATEWAY_HEADER, self.gateway, length), content or b""
            )
            status, body = await connection.head(), bytearray()
            while len(body) < most_bytes and (chunk := await connection.read()):
                body += chunk
            return status, bytes(body[:most_bytes])
        finally:
            self.release(endpoint, connection)

    def release(self, endpoint: Endpoint, connection: Connection) -> None:
        """Give a connection back: kept when its answer ended cleanly, closed otherwise."""
        idle = self._idle.get(endpoint)
        if idle is not None and connection.reusable() and len(idle) < MAX_IDLE_PER_ENGINE:
            connection.idle_since = asyncio.get_running_loop().time()
            idle.append(connection)
        else:
            connection.abort()

    def drop(self, endpoint: Endpoint) -> None:
        """Close an engine's idle connections; those in use end with their requests."""
        for connection in self._idle.pop(endpoint, ()):
            connection.abort()

    def close(self) -> None:
        """Close every idle connection."""
        for endpoint in tuple(self._idle):
            self.drop(endpoint)

    def idle(self) -> int:
        """Idle connections to all engines."""
        return sum(len(connections) for connections in self._idle.values())

    def _forget(self, endpoint: Endpoint, connection: Connection) -> None:
        idle = self._idle.get(endpoint)
        if idle is not None and connection in idle:
            idle.remove(connection)
