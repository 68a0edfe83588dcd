"""A gateway in this process before simulated engines in processes of their own, which can be killed and stopped.

Its clients are bare sockets: each counts what came of a request, so that a scenario's books can be held against the
gateway's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import FakeEngineConfig, GalerneConfig
from serving.engine.fake.__main__ import main
from serving.engine.private_server import PrivateServer
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint

KEY = "sk-press"
PATH = "/v1/chat/completions"
START_S = 60.0
SETTLE_S = 30.0
# What is promised of ejection, and what a machine that does other things too is left.
EJECTED_S, MARGIN_S = 5.0, 5.0
# A gateway's memory after a scenario's last round, beside that after its first ones, which fill caches and buffers.
ROUNDS, FIRST_ROUNDS, FLAT = 6, 2, 0.05
# Forks of one process that has imported everything: an engine of its own starts in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.replicas"])


def serve(arguments: list[str]) -> None:
    """What `python -m serving.engine.fake` does, in a process that is asked to."""
    sys.argv[1:] = arguments
    main()


class Engine:
    """One simulated engine in its own process."""

    def __init__(self, name: str, fake: FakeEngineConfig) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.endpoint = Endpoint(name, "127.0.0.1", port)
        arguments = ["--model", "chat", "--port", str(port), "--config-json", fake.model_dump_json()]
        self.process = PROCESSES.Process(target=serve, args=(arguments,), daemon=True)
        self.process.start()

    async def ready(self) -> None:
        """Return when it answers."""
        deadline_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                status, _ = await request(self.endpoint.port, "GET", "/health")
                if status == 200:
                    return
            assert self.alive, "a simulated engine ended while it was starting"
            assert time.monotonic() < deadline_s, "a simulated engine did not start"
            await asyncio.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    async def metric(self, name: str) -> float:
        _, body = await request(self.endpoint.port, "GET", "/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
            if sample.name == name
        )

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()


@dataclass
class Rig:
    """A gateway on a socket that watches its engines."""

    gateway: Gateway
    metrics: GatewayMetrics
    port: int
    engines: list[Engine]

    def total(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def ejected(self) -> frozenset[str]:
        return self.gateway.health["chat"].ejections.out

    def strike(self, engine: Engine, number: signal.Signals) -> asyncio.Task[float]:
        """Kill or stop an engine: seconds from then until the gateway's metric says that a replica is ejected."""
        began_s = time.monotonic()
        engine.signal(number)
        return asyncio.create_task(self._ejected(began_s))

    async def _ejected(self, began_s: float) -> float:
        while not self.total("galerne_replicas_ejected", model="chat"):
            assert time.monotonic() - began_s < SETTLE_S, "not ejected"
            await asyncio.sleep(0.05)
        return time.monotonic() - began_s

    def list(self, engines: list[Engine]) -> None:
        """Tell the gateway which replicas there are."""
        self.gateway.update_replicas("chat", tuple(e.endpoint for e in engines))

    async def ask(self, max_tokens: int = 4, *, stream: bool = True) -> str:
        """One request as a client sees it."""
        return await ask(self.port, KEY, max_tokens, stream=stream)

    async def settled(self) -> dict[str, int]:
        """Wait until nothing is under way, hold the books against each other, and return them."""
        return await self.settled_but("")

    async def settled_but(self, silent: str) -> dict[str, int]:
        """The same while one replica answers nobody."""
        deadline_s = time.monotonic() + SETTLE_S
        while self.total("galerne_requests_in_flight"):
            assert time.monotonic() < deadline_s, "a request never ended"
            await asyncio.sleep(0.02)
        accepted = self.total("galerne_requests_accepted_total")
        ends = {
            outcome: int(self.total("galerne_requests_finished_total", outcome=outcome))
            for outcome in ("completed", "rejected", "failed", "cancelled")
        }
        assert accepted == sum(ends.values()), (accepted, ends)
        assert all(n == 0 for replicas in self.gateway.replicas.snapshot().values() for n in replicas.values())
        assert self.gateway.health["chat"].budget.active == 0
        assert self.gateway.health["chat"].budget.retrying == 0
        for _, hold in self.gateway.hold.items():
            assert (hold.held(), hold.held_bytes, hold.turns) == ({}, 0, 0)
        for engine in self.engines:
            if engine.alive and engine.endpoint.replica_id != silent:
                await self._engine_settled(engine, deadline_s)
        return {"accepted": int(accepted), **ends}

    async def _engine_settled(self, engine: Engine, deadline_s: float) -> None:
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            while await engine.metric(name):
                assert time.monotonic() < deadline_s, f"{name} of {engine.endpoint.replica_id} is not back at 0"
                await asyncio.sleep(0.02)


