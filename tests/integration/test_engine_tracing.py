"""A trace that begins in the gateway goes on in vLLM itself: one collector hears of both."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx
import pytest

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import GalerneConfig
from serving.engine.host_spec import HostSpec
from serving.engine.hosted import HostedEngine
from serving.engine.private_server import PrivateServer
from serving.engine.sources import cache_root, prepare
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint
from tests.unit.test_tracing import Collector, attributes, collector

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

KEY, TOKEN = "sk-press", "engine-token"
PROMPT = "a-secret-prompt"
SPANS_WAIT_S = 60


def configuration(url: str) -> GalerneConfig:
    return GalerneConfig.model_validate(
        {
            "models": [
                {
                    "id": "tiny",
                    "source": "random:mistral",
                    "engine": {"max_model_len": 512, "enforce_eager": True, "dtype": "float32"},
                    "resources": {"cpu_kv_cache_gib": 0.1},
                    "drain_timeout_s": 5,
                }
            ],
            "tenants": [{"id": "press", "keys": [{"id": "desk", "sha256": digest(KEY)}]}],
            "tracing": {"otlp_endpoint": url, "sample_ratio": 1.0},
        }
    )


def services(made: Collector) -> dict[str, set[str]]:
    """Trace ids by the service whose spans have them."""
    found: dict[str, set[str]] = {}
    for request in made.requests:
        for group in request.resource_spans:
            name = next(a.value.string_value for a in group.resource.attributes if a.key == "service.name")
            ids = {span.trace_id.hex() for scope in group.scope_spans for span in scope.spans}
            found.setdefault(name, set()).update(ids)
    return found


async def test_vllm_continues_the_gateways_trace() -> None:
    with collector() as made:
        config = configuration(made.url)
        (model,) = config.models
        assert config.tracing is not None
        spec = HostSpec(
            model=model,
            weights=Path((await asyncio.to_thread(prepare, model.source, cache_root(os.environ))).path),
            host="127.0.0.1",
            token=TOKEN,
            gpu=False,
            otlp_traces_url=config.tracing.traces_url,
        )
        engine = HostedEngine(model, "127.0.0.1", lambda: spec)
        await engine.start()
        app = Gateway(config, engine_token=TOKEN, metrics=GatewayMetrics(time.monotonic))
        app.update_replicas("tiny", (Endpoint("r1", engine.host, engine.port),))
        front = PrivateServer(app, host="127.0.0.1", token="")
        await front.start()
        try:
            async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=120) as http:
                body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
                url = f"http://127.0.0.1:{front.port}/v1/chat/completions"
                assert (await http.post(url, json=body)).status_code == 200
            await asyncio.to_thread(app.close)
            (trace,) = services(made)["galerne-gateway"]
            # vLLM sends its spans in batches, by itself.
            deadline_s = time.monotonic() + SPANS_WAIT_S
            while trace not in services(made).get("galerne-engine", set()):
                assert time.monotonic() < deadline_s, services(made)
                await asyncio.sleep(0.2)
        finally:
            await front.stop()
            await engine.stop()
        spans = [s for s in made.spans() if s.trace_id.hex() == trace]
        ours = next(s for s in spans if "galerne.tenant" in attributes(s))
        theirs = [s for s in spans if s is not ours]
        assert any(s.parent_span_id == ours.span_id for s in theirs)
        assert any(attributes(s).get("gen_ai.usage.completion_tokens") == 4 for s in theirs), theirs
        assert all(PROMPT.encode() not in r.SerializeToString() for r in made.requests)
