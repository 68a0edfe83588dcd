"""Connections to engines: kept while an engine is listed, and not for one that has left, whoever still asks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from serving.api.upstream import Pool
from serving.config import FakeEngineConfig
from serving.engine.fake import build_app
from serving.engine.private_server import PrivateServer
from serving.routing.replicas import Endpoint
from tests.unit.test_billing import Kept, complete
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, TOKEN, rig


@asynccontextmanager
async def engine() -> AsyncIterator[Endpoint]:
    fake = build_app(FAST, "chat")
    await fake.start()
    server = PrivateServer(fake, host="127.0.0.1", token=TOKEN, load=fake.load)
    await server.start()
    try:
        yield Endpoint("r0", server.host, server.port)
    finally:
        await server.stop()


async def ask(pool: Pool, endpoint: Endpoint) -> int:
    status, _ = await pool.get(endpoint, "/health", TOKEN, most_bytes=1000)
    return status


async def test_connections_are_kept_until_the_engine_is_dropped_and_no_more_after_it() -> None:
    pool = Pool(1.0)
    async with engine() as endpoint:
        assert (await ask(pool, endpoint), pool.idle()) == (200, 0)
        pool.keep(endpoint)
        for _ in range(3):
            assert (await ask(pool, endpoint), pool.idle()) == (200, 1)
        pool.keep(endpoint)
        assert pool.idle() == 1
        pool.drop(endpoint)
        assert pool.idle() == 0
        assert (await ask(pool, endpoint), pool.idle()) == (200, 0)
        assert not pool.engines()


async def test_who_asks_an_engine_that_has_left_about_a_bill_leaves_nothing_behind(tmp_path: Path) -> None:
    ledger = Kept(tmp_path)
    async with rig(FakeEngineConfig(decode_ms=20), ledger=ledger) as made:
        body = CHAT | {"stream": True, "max_tokens": 500, "ignore_eos": True}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            await anext(stream.aiter_lines())
            assert made.gateway._pool.engines() == set(made.endpoints)
            made.gateway.update_replicas("chat", ())
        await made.settled()
        (row,) = await complete(ledger, 1)
        assert row.exact  # it was asked
        await asyncio.sleep(0)
        assert made.gateway._pool.engines() == set()
        assert made.gateway._pool.idle() == 0
