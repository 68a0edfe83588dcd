"""Relays one request to one engine replica and its answer back, as bytes, in the order they come.

What it promises: nothing is sent twice once a byte of an answer has come; a client that leaves frees its engine, or its
place in the hold, at once; while a request waits for a replica, a client that streams hears so; an answer that
breaks off is never silent (a stream ends with an error event in OpenAI's shape, any other answer with a cut
connection); an engine's own words, which may name its internals, never reach a client: what it refuses is told in
OpenAI's (serving.api.engine_refusals), before the head wherever none went out, and no `[DONE]` follows an error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from random import Random

from serving.admission import output_default
from serving.admission.holds import Hold
from serving.api import engine_refusals
from serving.api.body import ClientLeft, Receive, Send
from serving.api.engine_refusals import Refusal
from serving.api.errors import body as error_body
from serving.api.errors import headers as error_headers
from serving.api.errors import sse_event
from serving.api.exchange import Exchange, Sent
from serving.api.hedge import Hedging
from serving.api.quarantine import Quarantine
from serving.api.retry import again_allowed, answered, failed_engine, is_failure, lost
from serving.api.upstream import Connection, Pool, UpstreamError
from serving.api.watch import Watch
from serving.cluster.edge import ENGINE_TOKEN_HEADER
from serving.engine.load import GATEWAY_HEADER, signed
from serving.errors import BadRequest, RateLimited, RequestError, Unavailable, UpstreamFailed
from serving.metering.answers import ERROR_EVENT, EVENT_END, SERVER_ERROR, EngineFailed, is_server_error, meter
from serving.metering.best_known import best_known
from serving.routing.health import Health
from serving.routing.replicas import Lease, ReplicaSet

TOKEN_HEADER = ENGINE_TOKEN_HEADER.encode()
ROUTE_HEADER = b"x-galerne-route"
RETRY_AFTER_S = 5
MAX_REPLICAS_TRIED = 3
EVENT_STREAM = b"text/event-stream"
HELD_BYTES = 1024 * 1024  # an event larger than this is passed on in pieces
CLIENT_ERROR = 400
# Of an answer: the client asked for more output tokens than there was room for.
LOWERED = (b"x-galerne-lowered", b"max_tokens")
FORWARDED_HEADERS = frozenset({b"content-type", b"content-length"})
OK = 200
# A line that every reader of server-sent events skips.
KEEP_ALIVE = b": keep-alive\n\n"


class CutAnswer(Exception):
    """Raised after a part of a non-streamed answer went out: the server must cut the connection."""


class Relay:
    """The way to the engines; one per gateway process."""

    def __init__(
        self,
        replicas: ReplicaSet,
        pool: Pool,
        hold: Hold,
        keep_alive_s: Mapping[str, float],
        health: Health,
        watch: Watch,
        *,
        engine_token: str,
        response_timeout_s: float,
        clock: Callable[[], float],
        rng: Random,
        quarantine: Quarantine,
        on_failure: Callable[[str, str], None],
        on_gap: Callable[[str, float], None],
        on_first: Callable[[Exchange, int], None],
        on_retry: Callable[[str, str, str], None],
        on_hedge: Callable[[str, str], None],
    ) -> None:
        self._replicas = replicas
        self._pool = pool
        self._hold = hold
        self._keep_alive_s = keep_alive_s  # by model
        self._health = health
        self._watch = watch
        self._token = engine_token.encode()
        self._response_timeout_s = response_timeout_s
        self._clock = clock
        self._rng = rng
        self._quarantine = quarantine
        self._on_failure = on_failure  # (model, kind)
        self._on_gap = on_gap  # (model, seconds between two chunks of a stream)
        self._on_first = on_first  # (exchange, the engine's status) at the first byte
        self._on_retry = on_retry  # (model, kind of failure, what came of it)
        self._hedging = Hedging(
            replicas,
            pool,
            health,
            watch,
            self._connect,
            response_timeout_s=response_timeout_s,
            on_failure=on_failure,
            on_hedge=on_hedge,
        )

    async def run(self, exchange: Exchange, receive: Receive, send: Send, headers: Headers) -> None:
        """Relay to the end; raises RequestError before the first byte, ClientLeft, or CutAnswer after it."""
        watcher = asyncio.ensure_future(_watch(exchange, receive))
        try:
            with self._health[exchange.model].budget:
                async with asyncio.timeout(None) as exchange.bound:
                    sent = await self._send(exchange, send, headers)
                    if exchange.hedge_after_s is not None:
                        sent = await self._hedging.leader(exchange, *sent, exchange.hedge_after_s)
                    while (error := await self._attempt(exchange, *sent, send, headers)) is not None:
                        sent = await self._again(exchange, error)
        except RequestError as error:
            if isinstance(error, (Unavailable, RateLimited)):
                exchange.outcome = "rejected"
            if not exchange.head_sent:
                raise
            exchange.status = error.status
            await self._last_event(exchange, sse_event(error), send)
        except TimeoutError as error:  # from `bound`
            exchange.client_left = True
            raise ClientLeft("the client left, or does not read its answer") from error
        finally:
            watcher.cancel()
            if exchange.usage is None:
                exchange.usage, exchange.usage_exact = best_known(exchange)
            if exchange.ticket is not None:
                exchange.ticket.end()
            if exchange.turn is not None:
                # Its client left, or no replica was found, between its turn and another attempt.
                exchange.turn.end()

    async def _attempt(
        self, exchange: Exchange, lease: Lease, connection: Connection, send: Send, headers: Headers
    ) -> UpstreamError | None:
        """Relay one replica's answer; where not a byte of it came, returns why."""
        replica = exchange.replica = lease.endpoint.replica_id
        attempt = self._watch.begin(exchange.model, lease.endpoint, connection, exchange.bound)
        with lease:
            exchange.connection, exchange.engine, exchange.lease = connection, lease.endpoint, lease
            if exchange.shows_route:
                headers = [*headers, (ROUTE_HEADER, lease.choice.described())]
            try:
                if exchange.client_left:
                    raise ClientLeft("the client left before its request was sent")
                await self._answer(exchange, connection, send, headers)
            except UpstreamError as error:
                if exchange.client_left:
                    raise ClientLeft("the client left while its answer was under way") from None
                self._on_failure(exchange.model, error.kind)
                if exchange.first_byte_s is None:
                    exchange.spent |= {replica}
                    self._quarantine.lost(exchange.model, exchange.body, replica, error.kind)
                    lost(self._health[exchange.model].ejections, exchange, error.kind)
                    return error
                await self._broken(exchange, error, send)
            finally:
                exchange.connection = None
                self._watch.end(attempt)
                self._pool.release(lease.endpoint, connection)
                if exchange.turn is not None:
                    exchange.turn.end()
        return None

    async def _again(self, exchange: Exchange, error: UpstreamError) -> tuple[Lease, Connection]:
        """Put a request that its replica lost on another; raises what the client is to hear where that cannot be.

        Why that is safe for a POST is `serving.api.retry`'s.
        """
        health = self._health[exchange.model]
        there = health.listed
        exchange.waits = True
        end, exchange.turn = await again_allowed(health, exchange.spent, error.kind)
        exchange.waits = False
        engine, request_id, sent = exchange.engine, exchange.engine_request_id, None
        if exchange.turn is not None and not exchange.client_left:
            with contextlib.suppress(Unavailable):
                # Not to one that came meanwhile: it may be the successor of the one that died of it.
                sent = await self._connect(exchange, health.listed - there)
            if sent is None:
                end = "no_replica"
        if exchange.client_left and sent is None:
            raise ClientLeft("the client left while another replica was sought")
        if end is not None:
            self._on_retry(exchange.model, error.kind, end)
        if sent is None:
            raise failed_engine(error.kind) from error
        if engine is not None:
            exchange.lost = Sent(engine, request_id)
        return sent

    async def _send(self, exchange: Exchange, send: Send, headers: Headers) -> tuple[Lease, Connection]:
        """Put the request on a connection to a replica when its turn has come; while none can be reached, it waits."""
        while True:
            await self._wait(exchange, send, headers)
            self._admitted_again(exchange)
            sent = await self._connect(exchange)
            if sent is not None:
                return sent
            self._hold[exchange.model].unreachable()
            if exchange.ticket is not None:
                exchange.ticket.end()
                exchange.ticket = None

    def _admitted_again(self, exchange: Exchange) -> None:
        """Raise BadRequest where engines have died of this request; by now those that have are off the list."""
        health = self._health[exchange.model]

        def gone(replica: str) -> bool:
            return replica not in health.listed or replica in health.ejections.out

        try:
            self._quarantine.check(exchange.model, exchange.body, gone)
        except BadRequest:
            exchange.outcome = "rejected"
            raise

    async def _wait(self, exchange: Exchange, send: Send, headers: Headers) -> None:
        """Wait for this request's turn; raises RequestError beyond the hold's bounds, or ClientLeft."""
        ticket = self._hold[exchange.model].enter(exchange.tenant, len(exchange.body), exchange.started_s, exchange)
        exchange.ticket = ticket
        if ticket.released:
            return
        every_s = self._keep_alive_s[exchange.model] if exchange.stream else None
        while not await ticket.wait(every_s):
            if not exchange.head_sent:
                exchange.head_sent, exchange.status = True, OK
                await send({"type": "http.response.start", "status": OK, "headers": [*EVENT_HEADERS, *headers]})
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        if exchange.client_left:
            raise ClientLeft("the client left while its request was held")

    async def _connect(
        self, exchange: Exchange, without: frozenset[str] = frozenset()
    ) -> tuple[Lease, Connection] | None:
        """Put the request on a connection to a replica, none of these; one that cannot be reached is passed over.

        None where no replica can be reached; raises Unavailable where those that were tried cannot.
        """
        tried: set[str] = set()
        # The engine refuses a request id it already runs, and a client chooses its own: make it unique.
        unique = f"{exchange.request_id}-{self._rng.getrandbits(32):08x}"
        ejections = self._health[exchange.model].ejections
        while len(tried) < MAX_REPLICAS_TRIED:
            lease = self._replicas.lease(
                exchange.model, ejections.out | exchange.spent | without | tried, exchange.asked
            )
            if lease is None:
                break
            try:
                connection = await self._pool.connection(lease.endpoint)
                connection.send(self._head(exchange, unique, lease), exchange.body)
                exchange.engine_request_id = unique
            except UpstreamError as error:
                with lease:  # gives the lease back
                    tried.add(lease.endpoint.replica_id)
                self._on_failure(exchange.model, error.kind)
                ejections.failed(lease.endpoint.replica_id)
                continue
            except BaseException:
                with lease:
                    raise
            return lease, connection
        if exchange.client_left:
            raise ClientLeft("the client left before a replica was found")
        if len(tried | ejections.out) < self._replicas.ready(exchange.model):
            raise Unavailable(
                f"No replica of the model '{exchange.model}' can be reached at the moment. Try again shortly.",
                retry_after_s=RETRY_AFTER_S,
            )
        return None

    def _head(self, exchange: Exchange, unique: str, lease: Lease) -> bytes:
        return (
            b"POST %b HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n%b: %b\r\n"
            b"%b: %b\r\nx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n"
            % (
                exchange.path.encode(),
                TOKEN_HEADER,
                self._token,
                GATEWAY_HEADER,
                signed(self._pool.gateway, *lease.tokens),
                unique.encode(),
                exchange.traceparent,
                len(exchange.body),
            )
        )

    async def _first(self, connection: Connection) -> tuple[int, bytes]:
        """An answer's status and first bytes; raises UpstreamError where it is a failure of the engine's."""
        try:
            async with asyncio.timeout(self._response_timeout_s):
                status = await connection.head()
                # vLLM sends a stream's head when it takes the request, and its first event when there is a token.
                chunk = b"" if status >= SERVER_ERROR else await connection.read()
                while chunk.startswith(ERROR_EVENT) and EVENT_END not in chunk and len(chunk) < HELD_BYTES:
                    # What it says decides what is relayed: it is needed whole.
                    more = await connection.read()
                    if not more:
                        break
                    chunk += more
        except TimeoutError:
            connection.abort()
            raise UpstreamError("timeout", "the engine did not answer in time") from None
        if is_failure(status, chunk):
            connection.abort()
            raise UpstreamError("server_error", "the engine failed on this request")
        return status, chunk

    async def _answer(self, exchange: Exchange, connection: Connection, send: Send, extra: Headers) -> None:
        status, chunk = await self._first(connection)
        refusal = await self._refusal(exchange, connection, status, chunk)
        if refusal is not None and refusal.answer_too_long and self._asks_again(exchange, connection):
            status, chunk = await self._first(connection)
            again = await self._refusal(exchange, connection, status, chunk)
            # Without room for a single token the first is what is to be told.
            refusal = again if again is None or again.error.code == engine_refusals.CONTEXT else refusal
        if exchange.lowered and refusal is None:
            extra = [*extra, LOWERED]
        if refusal is not None:
            status = refusal.error.status
        exchange.first_byte_s = self._clock()
        if exchange.turn is not None:
            exchange.turn.end()
        answered(self._health[exchange.model].ejections, exchange)
        self._quarantine.answered(exchange.model, exchange.body)
        self._on_first(exchange, status)
        if exchange.lease is not None and status == OK:
            exchange.lease.answered()
        exchange.answered()
        events = (b"content-type", EVENT_STREAM) in _types(connection)
        # Also where the head of a held stream said 200 before: what the event says is what came of it.
        exchange.status = status
        if refusal is not None:
            await self._refuse(exchange, refusal.error, send, extra)
            return
        if not exchange.head_sent:
            headers = [*((n, v) for n, v in connection.headers if n in FORWARDED_HEADERS), *extra]
            await send({"type": "http.response.start", "status": status, "headers": headers})
        await self._pass_on(exchange, connection, chunk, send, events=events)

    async def _pass_on(
        self, exchange: Exchange, connection: Connection, chunk: bytes, send: Send, *, events: bool
    ) -> None:
        """Relay an answer's body, of which `chunk` has come, to its end."""
        last_s = self._clock()
        on_gap = self._on_gap if events else _no_gap
        clock, model, read = self._clock, exchange.model, connection.read
        sent_bytes, held = 0, b""
        refused: RequestError | None = None
        metered = meter(exchange, connection, events=events)
        try:
            while chunk:
                if held or (events and not chunk.endswith(EVENT_END)):
                    # Half an event is kept back: if the engine dies now, an error event can still follow cleanly.
                    chunk, held = _whole_events(held + chunk)
                if chunk and (chunk := metered.feed(chunk)):
                    sent_bytes += len(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await read()
                if chunk:
                    now_s = clock()
                    on_gap(model, now_s - last_s)
                    last_s = now_s
                    # Read while it grows: it is what the tenant has been given so far.
                    exchange.later_events += chunk.count(EVENT_END)
            if held := (metered.feed(held) if held else b"") + metered.end():
                sent_bytes += len(held)
                await send({"type": "http.response.body", "body": held, "more_body": True})
        except EngineFailed as failed:
            connection.abort()
            sent_bytes += len(failed.before)
            await send({"type": "http.response.body", "body": failed.before, "more_body": True})
            if is_server_error(failed.event):
                raise UpstreamError("server_error", "the engine failed in the middle of its answer") from None
            refused = engine_refusals.of_event(failed.event, exchange.path).error
        finally:
            exchange.sent_bytes = sent_bytes
            exchange.last_byte_s = last_s
            exchange.later_events -= metered.usage_events
            exchange.usage, exchange.usage_exact = metered.usage, metered.usage is not None
        exchange.outcome = "completed"
        if refused is not None:
            # Of what it had written until then the engine tells (serving.api.billing).
            await self._last_event(exchange, sse_event(refused), send)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _refusal(self, exchange: Exchange, connection: Connection, status: int, chunk: bytes) -> Refusal | None:
        """What the engine refuses, read to the end of its answer; None where it answers."""
        if status == OK and (b"content-type", EVENT_STREAM) in _types(connection):
            # vLLM judges some values only when it begins to compute, and its head is out by then.
            if not chunk.startswith(ERROR_EVENT) or engine_refusals.event_status(chunk) is None:
                return None
            refusal = engine_refusals.of_event(chunk, exchange.path)
        elif status >= CLIENT_ERROR:
            parts = bytearray(chunk)
            while len(parts) < engine_refusals.MOST_BYTES and (chunk := await connection.read()):
                parts += chunk
            refusal = engine_refusals.translated(status, bytes(parts), exchange.path)
        else:
            return None
        return refusal

    def _asks_again(self, exchange: Exchange, connection: Connection) -> bool:
        """Send a request whose answer may not fit behind its prompt again, without a number of output tokens; False
        where that cannot be.
        """
        body = output_default.with_room(exchange.path, exchange.body)
        if exchange.lowered or body is None or exchange.lease is None or not connection.reusable():
            return False
        exchange.lowered, exchange.body = True, body
        connection.send(self._head(exchange, exchange.engine_request_id, exchange.lease), body)
        return True

    async def _refuse(self, exchange: Exchange, error: RequestError, send: Send, extra: Headers) -> None:
        """Tell the client what the engine refused: as the answer, or as an event where its head went out before."""
        exchange.outcome = "completed"
        if exchange.head_sent:
            await self._last_event(exchange, sse_event(error), send)
            return
        content = error_body(error)
        exchange.sent_bytes = len(content)
        await send({"type": "http.response.start", "status": error.status, "headers": [*error_headers(error), *extra]})
        await send({"type": "http.response.body", "body": content, "more_body": False})

    async def _last_event(self, exchange: Exchange, event: bytes, send: Send) -> None:
        exchange.sent_bytes += len(event)
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _broken(self, exchange: Exchange, error: UpstreamError, send: Send) -> None:
        exchange.cut = True
        connection = exchange.connection
        events = connection is not None and (b"content-type", EVENT_STREAM) in _types(connection)
        if not events and not exchange.head_sent:
            raise CutAnswer from error
        event = sse_event(
            UpstreamFailed("The engine broke off while it was answering; the answer is incomplete.", code="stream_cut")
        )
        await self._last_event(exchange, event, send)


Headers = list[tuple[bytes, bytes]]
# As vLLM sends it.
EVENT_HEADERS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    """Complete events of a stream, and the begun one after them."""
    whole, end, begun = data.rpartition(EVENT_END)
    if not end and len(data) > HELD_BYTES:
        return data, b""
    return whole + end, begun


def _no_gap(model: str, seconds: float) -> None:
    """A long answer in one piece comes in several reads; they are no tokens."""


def _types(connection: Connection) -> Headers:
    return [(n, v.split(b";")[0].strip()) for n, v in connection.headers if n == b"content-type"]


async def _watch(exchange: Exchange, receive: Receive) -> None:
    """Wait for the client to leave, then end the engine's work for it at once."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.client_left = True
    if exchange.ticket is not None:
        exchange.ticket.leave()
    if exchange.connection is not None:
        exchange.connection.fail(UpstreamError("broken", "the client left"))
    elif exchange.waits and exchange.bound is not None:
        exchange.bound.reschedule(asyncio.get_running_loop().time())
