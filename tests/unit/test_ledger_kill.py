"""A gateway that is killed loses no row of a request that ended longer ago than a flush; its writer outlives it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from serving.metering import store
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS
from tests.unit.test_ledger import reading, rows_of

FLUSH_S = 0.4


@contextmanager
def gateway(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "tests.unit.ledger_gateway", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


async def load(port: int, ended: dict[str, float], seconds: float) -> None:
    """Requests one after another on eight connections, until the gateway is gone or the time is up."""
    until_s = time.monotonic() + seconds

    async def one(lane: int, http: httpx.AsyncClient) -> None:
        number = 0
        while time.monotonic() < until_s:
            number += 1
            request_id = f"{lane}-{number}"
            body = CHAT | {"stream": number % 2 == 0}
            try:
                await http.post(COMPLETIONS, headers=AUTH | {"x-request-id": request_id}, json=body)
            except httpx.HTTPError:
                return
            ended[request_id] = time.monotonic()

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        await asyncio.gather(*(one(lane, http) for lane in range(8)))


async def test_a_killed_gateways_rows_are_picked_up(tmp_path: Path) -> None:
    ended: dict[str, float] = {}
    with gateway(str(tmp_path / "spill"), str(FLUSH_S)) as (process, port):
        loading = asyncio.create_task(load(port, ended, 30))
        await asyncio.sleep(4 * FLUSH_S)
        killed_s = time.monotonic()
        process.kill()
        await loading
    durable = {request_id for request_id, at_s in ended.items() if at_s < killed_s - FLUSH_S}
    assert durable
    # Another gateway's writer, on the same disk.
    url = f"sqlite:///{tmp_path}/ledger.db"
    assert Writer(Spill(tmp_path / "spill"), url, print).drain()
    with reading(url) as connection:
        written = set(connection.execute(store.USAGE.select().with_only_columns(store.USAGE.c.request_id)).scalars())
    assert durable <= written


async def test_a_killed_gateways_writer_finishes(tmp_path: Path) -> None:
    ended: dict[str, float] = {}
    url = f"sqlite:///{tmp_path}/ledger.db"
    spill = Spill(tmp_path / "spill")
    with gateway(str(spill.directory), str(FLUSH_S), url) as (process, port):
        await load(port, ended, 0.5)
        await asyncio.sleep(2 * FLUSH_S)
        process.kill()
    async with asyncio.timeout(20):
        while spill.batches():
            await asyncio.sleep(0.05)
    assert len(rows_of(url)) == len(ended) > 0