class Memory:
    """What this process, the gateway's, has in memory after each round of a scenario."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._bytes: list[int] = []

    def take(self) -> None:
        """A round is over."""
        gc.collect()
        self._bytes.append(self._process.memory_info().rss)

    @property
    def mib(self) -> list[int]:
        return [size >> 20 for size in self._bytes]

    @property
    def growth(self) -> float:
        """From the first rounds to the last one, a part."""
        return self._bytes[-1] / self._bytes[FIRST_ROUNDS - 1] - 1


async def ask(port: int, key: str, max_tokens: int, *, stream: bool = True, **more: object) -> str:
    """One request, with `more` in its body, as a client sees it: done, cut (the gateway's error event), error
    (another one), broken, or the status of a refusal.
    """
    message = {"role": "user", "content": "hello there"}
    body = {
        "model": "chat",
        "messages": [message],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    } | more
    try:
        status, answer = await request(port, "POST", PATH, json.dumps(body).encode(), key)
    except (OSError, EOFError):
        return "broken"
    if status != 200:
        return str(status)
    if b"stream_cut" in answer:
        return "cut"
    if b'data: {"error"' in answer:
        return "error"
    return "done" if answer.rstrip().endswith(b"data: [DONE]" if stream else b"}") else "broken"


async def ask_many(count: int, at_once: int, ask: Callable[[], Awaitable[str]]) -> Counter[str]:
    """`count` requests, so many at a time; how often each came of it."""
    seen: Counter[str] = Counter()
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            seen[await ask()] += 1

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return seen


def report(scenario: str, seen: dict[str, int], books: dict[str, int], **more: Any) -> None:
    """Print a scenario's counts: what clients saw, and what the gateway wrote down."""
    rest = "".join(f", {name} {value}" for name, value in more.items())
    print(f"\n{scenario}: clients {dict(sorted(seen.items()))}, gateway {books}{rest}")


async def request(port: int, method: str, path: str, body: bytes = b"", key: str = KEY) -> tuple[int, bytes]:
    """One request on a connection of its own; EOFError where the answer is cut."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(method, path, len(body), key) + body)
        answer = await reader.read(-1)
    finally:
        writer.close()
    top, end, rest = answer.partition(b"\r\n\r\n")
    if not end:
        raise EOFError
    if b"transfer-encoding: chunked" in top.lower() and not rest.endswith(b"0\r\n\r\n"):
        raise EOFError
    rest = rest.removesuffix(b"\r\n0\r\n\r\n")
    return int(top.split(b" ", 2)[1]), rest


def head(method: str, path: str, length: int, key: str = KEY) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nhost: galerne\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def configuration(model: dict[str, Any], gateway: dict[str, Any]) -> GalerneConfig:
    return GalerneConfig.model_validate(
        {
            "gateway": gateway,
            "models": [{"id": "chat", "source": "fake:chat"} | model],
            "tenants": [{"id": "press", "keys": [{"id": "a", "sha256": digest(KEY)}]}],
        }
    )


@contextlib.asynccontextmanager
async def rig(
    count: int,
    fake: FakeEngineConfig,
    *,
    first: FakeEngineConfig | None = None,
    model: dict[str, Any] | None = None,
    **gateway: Any,
) -> AsyncIterator[Rig]:
    """A gateway before `count` engines; `first`: the first of them is another."""
    engines = [Engine(f"r{n}", (first or fake) if n == 0 else fake) for n in range(count)]
    try:
        await asyncio.gather(*(engine.ready() for engine in engines))
        metrics = GatewayMetrics(time.monotonic)
        app = Gateway(configuration(model or {}, gateway), engine_token="token", metrics=metrics)
        front = PrivateServer(app, host="127.0.0.1", token="")
        await front.start()
        app.start()
        made = Rig(app, metrics, front.port, engines)
        made.list(engines)
        try:
            yield made
        finally:
            app.close()
            await front.stop()
    finally:
        for engine in engines:
            engine.end()
