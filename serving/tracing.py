"""Traces of requests, from the gateway on into the engine, in OpenTelemetry's terms; off unless configured.

Who decides what is traced: the gateway, for a trace of its own. A `traceparent` that a client sends becomes a link to
the client's span and nothing else: were it continued, a client could have every one of its requests sampled, put spans
into a trace of somebody else, or choose ids that collide. Each request that is relayed gets a `traceparent` of the
gateway's, sampled or not: an engine that gets none would begin, and sample, a trace of its own.

A span holds whose request it was, for which model, how it ended, how long the first token took and how many tokens
there were. Never a prompt or an answer: what is read of an answer is its `usage`, where the engine sent one.

The OpenTelemetry SDK is imported by `tracer` alone, which is called only where tracing is configured.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from serving import __version__
from serving.config import TracingConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

SERVICE = "galerne-gateway"
# `usage` stands at the end of an answer, whole or streamed; this much of the end is looked through for it.
TAIL_BYTES = 8192
SERVER_ERROR = 500
# Its names of tokens differ between the Responses API and the others. An answer's text cannot look like it: inside a
# JSON string its quotes are escaped.
USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')
INPUT_TOKENS = ("prompt_tokens", "input_tokens")
OUTPUT_TOKENS = ("completion_tokens", "output_tokens")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Traced(Protocol):
    """What a span is made of: a relayed request, when it has ended."""

    @property
    def model(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def request_id(self) -> str: ...
    @property
    def stream(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def result(self) -> str: ...
    @property
    def started_s(self) -> float: ...
    @property
    def first_byte_s(self) -> float | None: ...
    @property
    def later_events(self) -> int: ...


class Tracer:
    """Makes one span a relayed request."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("galerne", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, exchange: Traced, client: bytes | None, send: Send) -> Iterator[tuple[bytes, Send]]:
        """Around a relayed request: the header line for the engine, and what to send the answer through.

        `client` is the client's own traceparent.
        """
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            f"POST {exchange.path}",
            # Never a context that happens to be there: every request is a trace of its own.
            context=_nothing(),
            kind=SpanKind.SERVER,
            links=self._links(client),
        )
        tail = _Tail(send) if span.is_recording() else None
        try:
            yield _header(span), send if tail is None else tail
        except BaseException as error:
            if tail is not None:
                status = getattr(error, "status", None)
                _finish(span, exchange, tail, status if isinstance(status, int) else None)
            raise
        else:
            if tail is not None:
                _finish(span, exchange, tail, None)
        finally:
            span.end()

    def close(self) -> None:
        """Send what is there and end the background thread."""
        self._provider.shutdown()

    def _links(self, client: bytes | None) -> list[Any]:
        from opentelemetry.trace import Link, get_current_span

        if client is None:
            return []
        carrier = {"traceparent": client.decode(errors="replace")}
        found = get_current_span(self._propagator.extract(carrier, _nothing())).get_span_context()
        return [Link(found, {"galerne.link": "client"})] if found.is_valid else []


class _Tail:
    """Passes an answer on and keeps its end."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._kept = b""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        body = message.get("body", b"")
        if body:
            self._kept = (self._kept + body[-TAIL_BYTES:])[-TAIL_BYTES:]
        await self._send(message)

    def usage(self) -> dict[str, Any]:
        """The last `usage` of the answer; empty where it has none."""
        for found in reversed(USAGE.findall(self._kept)):
            try:
                usage = json.loads(found)
            except ValueError:
                continue
            if isinstance(usage, dict):
                return usage
        return {}


def tracer(config: TracingConfig, exporter: SpanExporter | None = None) -> Tracer:
    """A tracer that sends spans where the configuration says, from a thread in the background; `exporter`: instead."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    resource = Resource.create(
        {"service.name": SERVICE, "service.version": __version__, "service.instance.id": str(os.getpid())}
    )
    provider = TracerProvider(sampler=TraceIdRatioBased(config.sample_ratio), resource=resource)
    chosen = exporter or OTLPSpanExporter(endpoint=config.traces_url, timeout=config.timeout_s)
    # Beyond its queue it drops spans: a collector that is away costs memory of a bounded size and nothing else.
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return Tracer(provider)


def _nothing() -> Any:
    from opentelemetry.context import Context

    return Context()


def _header(span: Span) -> bytes:
    context = span.get_span_context()
    line = f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}\r\n"
    return line.encode()


def _finish(span: Span, exchange: Traced, tail: _Tail, refused: int | None) -> None:
    from opentelemetry.trace import Status, StatusCode

    outcome = exchange.result
    status = exchange.status or refused or 0
    attributes: dict[str, Any] = {
        "gen_ai.request.model": exchange.model,
        "url.path": exchange.path,
        "galerne.tenant": exchange.tenant,
        "galerne.request_id": exchange.request_id,
        "galerne.stream": exchange.stream,
        "galerne.outcome": outcome,
    }
    if status:
        attributes["http.response.status_code"] = status
    if exchange.first_byte_s is not None:
        # Of a whole answer its first byte is all of it: only of a stream is it the first token.
        name = "galerne.ttft_s" if exchange.stream else "galerne.first_byte_s"
        attributes[name] = exchange.first_byte_s - exchange.started_s
        if exchange.stream:
            attributes["galerne.stream_events"] = exchange.later_events + 1
    usage = tail.usage()
    for attribute, names in (
        ("gen_ai.usage.input_tokens", INPUT_TOKENS),
        ("gen_ai.usage.output_tokens", OUTPUT_TOKENS),
    ):
        for name in names:
            if isinstance(usage.get(name), int):
                attributes[attribute] = usage[name]
    span.set_attributes(attributes)
    if status >= SERVER_ERROR or outcome == "failed":
        span.set_status(Status(StatusCode.ERROR))
