"""What one tenant's flood does to others: fake engine, gateways and clients, each in a process of its own; real sockets.

The engine is simulated (its latency model sets the pace), so the figures say nothing of a model's speed; they say what
the queue in the gateway changes. First come first served is the same gateway with engines of no bound: everything is
given to the engine, which queues by arrival. `make bench-fairness`; the figures also go to build/bench/fairness.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import FakeEngineConfig, GalerneConfig
from serving.engine.fake import build_app
from serving.engine.private_server import PrivateServer
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint
from tests.redis_server import redis_server

SLOTS = 256
# A step takes the same whoever is in it and prompts are read at once, so that the queue alone makes a difference. And it is
# slow: on two cores a step's 256 events take engine, gateways and clients tens of milliseconds.
ENGINE = FakeEngineConfig(
    decode_ms=200, decode_ms_per_sequence=0.005, prefill_tokens_per_s=1e7, prefill_chunk_tokens=65536, batch_slots=SLOTS
)
UNBOUND = {"sequences_per_replica": 100_000, "kv_tokens_per_replica": 10**9, "requests": 4096}
FAIR = {"requests": 4096}
# Answers of different lengths, or all would end together.
OUTPUT_TOKENS = (24, 72)
LENGTHS = Random(11)
WEIGHTS = {"one": 1.0, "two": 1.0, "three": 2.0, "four": 4.0}
# Twenty times what one of two tenants has of the slots would be 2,560 sockets of this one process: as many as keep
# the queue full all the time do the same.
FLOOD = 3 * SLOTS
LIGHT_EVERY_S = 0.5
# Until what began together ends apart.
WARM_S = 10.0
PROMPT = "the queue is fair " * 40


@dataclass
class Seen:
    """What clients of one tenant saw."""

    first_s: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0


def engine(ours: Connection) -> None:
    """A process: the fake engine, until the other end of the pipe is closed."""

    async def serve() -> None:
        fake = build_app(ENGINE, "m")
        await fake.start()
        server = PrivateServer(fake, host="127.0.0.1", token="t")
        await server.start()
        ours.send(server.port)
        await asyncio.to_thread(_closed, ours)
        await server.stop()

    asyncio.run(serve())


def clients(ours: Connection, ports: list[int], floods: dict[str, int], run_s: float) -> None:
    """A process: floods of so many, and somebody who sends little; says when it measures, and what was seen."""

    async def load() -> None:
        seen = {tenant: Seen() for tenant in ("light", *floods)}
        tasks = [asyncio.create_task(flood(ports, floods, seen))]
        await asyncio.sleep(WARM_S if floods else 0.2)
        for one in seen.values():
            one.tokens, one.first_s = 0, []
        began_s = time.monotonic()
        ours.send(None)
        tasks.append(asyncio.create_task(little(ports, "light", seen["light"], Random(5))))
        await asyncio.sleep(run_s)
        took_s = time.monotonic() - began_s
        ours.send((seen, took_s))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(load())


@contextlib.contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A process and the pipe to it; ended at the exit."""
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe()
    child = spawn.Process(target=target, args=(its, *args), daemon=True)
    child.start()
    its.close()
    try:
        yield ours
    finally:
        ours.close()
        child.join(10)
        child.kill()


def _closed(ours: Connection) -> None:
    with contextlib.suppress(EOFError):
        ours.recv()


@contextlib.asynccontextmanager
async def gateways_before(
    engine_port: int, hold: dict[str, Any], gateways: int, store: str
) -> AsyncIterator[tuple[list[Gateway], list[int]]]:
    """Gateways before one engine, and the ports they listen on."""
    names = {"flood": 1.0, "light": 1.0} | WEIGHTS
    config = GalerneConfig.model_validate(
        {
            "gateway": {"replicas": gateways},
            "limits_store": store,
            "models": [{"id": "m", "source": "fake:m", "fake": ENGINE.model_dump(), "hold": hold}],
            "tenants": [
                {"id": name, "weight": weight, "keys": [{"id": "k", "sha256": digest(f"sk-{name}")}]}
                for name, weight in names.items()
            ],
        }
    )
    apps, fronts = [], []
    for i in range(gateways):
        app = Gateway(config, engine_token="t", metrics=GatewayMetrics(time.monotonic), rng=Random(i))
        app.divide(gateways)
        app.update_replicas("m", (Endpoint("r", "127.0.0.1", engine_port),))
        front = PrivateServer(app, host="127.0.0.1", token="")
        await front.start()
        apps.append(app)
        fronts.append(front)
        app.start()
    try:
        yield apps, [front.port for front in fronts]
    finally:
        for app in apps:
            app.close()
            if app.quotas.link is not None:
                await app.quotas.link.close()
        for server in fronts:
            await server.stop()


