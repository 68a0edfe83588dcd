"""What the watch ends and what it leaves alone: stalled answers, slow readers, long prefills, its own lateness."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from serving.api.upstream import Pool
from serving.api.watch import LATE_S, Verdict, Watch, verdict
from serving.config import FakeEngineConfig, FakeFaults, GatewayFaultsConfig, ModelConfig
from serving.engine.private_server import PrivateServer
from serving.metrics.gateway import GatewayMetrics
from serving.routing.ejection import PROBES
from serving.routing.health import Health
from serving.routing.replicas import Endpoint
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, TOKEN, rig


@pytest.mark.parametrize(
    ("silent_s", "dark_s", "untaken_s", "expected"),
    [
        (14, 99, 0, "fine"),
        (15, 15, 0, "stalled"),
        # A long prefill: silent for minutes, and the replica answers probes.
        (600, 0, 0, "fine"),
        (600, 14, 0, "fine"),
        # The client does not read, so we do not either: silence proves nothing.
        (99, 99, 10, "fine"),
        (0, 0, 299, "fine"),
        (0, 0, 300, "slow"),
        (400, 400, 300, "slow"),
    ],
)
def test_verdicts(silent_s: float, dark_s: float, untaken_s: float, expected: Verdict) -> None:
    assert verdict(silent_s, dark_s, untaken_s, stall_s=15, slow_reader_s=300) == expected


class Bench:
    """A watch over one server, looked with by hand."""

    def __init__(self, port: int, clock: Any = time.monotonic, **faults: float) -> None:
        self.endpoint = Endpoint("r0", "127.0.0.1", port)
        others = tuple(Endpoint(f"r{n}", "127.0.0.1", port) for n in (1, 2))
        models = [ModelConfig(id="chat", source="fake:chat")]
        self.health = Health(models, clock, GatewayMetrics(clock))
        self.health.update("chat", (self.endpoint, *others))
        self.pool = Pool(1.0)
        for endpoint in (self.endpoint, *others):
            self.pool.keep(endpoint)
        self.watch = Watch(
            self.pool,
            self.health,
            GatewayFaultsConfig(probe_interval_s=0.01, **faults),
            engine_token=TOKEN,
            clock=clock,
            on_slow=lambda model: None,
        )

    @property
    def out(self) -> frozenset[str]:
        return self.health["chat"].ejections.out

    async def run(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.watch.run()

    async def until_out(self) -> None:
        running = asyncio.create_task(self.watch.run())
        async with asyncio.timeout(20):
            while not self.out:
                await asyncio.sleep(0.01)
        running.cancel()


@contextlib.asynccontextmanager
async def server(status: int | None) -> Any:
    """A server whose health is `status`; None: it takes connections and never answers."""
    asked = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        asked.append(dict(scope["headers"]))
        if status is None:
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    made = PrivateServer(app, host="127.0.0.1", token=TOKEN)
    await made.start()
    try:
        yield made.port, asked
    finally:
        await made.stop()


async def test_a_healthy_replica_is_asked_with_the_engines_token_on_one_connection() -> None:
    async with server(200) as (port, asked):
        bench = Bench(port)
        await bench.run(0.3)
        assert bench.out == frozenset()
        assert len(asked) > 2 * PROBES
        assert {headers[b"x-galerne-engine-token"] for headers in asked} == {TOKEN.encode()}
        assert bench.pool.idle() <= 3
        bench.pool.close()


@pytest.mark.parametrize("status", [503, None])
async def test_a_replica_whose_core_is_dead_or_that_hangs_is_ejected(status: int | None) -> None:
    async with server(status) as (port, _):
        bench = Bench(port, probe_timeout_s=0.05)
        await bench.until_out()
        # All three fail; so many of three as may be are out.
        assert len(bench.out) == 1
        bench.pool.close()


async def test_a_probe_is_no_evidence_where_the_gateway_itself_was_late() -> None:
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += LATE_S + 0.1  # every look at it finds it late
        return now_s

    async with server(None) as (port, _):
        bench = Bench(port, clock, probe_timeout_s=0.01)
        await bench.run(0.5)
        assert bench.out == frozenset()
        bench.pool.close()


async def test_a_drained_replica_refuses_what_still_comes() -> None:
    async with rig(FAST, FAST) as made:
        assert await made.engines[0].drain(1)
        for _ in range(12):
            assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        assert made.total("galerne_retries_total", kind="server_error", end="sent") > 0


async def test_drain_waits_for_every_stream() -> None:
    async with rig(FakeEngineConfig(decode_ms=10)) as made:
        body = CHAT | {"stream": True, "max_tokens": 30}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            drained = asyncio.create_task(made.engines[0].drain(20))
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert await drained


async def test_a_long_silence_of_a_replica_that_answers_probes_is_left_alone() -> None:
    quiet = FakeEngineConfig(decode_ms=700)
    chat = {"faults": {"stall_s": 0.1}, "hold": {"requests": 0}}
    async with rig(quiet, chat=chat, faults={"probe_interval_s": 0.05}) as made:
        made.gateway.start()
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"max_tokens": 1, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_an_answer_that_stalls_on_the_only_replica_is_a_504() -> None:
    hangs = FakeEngineConfig(faults=FakeFaults(hang_rate=1.0))
    chat = {"faults": {"stall_s": 0.1}, "hold": {"requests": 0}}
    dead = False

    def wrap(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if dead and scope["type"] == "http" and scope["path"] == "/health":
                await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            else:
                await app(scope, receive, send)

        return wrapped

    async with rig(hangs, wrap=wrap, chat=chat, faults={"probe_interval_s": 0.05}) as made:
        made.gateway.start()
        asked = asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=CHAT))
        while not made.engines[0].gate.in_flight:
            await asyncio.sleep(0.01)
        dead = True
        answer = await asked
        assert answer.status_code == 504
        assert made.total("galerne_upstream_errors_total", kind="stalled") == 1
        # The last one is never ejected.
        assert made.gateway.health["chat"].ejections.out == frozenset()
