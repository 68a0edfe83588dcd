"""One tenant sends hundreds of large bodies that do not end, through the real front: memory stays bounded and comes back,
and another tenant's requests are served as if nothing were.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.cluster import Cluster, Seen
from tests.faults.replicas import PATH, ask, head
from tests.integration.conftest import FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, OTHER_KEY, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]

MIB = 1024 * 1024
BODIES, LENGTH, MISSING = 660, 4 * MIB - 4096, 200
BOUND = 512 * MIB
# Beside the bodies: what a connection costs uvicorn and Ray, and a body that is put together.
BESIDE = 192 * MIB
BACK_S = 60.0
CONFIG = f"""
demo_keys: true
listen: {{host: 127.0.0.1, port: 18450}}
gateway: {{metrics_port: 18460, cpus: 0.1, max_ongoing_body_bytes: {BOUND}, body_timeout_s: 40}}
models:
  - id: chat
    source: fake:chat
    resources: {{cpus: 0.1}}
    fake: {{decode_ms: 5, prefill_tokens_per_s: 1000000}}
tenants:
  - {{id: flood, keys: [{{id: demo, sha256: "f33a1f7848f139904e353b0afad5080a9e6145ee1cea90732cd277e703b0bd41"}}]}}
  - {{id: light, keys: [{{id: demo, sha256: "120a44c7bb6098933301f25f311b5e9da21a4ec8269747de7428cd187dcae86a"}}]}}
"""


@pytest.fixture(scope="module")
def one_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("bodies")
    config = Path(directory / "bodies.yaml")
    config.write_text(CONFIG)
    with cluster(config, directory, FAKE_START_TIMEOUT_S) as running:
        yield Cluster(running, config)


async def unfinished(port: int, over: asyncio.Event) -> str:
    """All of a body but its last bytes, held until `over`; the status that came instead, or "held"."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    block = b" " * 65536
    answer = asyncio.create_task(reader.read(65536))
    try:
        writer.write(head("POST", PATH, LENGTH, KEY))
        with contextlib.suppress(ConnectionError):
            left = LENGTH - MISSING
            while left and not answer.done():
                writer.write(block[: min(left, len(block))])
                left -= min(left, len(block))
                await writer.drain()
        waiting = asyncio.create_task(over.wait())
        await asyncio.wait({answer, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not answer.done():
            return "held"
        try:
            return answer.result()[9:12].decode() or "closed"
        except ConnectionError:
            return "closed"
    finally:
        answer.cancel()
        writer.close()


async def test_large_bodies_that_do_not_end(one_gateway: Cluster) -> None:
    cluster, port = one_gateway, one_gateway.port
    gateway = psutil.Process(next(iter(cluster.gateways().values())))
    for _ in range(200):
        assert await ask(port, OTHER_KEY, 20) == "done"
    rest, most = gateway.memory_info().rss, 0
    seen, over, refused = Seen(), asyncio.Event(), Counter[str]()

    async def neighbour() -> None:
        while not over.is_set():
            seen[await ask(port, OTHER_KEY, 20)] += 1

    async def flood() -> None:
        while not over.is_set():
            refused[await unfinished(port, over)] += 1
            # As `Retry-After` asks for: what is measured is bodies, not how fast one process can connect.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 1.0)

    neighbours = [asyncio.create_task(neighbour()) for _ in range(4)]
    flooding = [asyncio.create_task(flood()) for _ in range(BODIES)]
    for _ in range(300):
        await asyncio.sleep(0.1)
        most = max(most, gateway.memory_info().rss)
    over.set()
    await asyncio.gather(*neighbours, *flooding)
    left = await cluster.until(lambda: gateway.memory_info().rss < 1.3 * rest, "memory that comes back", BACK_S)
    # And those who come then are not refused for it.
    after = Counter([await ask(port, OTHER_KEY, 20) for _ in range(60)])
    books = await cluster.settled()
    print(
        f"\n{BODIES} bodies of {LENGTH / MIB:.0f} MiB less {MISSING} bytes: gateway {rest / MIB:.0f} MiB at rest, at most "
        f"{most / MIB:.0f}, below 1.3 of rest {left:.1f} s after; flood {dict(refused)}, neighbour {dict(seen)}, {books}"
    )
    assert most - rest < BOUND + BESIDE
    assert set(seen) == {"done"}
    assert after == {"done": 60}
    assert refused["503"] > 0
    assert os.path.exists(f"/proc/{gateway.pid}")
