"""Two gateways before the same two simulated engines: what each learns of the other, and that no client does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx
import pytest

from serving.api.app import Gateway
from serving.api.upstream import UpstreamError
from serving.config import FakeEngineConfig
from serving.engine.load import EngineLoad, Share, read
from serving.engine.placements import EXCHANGE, MOST_BYTES, packed
from serving.engine.private_server import PrivateServer
from serving.metrics.gateway import GatewayMetrics
from serving.routing.seat import Seat
from tests.unit.test_gateway import AUTH, COMPLETIONS, TOKEN, Rig, configuration, rig
from tests.unit.test_routing_live import SMALL, ask, chat, text

SLOW = FakeEngineConfig(decode_ms=20, kv_blocks=256, block_tokens=16)
OWN = {"x-galerne-engine-token": TOKEN}


@contextlib.asynccontextmanager
async def another(first: Rig, chat: dict[str, Any], seed: int = 8) -> AsyncIterator[Rig]:
    """A second gateway before the first one's engines; both know that they are two."""
    metrics = GatewayMetrics(time.monotonic)
    gateway = Gateway(configuration(chat), engine_token=TOKEN, metrics=metrics, rng=Random(seed))
    gateway.update_replicas("chat", first.endpoints)
    for one in (first.gateway, gateway):
        one.divide(2)
    front = PrivateServer(gateway, host="127.0.0.1", token="")
    await front.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}", timeout=20) as http:
        try:
            yield Rig(gateway, metrics, http, first.engines, first.endpoints)
        finally:
            await http.aclose()
            gateway.close()
            await front.stop()


def seats(of: Rig) -> dict[str, Seat]:
    return {seat.name: seat for seat in of.gateway.replicas.router("chat").seats}


