"""A gateway as its clients meet it: uvicorn in front, engines behind, all in this process on 127.0.0.1.

Engines are the simulated one, served as a replica serves it (`FakeReplica`), or a few lines that write exact
bytes where the fault is the point (`ScriptedReplica`). Nothing of the gateway is replaced. `Rig.close` holds
the gateway to its promise: what was accepted was counted as ended, and nothing is in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import date
from random import Random
from typing import Any, Protocol

import httpx
import openai
import psutil
import uvicorn
from prometheus_client import CollectorRegistry

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import FakeEngineConfig, GalerneConfig
from serving.engine.fake import build_app
from serving.engine.private_server import OPEN_PATHS, PrivateServer
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint

HOST = "127.0.0.1"
TEXT_MODEL = "acme/tiny"
EMBEDDER = "minilm"
HIDDEN_MODEL = "skunkworks"  # the laboratory's alone
PRESS, LABORATORY, EXPIRED = "sk-press", "sk-laboratory", "sk-expired"
TODAY = date(2026, 6, 1)
TOKEN = "engine-token"
# As fast as the loop goes: tests wait for bytes, never for a time.
FAST: dict[str, Any] = {"decode_ms": 0.0, "decode_ms_per_sequence": 0.0, "prefill_tokens_per_s": 1e9}
# Long enough to be met under way, and endless for a test.
ENDLESS: dict[str, Any] = FAST | {"decode_ms": 5.0}
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Which tide is it?"}]
POLL_S = 0.002
PATIENCE_S = 20.0


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request that every bound lets pass."""
    return {"model": TEXT_MODEL, "messages": HI, "max_tokens": 8} | fields


def configuration(gateway: dict[str, Any] | None = None, limits: dict[str, Any] | None = None) -> GalerneConfig:
    """Two tenants that share no model."""
    return GalerneConfig.model_validate(
        {
            "gateway": gateway or {},
            "limits": limits or {},
            "models": [
                {"id": TEXT_MODEL, "source": "fake:tiny"},
                {"id": EMBEDDER, "source": "fake:minilm", "task": "embed"},
                {"id": HIDDEN_MODEL, "source": "fake:skunkworks"},
            ],
            "tenants": [
                {
                    "id": "press",
                    "keys": [
                        {"id": "desk", "sha256": digest(PRESS)},
                        {"id": "old", "sha256": digest(EXPIRED), "expires": date(2026, 5, 31)},
                    ],
                    "models": [TEXT_MODEL, EMBEDDER],
                },
                {
                    "id": "laboratory",
                    "keys": [{"id": "bench", "sha256": digest(LABORATORY)}],
                    "models": [HIDDEN_MODEL],
                },
            ],
        }
    )


def gateway(config: GalerneConfig | None = None) -> tuple[Gateway, CollectorRegistry]:
    """A gateway without a server around it, and where its metrics are."""
    metrics = GatewayMetrics(time.monotonic)
    app = Gateway(
        config or configuration(),
        engine_token=TOKEN,
        metrics=metrics,
        clock=time.monotonic,
        today=lambda: TODAY,
        rng=Random(7),
    )
    return app, metrics.registry


@dataclass(frozen=True, slots=True)
class Call:
    """A request as an engine saw it."""

    path: str
    headers: dict[bytes, bytes]
    client_port: int


class AnyReplica(Protocol):
    """What stands behind a gateway."""

    model: str
    calls: list[Call]

    @property
    def endpoint(self) -> Endpoint: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class FakeReplica:
    """The simulated engine behind the private server, as an engine replica runs it."""

    def __init__(self, name: str = "fake", model: str = TEXT_MODEL, task: str = "generate", **fields: Any) -> None:
        self.name, self.model = name, model
        self.calls: list[Call] = []
        self._app = build_app(FakeEngineConfig.model_validate(FAST | fields), model, task=task)
        self.server = PrivateServer(self._record, host=HOST, token=TOKEN)

    async def _record(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            self.calls.append(Call(scope["path"], dict(scope["headers"]), scope["client"][1]))
        await self._app(scope, receive, send)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.name, HOST, self.server.port)

    async def start(self) -> None:
        await self._app.start()
        await self.server.start()

    async def stop(self) -> None:
        await self._app.aclose()
        await self.server.stop()

    async def running(self) -> int:
        """Sequences in the engine's batch, as its metrics say."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://{HOST}:{self.server.port}/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        return int(float(lines[0].rpartition(" ")[2]))

    async def direct(self, path: str, body: dict[str, Any], request_id: str) -> httpx.Response:
        """Ask the engine itself, with the gateway's token."""
        headers = {"x-galerne-engine-token": TOKEN, "x-request-id": request_id}
        async with httpx.AsyncClient() as client:
            return await client.post(f"http://{HOST}:{self.server.port}{path}", json=body, headers=headers)


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ScriptedReplica:
    """Reads a request and then does to the connection what the script says; a finished script closes it."""

    def __init__(self, script: Script, name: str = "scripted", model: str = TEXT_MODEL) -> None:
        self.name, self.model = name, model
        self.calls: list[Call] = []
        self._script = script
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._port = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.name, HOST, self._port)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, HOST, 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served in a task")
        self._open.add(task)
        try:
            while True:
                path, headers = await read_request(reader)
                self.calls.append(Call(path, headers, writer.get_extra_info("peername")[1]))
                await self._script(reader, writer)
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the gateway closed it
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[bytes, bytes]]:
    """Path and headers of one request; its body is read and dropped."""
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    headers = {n.lower(): v.strip() for n, _, v in (line.partition(b":") for line in lines[1:] if line)}
    await reader.readexactly(int(headers.get(b"content-length", b"0")))
    return lines[0].split(b" ")[1].decode(), headers


