"""Relays one request to one engine replica and its answer back, as bytes, in the order they come.

What it promises: nothing is sent twice once bytes of it went out; a client that leaves frees its engine at
once; an answer that breaks off is never silent (a stream ends with an error event in OpenAI's shape, any other
answer with a cut connection); an engine's own 5xx text, which may name its internals, never reaches a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from serving.api.body import ClientLeft, Receive, Send
from serving.api.errors import sse_event
from serving.api.upstream import Connection, Pool, UpstreamError
from serving.errors import Unavailable, UpstreamFailed, UpstreamTimeout
from serving.routing.replicas import Lease, ReplicaSet

TOKEN_HEADER = b"x-galerne-engine-token"
RETRY_AFTER_S = 5
MAX_REPLICAS_TRIED = 3
EVENT_STREAM = b"text/event-stream"
EVENT_END = b"\n\n"
HELD_BYTES = 1024 * 1024  # an event larger than this is passed on in pieces
FORWARDED_HEADERS = frozenset({b"content-type", b"content-length"})
SERVER_ERROR = 500

Outcome = Literal["completed", "failed", "cancelled"]


class CutAnswer(Exception):
    """Raised after a part of a non-streamed answer went out: the server must cut the connection."""


@dataclass(slots=True)
class Exchange:
    """One request under way: what the relay is told, and what it found out."""

    model: str
    path: str
    body: bytes
    request_id: str
    started_s: float
    status: int = 0
    first_byte_s: float | None = None
    sent_bytes: int = 0
    outcome: Outcome = "failed"
    cut: bool = False
    client_left: bool = False
    connection: Connection | None = field(default=None, repr=False)


class Relay:
    """The way to the engines; one per gateway process."""

    def __init__(
        self,
        replicas: ReplicaSet,
        pool: Pool,
        *,
        engine_token: str,
        response_timeout_s: float,
        clock: Callable[[], float],
        rng: Random,
        on_failure: Callable[[str, str], None],
        on_gap: Callable[[str, float], None],
    ) -> None:
        self._replicas = replicas
        self._pool = pool
        self._token = engine_token.encode()
        self._response_timeout_s = response_timeout_s
        self._clock = clock
        self._rng = rng
        self._on_failure = on_failure  # (model, kind)
        self._on_gap = on_gap  # (model, seconds between two chunks)

    async def run(self, exchange: Exchange, receive: Receive, send: Send, headers: Headers) -> None:
        """Relay to the end; raises RequestError before the first byte, ClientLeft, or CutAnswer after it."""
        watcher = asyncio.ensure_future(_watch(exchange, receive))
        try:
            lease, connection = await self._send(exchange)
            with lease:
                exchange.connection = connection
                try:
                    if exchange.client_left:
                        raise ClientLeft("the client left before its request was sent")
                    await self._answer(exchange, connection, send, headers)
                except UpstreamError as error:
                    if exchange.client_left:
                        raise ClientLeft("the client left while its answer was under way") from None
                    await self._broken(exchange, error, send)
                finally:
                    exchange.connection = None
                    self._pool.release(lease.endpoint, connection)
        finally:
            watcher.cancel()

    async def _send(self, exchange: Exchange) -> tuple[Lease, Connection]:
        """Put the request on a connection to a replica; a replica that cannot be reached is passed over."""
        tried: set[str] = set()
        head = self._head(exchange)
        while len(tried) < MAX_REPLICAS_TRIED:
            lease = self._replicas.lease(exchange.model, frozenset(tried))
            if lease is None:
                break
            try:
                connection = await self._pool.connection(lease.endpoint)
                connection.send(head, exchange.body)
            except UpstreamError as error:
                with lease:  # gives the lease back
                    tried.add(lease.endpoint.replica_id)
                self._on_failure(exchange.model, error.kind)
                continue
            except BaseException:
                with lease:
                    raise
            return lease, connection
        if exchange.client_left:
            raise ClientLeft("the client left before a replica was found")
        if tried:
            raise Unavailable(
                f"No replica of the model '{exchange.model}' can be reached at the moment. Try again shortly.",
                retry_after_s=RETRY_AFTER_S,
            )
        raise Unavailable(
            f"The model '{exchange.model}' is still loading: no replica is ready yet. Try again shortly.",
            retry_after_s=RETRY_AFTER_S,
        )

    def _head(self, exchange: Exchange) -> bytes:
        # The engine refuses a request id it already runs, and a client chooses its own: make it unique.
        unique = f"{exchange.request_id}-{self._rng.getrandbits(32):08x}"
        return (
            b"POST %b HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n%b: %b\r\n"
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n"
            % (exchange.path.encode(), TOKEN_HEADER, self._token, unique.encode(), len(exchange.body))
        )

    async def _answer(self, exchange: Exchange, connection: Connection, send: Send, extra: Headers) -> None:
        try:
            async with asyncio.timeout(self._response_timeout_s):
                status = await connection.head()
        except TimeoutError:
            connection.abort()
            raise UpstreamError("timeout", "the engine did not answer in time") from None
        if status >= SERVER_ERROR:
            connection.abort()
            self._on_failure(exchange.model, "server_error")
            raise UpstreamFailed("The engine failed on this request. It may work when sent again.")
        headers = [(n, v) for n, v in connection.headers if n in FORWARDED_HEADERS]
        headers += extra
        chunk = await connection.read()
        exchange.status = status
        exchange.first_byte_s = last_s = self._clock()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        clock, model, on_gap, read = self._clock, exchange.model, self._on_gap, connection.read
        sent_bytes, held = 0, b""
        events = (b"content-type", EVENT_STREAM) in _types(connection)
        try:
            while chunk:
                if held or (events and not chunk.endswith(EVENT_END)):
                    # Half an event is kept back: if the engine dies now, an error event can still follow cleanly.
                    chunk, held = _whole_events(held + chunk)
                if chunk:
                    sent_bytes += len(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await read()
                if chunk:
                    now_s = clock()
                    on_gap(model, now_s - last_s)
                    last_s = now_s
            if held:
                sent_bytes += len(held)
                await send({"type": "http.response.body", "body": held, "more_body": True})
        finally:
            exchange.sent_bytes = sent_bytes
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        exchange.outcome = "completed"

    async def _broken(self, exchange: Exchange, error: UpstreamError, send: Send) -> None:
        self._on_failure(exchange.model, error.kind)
        if exchange.first_byte_s is None:
            if error.kind == "timeout":
                raise UpstreamTimeout("The engine did not answer in time.") from error
            raise UpstreamFailed(
                "The engine broke off before it answered. The request may work when sent again."
            ) from error
        exchange.cut = True
        connection = exchange.connection
        if connection is None or (b"content-type", EVENT_STREAM) not in _types(connection):
            raise CutAnswer from error
        event = sse_event(
            UpstreamFailed("The engine broke off while it was answering; the answer is incomplete.", code="stream_cut")
        )
        exchange.sent_bytes += len(event)
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


Headers = list[tuple[bytes, bytes]]


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    """Complete events of a stream, and the begun one after them."""
    if len(data) > HELD_BYTES:
        return data, b""
    whole, end, begun = data.rpartition(EVENT_END)
    return whole + end, begun


def _types(connection: Connection) -> Headers:
    return [(n, v.split(b";")[0].strip()) for n, v in connection.headers if n == b"content-type"]


async def _watch(exchange: Exchange, receive: Receive) -> None:
    """Wait for the client to leave, then end the engine's work for it at once."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.client_left = True
    if exchange.connection is not None:
        exchange.connection.fail(UpstreamError("broken", "the client left"))
