"""The gateway against a simulated engine on a real socket: refusals, relay, faults, and that nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import pytest

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import FakeEngineConfig, FakeFaults, GalerneConfig
from serving.engine.fake import build_app
from serving.engine.private_server import PrivateServer
from serving.metering.ledger import Ledger
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint

KEY = "sk-press"
TOKEN = "engine-token"
AUTH = {"authorization": f"Bearer {KEY}"}
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 6}
COMPLETIONS = "/v1/chat/completions"


@dataclass
class Rig:
    """A gateway on a socket, with the engines behind it."""

    gateway: Gateway
    metrics: GatewayMetrics
    http: httpx.AsyncClient
    engines: list[PrivateServer]
    endpoints: tuple[Endpoint, ...]

    def total(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def settled(self) -> None:
        """Wait until no request is under way, then hold the books against each other."""
        deadline_s = time.monotonic() + 5
        while self.total("galerne_requests_in_flight") or any(e.gate.in_flight for e in self.engines):
            assert time.monotonic() < deadline_s, "a request never ended"
            await asyncio.sleep(0.01)
        assert self.total("galerne_requests_accepted_total") == self.total("galerne_requests_finished_total")
        assert all(n == 0 for replicas in self.gateway.replicas.snapshot().values() for n in replicas.values())
        for _, hold in self.gateway.hold.items():
            assert (hold.held(), hold.held_bytes, hold.turns) == ({}, 0, 0)
        assert all(health.budget.active == 0 for _, health in self.gateway.health.items())


# Waiting for a replica is test_hold's.
NO_HOLD: dict[str, Any] = {"hold": {"requests": 0}}


def configuration(
    chat: dict[str, Any] = NO_HOLD, tenant: dict[str, Any] | None = None, **gateway: Any
) -> GalerneConfig:
    return GalerneConfig.model_validate(
        {
            "gateway": gateway,
            "limits": {"body_bytes": 200_000},
            "models": [
                {"id": "chat", "source": "fake:chat"} | chat,
                {"id": "acme/vectors", "source": "fake:vectors", "task": "embed"},
                {"id": "secret", "source": "fake:secret"} | NO_HOLD,
            ],
            "tenants": [
                {
                    "id": "press",
                    "keys": [{"id": "a", "sha256": digest(KEY)}],
                    "models": ["chat", "acme/vectors"],
                }
                | (tenant or {}),
                {"id": "other", "keys": [{"id": "b", "sha256": digest("sk-other")}]},
            ],
        }
    )


@contextlib.asynccontextmanager
async def rig(
    *engines: FakeEngineConfig,
    dead: int = 0,
    wrap: Callable[[Any], Any] = lambda app: app,
    wake: Callable[[str], None] = lambda _: None,
    hidden: bool = False,
    chat: dict[str, Any] = NO_HOLD,
    change: Callable[[GalerneConfig], GalerneConfig] = lambda config: config,
    ledger: Ledger | None = None,
    tenant: dict[str, Any] | None = None,
    **gateway: Any,
) -> AsyncIterator[Rig]:
    """`hidden`: the gateway is not told of the engines yet; `tenant`: more of the first tenant.

    `change` makes another configuration of the rig's.
    """
    metrics = GatewayMetrics(time.monotonic)
    app = Gateway(
        change(configuration(chat, tenant, **gateway)),
        engine_token=TOKEN,
        metrics=metrics,
        rng=Random(7),
        wake=wake,
        ledger=ledger,
    )
    servers = []
    for config in engines:
        fake = build_app(config, "chat")
        await fake.start()
        server = PrivateServer(wrap(fake), host="127.0.0.1", token=TOKEN, load=fake.load)
        await server.start()
        servers.append(server)
    endpoints = [Endpoint(f"r{i}", s.host, s.port) for i, s in enumerate(servers)]
    endpoints += [Endpoint(f"dead{i}", "127.0.0.1", 1) for i in range(dead)]
    if endpoints and not hidden:
        app.update_replicas("chat", tuple(endpoints))
    front = PrivateServer(app, host="127.0.0.1", token="")
    await front.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}", timeout=20) as http:
        made = Rig(app, metrics, http, servers, tuple(endpoints))
        try:
            yield made
            await made.settled()
            assert all(health.budget.retrying == 0 for _, health in app.health.items())
        finally:
            await http.aclose()
            app.close()
            for server in [front, *servers]:
                await server.stop()


FAST = FakeEngineConfig(decode_ms=1)


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("POST", COMPLETIONS, {}, CHAT, 401, "invalid_api_key"),
        ("POST", COMPLETIONS, {"authorization": "Bearer sk-wrong"}, CHAT, 401, "invalid_api_key"),
        ("GET", "/v1/models", {}, None, 401, "invalid_api_key"),
        ("GET", "/metrics", AUTH, None, 404, "not_found"),
        ("POST", "/pause", AUTH, {}, 404, "not_found"),
        ("POST", "//v1/chat/completions", AUTH, CHAT, 404, "not_found"),
        ("GET", COMPLETIONS, AUTH, None, 405, "method_not_allowed"),
        ("POST", "/v1/models", AUTH, {}, 405, "method_not_allowed"),
        ("POST", COMPLETIONS, AUTH, CHAT | {"model": "nothing"}, 404, "model_not_found"),
        ("POST", COMPLETIONS, AUTH, CHAT | {"model": "secret"}, 404, "model_not_found"),
        ("POST", "/v1/embeddings", AUTH, {"model": "chat", "input": "x"}, 400, "wrong_task"),
        ("POST", COMPLETIONS, AUTH, CHAT | {"n": 99}, 400, None),
        ("POST", COMPLETIONS, AUTH, CHAT | {"max_tokens": 10**10}, 400, None),
        ("POST", COMPLETIONS, AUTH, CHAT | {"top_logprobs": 10**6, "logprobs": True}, 400, None),
        ("POST", COMPLETIONS, AUTH, CHAT | {"stop": ["x"] * 99}, 400, None),
        ("POST", COMPLETIONS, AUTH, CHAT | {"chat_template": "{{ 1 }}"}, 400, None),
        ("POST", "/v1/completions", AUTH, {"model": "chat", "prompt": ["a"] * 999}, 400, None),
        ("POST", COMPLETIONS, AUTH, {"model": "chat", "messages": "x" * 300_000}, 413, "request_too_large"),
        ("POST", COMPLETIONS, AUTH | {"x-padding": "a" * 9000}, CHAT, 431, "headers_too_large"),
        ("POST", COMPLETIONS, {"authorization": "Bearer sk-other"}, CHAT | {"model": "secret"}, 503, "model_not_ready"),
    ],
)
async def test_refusals_never_reach_an_engine(
    method: str, path: str, headers: dict[str, str], body: Any, status: int, code: str | None
) -> None:
    async with rig(FAST) as made:
        answer = await made.http.request(method, path, headers=headers, json=body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if code is not None:
            assert error["code"] == code
        if status == 503:
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert "secret" not in error["message"] or body["model"] == "secret"
        assert answer.headers["x-request-id"]
        assert made.total("galerne_requests_total", status=str(status)) == 1
        assert made.engines[0].gate.in_flight == 0
        assert made.total("galerne_requests_finished_total", outcome="completed") == 0


async def test_malformed_json_is_a_400() -> None:
    async with rig(FAST) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, content=b'{"model": "chat", ')
        assert answer.status_code == 400
        assert "JSON" in answer.json()["error"]["message"]


async def test_unknown_and_foreign_models_look_alike() -> None:
    async with rig(FAST) as made:
        texts = []
        for model in ("secret", "nowhere"):
            answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"model": model})
            texts.append(answer.text.replace(model, "M"))
        assert texts[0] == texts[1]


async def test_own_routes() -> None:
    async with rig(FAST) as made:
        listed = (await made.http.get("/v1/models", headers=AUTH)).json()
        assert [m["id"] for m in listed["data"]] == ["chat", "acme/vectors"]
        one = await made.http.get("/v1/models/acme/vectors", headers=AUTH)
        assert one.json()["id"] == "acme/vectors"
        assert (await made.http.get("/v1/models/secret", headers=AUTH)).status_code == 404
        assert (await made.http.get("/health/live")).json() == {"status": "live"}
        assert (await made.http.get("/health/ready")).status_code == 200
        assert (await made.http.get("/version", headers=AUTH)).json()["name"] == "galerne"
    async with rig() as made:
        assert (await made.http.get("/health/ready")).status_code == 503


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-galerne-engine-token": TOKEN}, 200),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": TOKEN[:-1]}, 403),
        ({"x-galerne-engine-token": "", "authorization": "Bearer sk-demo"}, 403),
        ({}, 403),
    ],
)
async def test_the_engines_port_asks_for_its_token(headers: dict[str, str], status: int) -> None:
    async with rig(FAST) as made:
        url = f"http://127.0.0.1:{made.engines[0].port}{COMPLETIONS}"
        async with httpx.AsyncClient() as direct:
            assert (await direct.post(url, headers=headers, json=CHAT)).status_code == status


async def test_bytes_pass_unchanged() -> None:
    async with rig(FAST) as made:
        engine = made.engines[0]
        direct = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{engine.port}", headers={"x-galerne-engine-token": TOKEN}
        )
        async with direct:
            for stream in (False, True):
                body = CHAT | {"stream": stream}
                theirs = (await direct.post(COMPLETIONS, json=body)).text
                ours = (await made.http.post(COMPLETIONS, headers=AUTH, json=body)).text
                assert _without_ids(ours) == _without_ids(theirs)
        big = CHAT | {"messages": [{"role": "user", "content": "word " * 13_000}]}
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=big)).status_code == 200
        assert made.total("galerne_requests_finished_total", outcome="completed") == 3


async def test_a_prefix_is_cached_for_its_tenant_alone() -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "a prefix of several blocks " * 40}]}
    other = {"authorization": "Bearer sk-other"}

    async with rig(FAST) as made:

        async def cached(headers: dict[str, str], **fields: Any) -> int:
            answer = await made.http.post(COMPLETIONS, headers=headers, json=body | fields)
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert await cached(AUTH) == 0
        assert await cached(AUTH) > 0
        assert await cached(other) == 0
        # Neither a salt of its own nor a guess at the other's gets a client into another cache.
        assert await cached(AUTH, cache_salt="guess") > 0
        assert await cached(other, cache_salt="guess") > 0


def _without_ids(text: str) -> list[Any]:
    rows = [line.removeprefix("data: ") for line in text.splitlines() if line and line != "data: [DONE]"]
    return [{k: v for k, v in json.loads(row).items() if k not in {"id", "created"}} for row in rows]


async def test_sequential_requests_share_one_connection() -> None:
    peers = set()

    def wrap(app: Any) -> Any:
        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                peers.add(scope["client"])
            await app(scope, receive, send)

        return counted

    async with rig(FAST, wrap=wrap) as made:
        for _ in range(5):
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert len(peers) == 1


async def test_a_client_that_leaves_frees_the_engine() -> None:
    async with rig(FakeEngineConfig(decode_ms=20)) as made:
        body = CHAT | {"stream": True, "max_tokens": 5000, "ignore_eos": True}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            await anext(stream.aiter_bytes())
            assert made.engines[0].gate.in_flight == 1
        await made.settled()
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == 1


async def test_a_cut_stream_ends_with_an_error_event() -> None:
    broken = FakeEngineConfig(decode_ms=1, faults=FakeFaults(cut_after_bytes=2000))
    async with rig(broken) as made:
        body = CHAT | {"stream": True, "max_tokens": 500, "ignore_eos": True}
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=body)
        events = [line for line in answer.text.splitlines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "stream_cut"
        assert made.total("galerne_streams_cut_total") == 1
        assert made.total("galerne_requests_finished_total", outcome="failed") == 1


async def test_a_cut_whole_answer_is_a_cut_connection() -> None:
    broken = FakeEngineConfig(decode_ms=1, faults=FakeFaults(cut_after_bytes=100))
    async with rig(broken) as made:
        with pytest.raises(httpx.RemoteProtocolError):
            await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)


async def test_an_engines_500_does_not_reach_the_client() -> None:
    async with rig(FakeEngineConfig(faults=FakeFaults(error_rate=1.0))) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "engine_failed"
        assert made.total("galerne_upstream_errors_total", kind="server_error") == 1


async def test_an_engine_that_hangs_is_a_504() -> None:
    async with rig(FakeEngineConfig(faults=FakeFaults(hang_rate=1.0)), response_timeout_s=0.2) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "engine_timeout"


async def test_a_dead_replica_is_passed_over() -> None:
    async with rig(FAST, dead=1) as made:
        for _ in range(12):
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert made.total("galerne_upstream_errors_total", kind="connect") > 0


async def test_only_dead_replicas_is_a_503() -> None:
    async with rig(dead=2) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers


async def test_a_replica_that_leaves_finishes_its_stream() -> None:
    async with rig(FakeEngineConfig(decode_ms=5)) as made:
        body = CHAT | {"stream": True, "max_tokens": 40}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            made.gateway.update_replicas("chat", ())
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 503


async def test_overload_is_a_503() -> None:
    async with rig(FakeEngineConfig(decode_ms=20), max_ongoing_requests=1) as made:
        body = CHAT | {"stream": True, "max_tokens": 200, "ignore_eos": True}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            await anext(stream.aiter_bytes())
            answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "overloaded"


async def test_a_body_that_does_not_come_is_a_408() -> None:
    async with rig(FAST, body_timeout_s=0.2) as made:

        async def slow() -> AsyncIterator[bytes]:
            yield b'{"model"'
            await asyncio.sleep(2)
            yield b"}"

        answer = await made.http.post(COMPLETIONS, headers=AUTH, content=slow())
        assert answer.status_code == 408


async def test_a_chunked_body_is_bounded_too() -> None:
    async with rig(FAST) as made:

        async def flood() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b"x" * 10_000

        with contextlib.suppress(httpx.WriteError):
            answer = await made.http.post(COMPLETIONS, headers=AUTH, content=flood())
            assert answer.status_code == 413


async def test_the_engines_port_asks_for_the_token() -> None:
    async with rig(FAST) as made:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.engines[0].port}") as direct:
            assert (await direct.post(COMPLETIONS, json=CHAT)).status_code == 403
            assert (await direct.get("/v1/models")).status_code == 403
            assert (await direct.get("/health")).status_code == 200