class DeadReplica:
    """A port that nobody listens on and nobody else can take."""

    def __init__(self, name: str = "dead", model: str = TEXT_MODEL) -> None:
        self.name, self.model = name, model
        self.calls: list[Call] = []
        self._socket = socket.socket()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.name, HOST, self._socket.getsockname()[1])

    async def start(self) -> None:
        self._socket.bind((HOST, 0))

    async def stop(self) -> None:
        self._socket.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's


class Rig:
    """A running gateway; `close` checks its books."""

    def __init__(self, config: GalerneConfig, engines: tuple[AnyReplica, ...]) -> None:
        self.engines = engines
        self.gateway, self._registry = gateway(config)
        settings = uvicorn.Config(
            self.gateway, loop="none", http="httptools", log_level="critical", access_log=False, server_header=False
        )
        self._server = _Server(settings)
        self.port = 0
        self._task: asyncio.Task[None] | None = None
        self._http: httpx.AsyncClient | None = None

    @classmethod
    async def start(cls, *engines: AnyReplica, gateway: dict[str, Any] | None = None, **limits: Any) -> Rig:
        """Start engines and gateway; keywords are the configuration's limits."""
        rig = cls(configuration(gateway, limits), engines)
        for engine in engines:
            await engine.start()
        rig.announce(*engines)
        listener = socket.socket()
        listener.bind((HOST, 0))
        rig.port = listener.getsockname()[1]
        rig._task = asyncio.create_task(rig._server.serve(sockets=[listener]))
        await until(lambda: rig._server.started)
        rig._http = httpx.AsyncClient(base_url=f"http://{HOST}:{rig.port}", timeout=PATIENCE_S)
        return rig

    def announce(self, *engines: AnyReplica) -> None:
        """Tell the gateway that these are the replicas of their models now."""
        for model in {engine.model for engine in self.engines}:
            self.gateway.update_replicas(model, tuple(e.endpoint for e in engines if e.model == model))

    @property
    def engine_calls(self) -> int:
        """Requests that reached any engine."""
        return sum(len(engine.calls) for engine in self.engines)

    async def request(self, method: str, path: str, *, key: str | None = PRESS, **options: Any) -> httpx.Response:
        """One request, answered."""
        if self._http is None:
            raise RuntimeError("the gateway has not been started")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return await self._http.request(method, path, headers=headers | options.pop("headers", {}), **options)

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        """One JSON request, answered."""
        return await self.request("POST", path, json=body, **options)

    def sdk(self) -> openai.AsyncOpenAI:
        """The client our users have."""
        return openai.AsyncOpenAI(base_url=f"http://{HOST}:{self.port}/v1", api_key=PRESS, max_retries=0)

    @contextlib.asynccontextmanager
    async def raw(
        self, head: bytes, receive_buffer_bytes: int | None = None
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare connection on which these bytes were sent; closed hard at the end."""
        connection = socket.socket()
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (HOST, self.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=64 * 1024)
        try:
            writer.write(head)
            yield reader, writer
        finally:
            writer.transport.abort()

    def sample(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        return sum(
            sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def finished(self) -> dict[str, float]:
        """Accepted requests that ended, by outcome."""
        outcomes = ("completed", "rejected", "failed", "cancelled")
        counts = {o: self.sample("galerne_requests_finished_total", outcome=o) for o in outcomes}
        return {outcome: count for outcome, count in counts.items() if count}

    async def close(self) -> None:
        """Stop everything; the books must balance."""
        await until(lambda: self.sample("galerne_requests_in_flight") == 0)
        assert self.sample("galerne_requests_accepted_total") == sum(self.finished().values())
        assert self.sample("galerne_replica_in_flight") == 0
        if self._http is not None:
            await self._http.aclose()
        self.gateway.close()
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        for engine in self.engines:
            await engine.stop()


StartRig = Callable[..., Awaitable[Rig]]


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], otherwise: str = "") -> None:
    """Wait until a condition holds; AssertionError where it never does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < deadline_s, otherwise or "the awaited condition never held"
        await asyncio.sleep(POLL_S)


def open_sockets() -> set[tuple[object, object]]:
    """TCP sockets of this process, by both ends."""
    return {(c.laddr, c.raddr) for c in psutil.Process().net_connections("tcp")}


@contextlib.asynccontextmanager
async def leak_check() -> AsyncIterator[None]:
    """Asserts that what runs inside leaves no task and no socket."""
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    yield
    await until(lambda: not (asyncio.all_tasks() - tasks - {asyncio.current_task()}), "a task is left")
    await until(lambda: open_sockets() <= sockets, "a socket is left")


def authorized(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    """A request as bytes, with the press agency's key."""
    lines = [f"{method} {path} HTTP/1.1", "host: gateway", f"authorization: Bearer {PRESS}", *headers]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
