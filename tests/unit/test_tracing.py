"""Traces from the gateway on: sent to a real OTLP receiver, decoded, and held against what the engine was told."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import ValidationError

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import FakeEngineConfig, FakeFaults, GalerneConfig, ModelConfig, TracingConfig
from serving.engine.fake import build_app
from serving.engine.host_spec import HostSpec
from serving.engine.private_server import PrivateServer
from serving.engine.vllm_engine import VllmEngine
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint

KEY, TOKEN = "sk-press", "engine-token"
PROMPT = "a-secret-prompt"
CHAT = {"model": "chat", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6}
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
COMPLETIONS = "/v1/chat/completions"
FORM = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]")


@dataclass
class Collector:
    """An OTLP/HTTP receiver on loopback; spans as the protocol carries them."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    def spans(self) -> list[Any]:
        return [s for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]

    def service(self) -> str:
        attributes = self.requests[0].resource_spans[0].resource.attributes
        return str(next(a.value.string_value for a in attributes if a.key == "service.name"))


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            made.paths.append(self.path)
            made.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield made
        server.shutdown()
        thread.join(5)


@contextlib.asynccontextmanager
async def rig(
    tracing: dict[str, Any] | None, engine: FakeEngineConfig
) -> AsyncIterator[tuple[httpx.AsyncClient, list[Any]]]:
    """A gateway with an engine behind it, and the headers that the engine was given."""
    seen: list[Any] = []
    config = GalerneConfig.model_validate(
        {
            "models": [{"id": "chat", "source": "fake:chat", "hold": {"requests": 0}}],
            "tenants": [{"id": "press", "keys": [{"id": "desk", "sha256": digest(KEY)}]}],
            "tracing": tracing,
        }
    )
    app = Gateway(config, engine_token=TOKEN, metrics=GatewayMetrics(time.monotonic))
    fake = build_app(engine, "chat")
    await fake.start()

    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(scope["headers"])
        await fake(scope, receive, send)

    private = PrivateServer(recorded, host="127.0.0.1", token=TOKEN)
    await private.start()
    app.update_replicas("chat", (Endpoint("r1", private.host, private.port),))
    front = PrivateServer(app, host="127.0.0.1", token="")
    await front.start()
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}", headers=headers, timeout=20) as http:
        try:
            yield http, seen
        finally:
            await http.aclose()
            await front.stop()
            await private.stop()
            # The exporter's thread posts to the collector: not on this loop's time.
            await asyncio.to_thread(app.close)


def given(seen: list[Any]) -> list[str]:
    return [value.decode() for headers in seen for name, value in headers if name == b"traceparent"]


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


FAST = FakeEngineConfig(decode_ms=1)