async def ask(port: int, tenant: str, seen: Seen) -> None:
    """One streamed request, read as bytes: the client must cost little beside what is measured."""
    body = json.dumps(
        {
            "model": "m",
            "stream": True,
            "max_tokens": LENGTHS.randint(*OUTPUT_TOKENS),
            "messages": [{"role": "user", "content": f"{tenant} {time.monotonic()} {PROMPT}"}],
        }
    ).encode()
    sent_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-{tenant}\r\n"
        head += f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        first = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in first[:16]:
            seen.refused += 1
            await asyncio.sleep(0.5)
            return
        # The first event, not a keep-alive.
        began = False
        while part := await reader.read(65536):
            if not began and b"data: " in part:
                began = True
                seen.first_s.append(time.monotonic() - sent_s)
            seen.tokens += part.count(b"data: ")
    finally:
        writer.close()


async def flood(ports: list[int], counts: dict[str, int], seen: dict[str, Seen]) -> None:
    """So many requests of each tenant outstanding all the time; they begin in turns."""

    async def one(number: int, tenant: str) -> None:
        while True:
            await ask(ports[number % len(ports)], tenant, seen[tenant])

    async with asyncio.TaskGroup() as group:
        for number in range(max(counts.values(), default=0)):
            for tenant in (t for t, count in counts.items() if number < count):
                group.create_task(one(number, tenant))


async def little(ports: list[int], tenant: str, seen: Seen, rng: Random) -> None:
    """A request now and then, whatever became of those before."""
    async with asyncio.TaskGroup() as group:
        number = 0
        while True:
            await asyncio.sleep(rng.expovariate(1 / LIGHT_EVERY_S))
            group.create_task(ask(ports[number % len(ports)], tenant, seen))
            number += 1


def part(values: list[float], of: float) -> float:
    """A quantile; nan where there is nothing."""
    return sorted(values)[min(len(values) - 1, int(of * len(values)))] if values else float("nan")


async def run(hold: dict[str, Any], floods: dict[str, int], run_s: float, gateways: int, store: str) -> dict[str, Any]:
    """One load, measured after everything is full."""
    with process(engine) as engine_pipe:
        engine_port = await asyncio.to_thread(engine_pipe.recv)
        async with gateways_before(engine_port, hold, gateways, store) as (apps, ports):

            def given() -> dict[str, float]:
                return {t: sum(a.hold["m"].queue.lane(t).service for a in apps) for t in floods}

            with process(clients, ports, floods, run_s) as clients_pipe:
                await asyncio.to_thread(clients_pipe.recv)
                before = given()
                seen, took_s = await asyncio.to_thread(clients_pipe.recv)
                after = given()
    light = seen["light"].first_s
    print(f"{gateways} gateway(s), {', '.join(floods) or 'alone'}: {took_s:.0f} s", file=sys.stderr, flush=True)
    return {
        "light_requests": len(light),
        "light_ttft_p50_ms": round(part(light, 0.5) * 1000, 1),
        "light_ttft_p99_ms": round(part(light, 0.99) * 1000, 1),
        "light_ttft_max_ms": round(part(light, 1.0) * 1000, 1),
        "tok_s": round(sum(s.tokens for s in seen.values()) / took_s, 1),
        "refused": sum(s.refused for s in seen.values()),
        "service": {t: round(after[t] - before[t], 1) for t in floods},
    }


def jain(service: dict[str, float]) -> float:
    """Jain's index of service over weight: 1 is fair."""
    values = [given / WEIGHTS[tenant] for tenant, given in service.items()]
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


async def measure(run_s: float, store: str, gateways: int) -> dict[str, Any]:
    """Alone, beside a flood, the same first come first served, and four that always wait."""
    one = {"flood": FLOOD}
    alone = await run(FAIR, {}, run_s, gateways, store)
    fair = await run(FAIR, one, run_s, gateways, store)
    fcfs = await run(UNBOUND, one, run_s, gateways, store)
    four = await run(FAIR, dict.fromkeys(WEIGHTS, SLOTS), run_s, gateways, store)
    return {
        "gateways": gateways,
        "light_alone": alone,
        "light_beside_flood": fair,
        "light_beside_flood_fcfs": fcfs,
        "four_backlogged": four,
        "ttft_p99_ratio": round(fair["light_ttft_p99_ms"] / alone["light_ttft_p99_ms"], 3),
        "ttft_p99_ratio_fcfs": round(fcfs["light_ttft_p99_ms"] / alone["light_ttft_p99_ms"], 3),
        "tok_s_ratio": round(fair["tok_s"] / fcfs["tok_s"], 3),
        "jain": round(jain(four["service"]), 4),
    }


def main() -> None:
    """Print and write what was measured."""
    arguments = argparse.ArgumentParser(description="What one tenant's flood does to others (simulated engine).")
    # Two light requests a second: less than a minute of them has no 99th percentile to speak of.
    arguments.add_argument("--run-s", type=float, default=90.0)
    arguments.add_argument("--gateways", type=int, choices=(1, 2), nargs="+", default=(1, 2))
    arguments.add_argument("--out", type=Path, default=Path("build/bench/fairness.json"))
    args = arguments.parse_args()
    found = []
    for gateways in args.gateways:
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            store = "memory://" if gateways == 1 else stack.enter_context(redis_server(Path(directory))).url
            found.append(asyncio.run(measure(args.run_s, store, gateways)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found:
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
