"""A streaming HTTP/1.1 client that costs microseconds a token, so that it measures the target and not itself.

General clients spend more on a token than a gateway does. This one sends a prebuilt request over a
connection that is already open and stamps the clock once a socket read, before it parses anything.
It never retries and never raises for what a server does: every way a request can end is a result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import httptools

from loadtest.sse import DETAIL_BYTES, EventStream

CONNECT_TIMEOUT_S = 10.0

_OK = 200
_RETRY_AFTER = b"retry-after"
_NS = 1e9


class FailureKind(StrEnum):
    """How a request can fail, as its client sees it."""

    CONNECT = "connect"  # no connection
    HTTP_STATUS = "http_status"  # an answer other than 200
    BROKEN_STREAM = "broken_stream"  # an answer that is no whole event stream: cut, malformed, without [DONE]
    SSE_ERROR = "sse_error"  # an error event within a stream
    TIMEOUT = "timeout"  # not at its end in time
    INTERRUPTED = "interrupted"  # in flight when a person ended the run; not the target's doing


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed; `detail` is for people."""

    kind: FailureKind
    detail: str


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request as the client saw it; times are of the monotonic clock, nanoseconds."""

    send_ns: int
    # Response headers complete.
    response_ns: int | None
    # Arrival of every event that bears content, the first included.
    content_ns: tuple[int, ...]
    end_ns: int
    status: int | None
    # The engine's own counts, where the stream told them (`include_usage`).
    completion_tokens: int | None
    prompt_tokens: int | None
    failure: Failure | None
    # The Retry-After header as it came; a refusal that has one is meant.
    retry_after: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens received: the engine's own count, else one for each content event."""
        return len(self.content_ns) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft_s(self) -> float | None:
        """Seconds from send to the first content; None where none came."""
        return (self.content_ns[0] - self.send_ns) / _NS if self.content_ns else None

    @property
    def itl_s(self) -> list[float]:
        """Seconds between content events; 0 where one read brought several."""
        return [(later - earlier) / _NS for earlier, later in pairwise(self.content_ns)]

    @property
    def e2e_s(self) -> float:
        """Seconds from send to the end of the response."""
        return (self.end_ns - self.send_ns) / _NS


class _Exchange:
    """One request in flight: what has come of its response so far."""

    __slots__ = ("body", "response_ns", "result", "retry_after", "send_ns", "status", "stream")

    def __init__(self, send_ns: int, result: asyncio.Future[RequestResult]) -> None:
        self.send_ns = send_ns
        self.result = result
        self.response_ns: int | None = None
        self.status: int | None = None
        self.retry_after: str | None = None
        self.stream = EventStream()
        self.body = b""

    def finish(self, end_ns: int, failure: Failure | None) -> None:
        """Settle the result; `failure` None asks the response itself."""
        if self.result.done():
            return
        self.result.set_result(
            RequestResult(
                send_ns=self.send_ns,
                response_ns=self.response_ns,
                content_ns=tuple(self.stream.content_ns),
                end_ns=end_ns,
                status=self.status,
                completion_tokens=self.stream.completion_tokens,
                prompt_tokens=self.stream.prompt_tokens,
                failure=failure or self._own_failure(),
                retry_after=self.retry_after,
            )
        )

    def _own_failure(self) -> Failure | None:
        stream = self.stream
        if self.status != _OK:
            shown = self.body[:DETAIL_BYTES].decode("utf-8", "replace")
            return Failure(FailureKind.HTTP_STATUS, f"HTTP {self.status}: {shown}")
        if stream.error is not None:
            return Failure(FailureKind.SSE_ERROR, stream.error)
        if stream.malformed is not None:
            return Failure(FailureKind.BROKEN_STREAM, f"malformed event: {stream.malformed}")
        if not stream.done:
            return Failure(FailureKind.BROKEN_STREAM, "the response ended without [DONE]")
        return None