async def test_a_request_is_a_span_that_the_engine_continues_and_that_holds_no_prompt() -> None:
    with collector() as made:
        async with rig({"otlp_endpoint": made.url, "sample_ratio": 1.0}, FAST) as (http, seen):
            whole = (await http.post(COMPLETIONS, json=CHAT, headers={"x-request-id": "my-id"})).json()
            asked = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
            streamed = (await http.post(COMPLETIONS, json=asked)).text
            plain = (await http.post(COMPLETIONS, json=CHAT | {"stream": True})).text
        first, second, third = made.spans()
        assert set(made.paths) == {"/v1/traces"}
        assert made.service() == "galerne-gateway"
        told = given(seen)
        assert [t[:-2] for t in told] == [f"00-{s.trace_id.hex()}-{s.span_id.hex()}-" for s in (first, second, third)]
        assert all(int(t[-2:], 16) & 1 for t in told)
        assert len({s.trace_id for s in (first, second, third)}) == 3
        assert {s.parent_span_id for s in (first, second, third)} == {b""}
        found = attributes(first)
        assert found == {
            "gen_ai.request.model": "chat",
            "url.path": COMPLETIONS,
            "galerne.tenant": "press",
            "galerne.request_id": "my-id",
            "galerne.stream": False,
            "galerne.outcome": "completed",
            "http.response.status_code": 200,
            "galerne.first_byte_s": found["galerne.first_byte_s"],
            "gen_ai.usage.input_tokens": whole["usage"]["prompt_tokens"],
            "gen_ai.usage.output_tokens": 6,
        }
        found = attributes(second)
        assert found["gen_ai.usage.output_tokens"] == 6
        assert found["galerne.ttft_s"] > 0
        assert second.end_time_unix_nano > second.start_time_unix_nano
        # Without `usage` in the answer there is none in the span.
        assert "gen_ai.usage.output_tokens" not in attributes(third)
        assert attributes(third)["galerne.stream_events"] >= 1
        sent = b"".join(r.SerializeToString() for r in made.requests)
        for text in (PROMPT, whole["choices"][0]["message"]["content"], KEY, TOKEN):
            assert text.encode() not in sent
        assert streamed.endswith("data: [DONE]\n\n")
        assert plain.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_a_client_is_linked_to_and_decides_nothing(ratio: float) -> None:
    with collector() as made:
        async with rig({"otlp_endpoint": made.url, "sample_ratio": ratio}, FAST) as (http, seen):
            for header in (CLIENT, CLIENT[:-1] + "0", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"):
                await http.post(COMPLETIONS, json=CHAT, headers={"traceparent": header, "tracestate": "a=b"})
        told = given(seen)
        assert len(told) == 4
        assert all(FORM.fullmatch(t) for t in told)
        # The engine hears of the gateway's trace alone, and of its decision: without a word it would sample itself.
        assert {int(t[-2:], 16) & 1 for t in told} == {int(ratio)}
        assert not any(CLIENT[3:35] in t for t in told)
        assert not any(name == b"tracestate" for headers in seen for name, _ in headers)
        spans = made.spans()
        assert len(spans) == (4 if ratio else 0)
        assert [len(s.links) for s in spans] == ([1, 1, 0, 0] if ratio else [])
        assert all(s.links[0].trace_id.hex() == CLIENT[3:35] for s in spans[:2])


async def test_an_engine_that_fails_is_a_span_with_an_error() -> None:
    with collector() as made:
        broken = FakeEngineConfig(faults=FakeFaults(error_rate=1.0))
        async with rig({"otlp_endpoint": made.url, "sample_ratio": 1.0}, broken) as (http, _):
            assert (await http.post(COMPLETIONS, json=CHAT)).status_code == 502
            # A refusal before an engine is touched is no span: it is in the metrics.
            assert (await http.post(COMPLETIONS, json=CHAT | {"n": 1000})).status_code == 400
        (span,) = made.spans()
        assert attributes(span)["http.response.status_code"] == 502
        assert attributes(span)["galerne.outcome"] == "failed"
        assert span.status.code == 2


async def test_a_cut_stream_and_a_client_that_left_say_so() -> None:
    with collector() as made:
        tracing = {"otlp_endpoint": made.url, "sample_ratio": 1.0}
        async with rig(tracing, FakeEngineConfig(decode_ms=1, faults=FakeFaults(cut_after_bytes=2000))) as (http, _):
            await http.post(COMPLETIONS, json=CHAT | {"stream": True, "max_tokens": 500, "ignore_eos": True})
        async with rig(tracing, FakeEngineConfig(decode_ms=20)) as (http, _):
            async with http.stream(
                "POST", COMPLETIONS, json=CHAT | {"stream": True, "max_tokens": 5000, "ignore_eos": True}
            ) as stream:
                await anext(stream.aiter_bytes())
            await asyncio.sleep(0.1)
        assert sorted(attributes(s)["galerne.outcome"] for s in made.spans()) == ["cancelled", "failed"]


async def test_a_collector_that_is_away_harms_nobody() -> None:
    tracing = {"otlp_endpoint": "http://127.0.0.1:9", "sample_ratio": 1.0, "timeout_s": 0.2}
    async with rig(tracing, FAST) as (http, _):
        for _ in range(3):
            assert (await http.post(COMPLETIONS, json=CHAT)).status_code == 200


async def test_without_the_section_the_engine_hears_of_no_trace() -> None:
    async with rig(None, FAST) as (http, seen):
        assert (await http.post(COMPLETIONS, json=CHAT, headers={"traceparent": CLIENT})).status_code == 200
    assert given(seen) == []


PROGRAM = """
import sys
from serving.api.app import Gateway
from serving.config import GalerneConfig
from serving.metrics.gateway import GatewayMetrics
config = GalerneConfig.model_validate({{
    "models": [{{"id": "chat", "source": "fake:chat"}}],
    "tenants": [{{"id": "press", "keys": [{{"id": "desk", "sha256": "0" * 64}}]}}],
    "tracing": {tracing},
}})
Gateway(config, engine_token="t", metrics=GatewayMetrics(lambda: 0.0)).close()
print(sorted(m for m in sys.modules if m.partition(".")[0] in ("opentelemetry", "requests", "google")))
"""


@pytest.mark.parametrize(("tracing", "imported"), [(None, False), ({"otlp_endpoint": "http://127.0.0.1:9"}, True)])
def test_opentelemetry_is_imported_only_where_it_is_asked_for(tracing: dict[str, str] | None, imported: bool) -> None:
    program = [sys.executable, "-c", PROGRAM.format(tracing=tracing)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert ("opentelemetry" in done.stdout) is imported, done.stdout


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
    ],
)
def test_the_endpoint_is_an_address_with_or_without_its_path(endpoint: str, url: str) -> None:
    assert TracingConfig(otlp_endpoint=endpoint).traces_url == url


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "grpc://collector", "http://user:secret@collector", "http://c?a=b", ""]
)
def test_an_endpoint_that_is_none_or_holds_a_secret_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError):
        TracingConfig(otlp_endpoint=endpoint)


def test_the_engine_is_told_where_to_send_its_spans(tmp_path: Any) -> None:
    from serving.engine.hosted import _environment

    def spec(url: str | None) -> HostSpec:
        model = ModelConfig(id="chat", source="path:/x")
        return HostSpec(model=model, weights=tmp_path, host="127.0.0.1", token="t", gpu=True, otlp_traces_url=url)

    told = _environment(spec("http://127.0.0.1:4318/v1/traces"))
    assert told["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert not any(name.startswith("OTEL") for name in _environment(spec(None)))
    assert VllmEngine(spec("http://127.0.0.1:4318/v1/traces"))._traces_url == "http://127.0.0.1:4318/v1/traces"