@contextlib.asynccontextmanager
async def streaming(made: Rig, tokens: int = 100) -> AsyncIterator[str]:
    """A stream that has its first token and runs on; the replica that it is on."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "go on"}], "max_tokens": tokens, "stream": True}
    async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
        assert stream.status_code == 200
        assert "x-galerne-load" not in stream.headers
        await anext(stream.aiter_lines())
        (on,) = (name for name, seat in seats(made).items() if seat.in_flight)
        yield on


@pytest.mark.parametrize("policy", ["cost", "power-of-two", "session"])
async def test_a_gateway_sends_past_what_another_has_under_way(policy: str) -> None:
    async with rig(SLOW, SLOW, chat=chat(policy)) as one, another(one, chat(policy)) as two:
        async with streaming(one) as busy:
            await two.gateway._peers.exchange()
            others = {name: seat.others.in_flight for name, seat in seats(two).items()}
            assert others == {name: int(name == busy) for name in others}
            assert seats(two)[busy].said is not None
            async with streaming(two) as second:
                assert second != busy
                # Said with the head of the answer, without another exchange.
                assert seats(one)[second].others.in_flight == 0
                await one.gateway._peers.exchange()
                assert seats(one)[second].others == Share(1, seats(two)[second].in_flight_tokens, 0)
                assert seats(one)[busy].others == Share()
        await two.gateway._peers.exchange()
        assert {seat.others for seat in seats(two).values()} == {Share()}


async def test_a_head_says_what_others_have_there() -> None:
    async with rig(SLOW, chat=chat("cost")) as one, another(one, chat("cost")) as two:
        async with streaming(one), streaming(two):
            assert seats(two)["r0"].others.in_flight == 1
            assert seats(one)["r0"].others.in_flight == 0, "its own head was sent before the other came"


async def test_what_was_said_is_forgotten() -> None:
    async with rig(SLOW, SLOW, chat=chat("session")) as one, another(one, chat("session")) as two:
        async with streaming(one) as busy:
            await two.gateway._peers.exchange()
            two.gateway.replicas.forget_said(60.0)
            assert seats(two)[busy].others.in_flight == 1
            two.gateway.replicas.forget_said(-1.0)
            assert (seats(two)[busy].others, seats(two)[busy].said) == (Share(), None)
            assert two.gateway.replicas.router("chat")._others_in_flight == 0


async def test_probes_keep_what_was_said_fresh() -> None:
    faults = {"probe_interval_s": 0.02}
    async with rig(SLOW, SLOW, chat=chat("cost"), faults=faults) as one, another(one, chat("cost")) as two:
        one.gateway.start()
        async with streaming(two) as busy:
            async with asyncio.timeout(5):
                while seats(one)[busy].others.in_flight != 1:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            while seats(one)[busy].others.in_flight:
                await asyncio.sleep(0.01)


async def test_a_prompt_that_one_has_placed_is_found_by_the_other() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost")) as one, another(one, chat("cost")) as two:
        for i in range(6):
            assert await ask(one, text(i, 200)) == 0
        for made in (one, two):
            await made.gateway._peers.exchange()
        found = [await ask(two, text(i, 200)) for i in range(6)]
        assert min(found) > 0
        assert two.total("galerne_route_choices_total", reason="prefix") == 6
        await two.gateway._peers.exchange()
        blocks = one.gateway.replicas.blocks()["chat"]
        await one.gateway._peers.exchange()
        assert one.gateway.replicas.blocks()["chat"] == blocks, "nothing new for who placed them"


async def test_one_gateway_alone_posts_nothing() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost")) as one:
        await ask(one, text(1, 200))
        assert one.gateway.replicas.shared() == []
        assert not any(seat.placed for seat in seats(one).values())


@pytest.mark.parametrize("failure", [UpstreamError("broken", "gone"), TimeoutError(), (503, b""), (200, b"?")])
async def test_what_a_port_does_not_take_is_posted_again(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def post(*_: Any, **__: Any) -> tuple[int, bytes]:
        if isinstance(failure, Exception):
            raise failure
        return failure  # type: ignore[no-any-return]

    async with rig(SMALL, SMALL, chat=chat("cost")) as one, another(one, chat("cost")) as two:
        await ask(one, text(1, 200))
        with monkeypatch.context() as patched:
            patched.setattr(one.gateway._pool, "post", post)
            await one.gateway._peers.exchange()
        # What a port took before it answered nonsense is not kept for another time.
        assert sum(len(seat.placed) for seat in seats(one).values()) == (0 if failure == (200, b"?") else 1)
        await one.gateway._peers.exchange()
        await two.gateway._peers.exchange()
        assert sum(len(seat.placed) for seat in seats(one).values()) == 0
        assert (two.gateway.replicas.blocks()["chat"] > 0) == (failure != (200, b"?"))


async def test_the_port_says_its_load_and_exchanges_with_gateways_alone() -> None:
    async with rig(SLOW) as made, httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.engines[0].port}") as direct:
        idle = read((await direct.get("/health")).headers["x-galerne-load"].encode())
        assert idle is not None
        assert (idle.engine, idle.others) == (EngineLoad(), Share())
        async with streaming(made):
            said = read((await direct.get("/health")).headers["x-galerne-load"].encode())
            assert said is not None
            assert (said.engine.running, said.engine.waiting, said.others.in_flight) == (1, 0, 1)
            assert 0 < said.engine.kv_use < 1
        message = packed(0, [(1,)])
        assert (await direct.post(EXCHANGE, content=message)).status_code == 403
        bearer = {"authorization": f"Bearer {TOKEN}"}
        assert (await direct.post(EXCHANGE, headers=bearer, content=message)).status_code == 404
        assert (await direct.post(EXCHANGE, headers=OWN, content=message[:-1])).status_code == 400
        assert (await direct.post(EXCHANGE, headers=OWN, content=bytes(MOST_BYTES + 16))).status_code == 413
        assert (await direct.post(EXCHANGE, headers=OWN, content=message)).status_code == 200