class _Connection(asyncio.Protocol):
    """One TCP connection; carries one exchange at a time."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns = clock_ns
        self._parser = httptools.HttpResponseParser(self)
        self._now_ns = 0
        self._transport: asyncio.Transport | None = None
        self.exchange: _Exchange | None = None
        self.closed = asyncio.get_running_loop().create_future()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream protocol gets a Transport

    def data_received(self, data: bytes) -> None:
        self._now_ns = self._clock_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as problem:
            self.fail(FailureKind.BROKEN_STREAM, f"not HTTP: {problem}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.fail(FailureKind.BROKEN_STREAM, f"the connection closed before the response's end ({exc or 'EOF'})")
        if not self.closed.done():
            self.closed.set_result(None)

    # httptools' callbacks, all within data_received

    def on_header(self, name: bytes, value: bytes) -> None:
        # By its length first: of all the headers of an answer one at most is looked at.
        if len(name) == len(_RETRY_AFTER) and name.lower() == _RETRY_AFTER and self.exchange is not None:
            self.exchange.retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self.exchange is not None:
            self.exchange.response_ns = self._now_ns
            self.exchange.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        if exchange.status == _OK:
            exchange.stream.feed(data, self._now_ns)
        elif len(exchange.body) < DETAIL_BYTES:
            exchange.body += data

    def on_message_complete(self) -> None:
        exchange, self.exchange = self.exchange, None
        if not self._parser.should_keep_alive():
            self.close()
        if exchange is not None:
            exchange.finish(self._now_ns, None)

    # For the client

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, raw: bytes) -> asyncio.Future[RequestResult]:
        """Write one request and give its result to come; a connection that is gone fails it at once."""
        result: asyncio.Future[RequestResult] = asyncio.get_running_loop().create_future()
        self.exchange = _Exchange(self._clock_ns(), result)
        if self._transport is None:
            self.fail(FailureKind.BROKEN_STREAM, "the connection closed before the request was sent")
        else:
            self._transport.write(raw)
        return result

    def fail(self, kind: FailureKind, detail: str) -> None:
        """End the exchange in flight, if any, and the connection: what follows on it is unknown."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.finish(self._clock_ns(), Failure(kind, detail))
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class StreamClient:
    """One stream of a closed loop: one connection, one request at a time, kept alive between requests."""

    def __init__(self, host: str, port: int, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._host = host
        self._port = port
        self._clock_ns = clock_ns
        self._connection: _Connection | None = None
        self._result: asyncio.Future[RequestResult] | None = None
        # Connections made so far: more than one means that the server closes between requests.
        self.connects = 0

    async def open(self) -> None:
        """Connect unless connected, so that no request pays for it. Raises OSError, TimeoutError."""
        if self.is_open:
            return
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, self._connection = await loop.create_connection(
                lambda: _Connection(self._clock_ns), self._host, self._port
            )
        self.connects += 1

    async def request(self, raw: bytes, *, timeout_s: float) -> RequestResult:
        """Send one whole HTTP request and follow its response to the end.

        A connection that is not open is opened first, outside the request's own time.
        """
        try:
            await self.open()
        except OSError as problem:
            return self._not_connected(problem)
        connection = self._connection
        if connection is None or not connection.is_open:
            return self._not_connected(None)
        self._result = result = connection.send(raw)
        expiry = asyncio.get_running_loop().call_later(
            timeout_s, connection.fail, FailureKind.TIMEOUT, f"not finished after {timeout_s:g} s"
        )
        try:
            return await result
        except asyncio.CancelledError:
            connection.close()
            raise
        finally:
            self._result = None
            expiry.cancel()

    @property
    def is_open(self) -> bool:
        """Whether a request could be sent now without connecting."""
        return self._connection is not None and self._connection.is_open

    @property
    def content_events(self) -> int:
        """Content events of the request in flight so far; 0 without one."""
        exchange = self._connection.exchange if self._connection is not None else None
        return len(exchange.stream.content_ns) if exchange is not None else 0

    def cut(self, kind: FailureKind, detail: str) -> bool:
        """End the request in flight with this failure, keeping what came of it; False where none was sent.

        One whose result is there already keeps it.
        """
        if self._result is None or self._connection is None:
            return False
        if not self._result.done():
            self._connection.fail(kind, detail)
        return True

    def drop(self) -> None:
        """Close the connection without waiting for it."""
        if self._connection is not None:
            self._connection.close()

    async def close(self) -> None:
        """Close the connection and wait until it is."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            await connection.closed

    def _not_connected(self, problem: OSError | None) -> RequestResult:
        now_ns = self._clock_ns()
        detail = f"no connection to {self._host}:{self._port}: {problem or 'closed at once'}"
        return RequestResult(now_ns, None, (), now_ns, None, None, None, Failure(FailureKind.CONNECT, detail))
