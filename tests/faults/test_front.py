"""The front under a flood of connections that want nothing, and reloaded under streams."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from tests.faults.cluster import Cluster
from tests.faults.replicas import ask
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]

CONFIG = CONFIGS / "front.yaml"
FLOOD = 10_000
# Of the flooding process; what it does not need is for its sockets.
OWN_FILES = 200
# Another source than the flood's.
ELSEWHERE = "127.0.0.2"
REQUESTS = 400
PACE_S = 0.05
RELOADS = 3
STREAMS = 12
# 1,500 tokens, 40 ms each: a minute, and the drain is 5 s.
STREAM_TOKENS = 1500


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(CONFIG, tmp_path_factory.mktemp("front"), FAKE_START_TIMEOUT_S) as running:
        yield Cluster(running, CONFIG)


def haproxies(cluster: Cluster) -> list[psutil.Process]:
    return [p for p in cluster.running.processes() if p.name() == "haproxy" and p.status() != psutil.STATUS_ZOMBIE]


async def test_streams_on_a_healthy_gateway_outlive_every_reload(fronted: Cluster) -> None:
    await fronted.until(lambda: len(fronted.gateways()) == 2, "two gateways")
    stays, goes = sorted(fronted.gateways())
    streams = [asyncio.create_task(ask(fronted.port, KEY, STREAM_TOKENS)) for _ in range(STREAMS)]
    await fronted.until(lambda: sum(in_flight(fronted).values()) == STREAMS, "every stream at a gateway")
    on_other = in_flight(fronted)[goes]
    assert on_other < STREAMS
    began_s = time.monotonic()
    fronts = {p.pid for p in haproxies(fronted)}
    for _ in range(RELOADS):
        goes = await replaced(fronted, goes, stays)
        fronts |= await reloaded(fronted, fronts)
    reloaded_s = time.monotonic() - began_s
    under_way = sum(not stream.done() for stream in streams)
    outcomes = Counter(await asyncio.gather(*streams))
    print(
        f"\n{len(fronts) - 1} reloads in {reloaded_s:.0f} s under {STREAMS} streams of a minute, {on_other} of them at the "
        f"gateway that was killed: {dict(outcomes)}; drain_timeout_s 5, {under_way} under way after the last reload"
    )
    assert outcomes["done"] == STREAMS - on_other
    await fronted.until(lambda: len(haproxies(fronted)) == 1, "the old processes' end")


async def replaced(fronted: Cluster, gateway: str, other: str) -> str:
    """Kill a gateway; the one that Serve starts in its place."""
    os.kill(fronted.gateways()[gateway], signal.SIGKILL)
    await fronted.until(lambda: len(fronted.gateways().keys() - {gateway}) == 2, "another gateway")
    (new,) = fronted.gateways().keys() - {other}
    return new


async def reloaded(fronted: Cluster, known: set[int]) -> set[int]:
    """The processes of HAProxy when there is one that was not there before."""
    await fronted.until(lambda: bool({p.pid for p in haproxies(fronted)} - known), "a reload")
    return {p.pid for p in haproxies(fronted)}


def in_flight(fronted: Cluster) -> dict[str, int]:
    counts = fronted.gateway_metrics("galerne_requests_in_flight")
    return {g["replica_id"]: n for g, n in zip(fronted.running.state()["gateways"], counts, strict=True)}


async def paced(port: int, source: str) -> tuple[Counter[str], float]:
    """Requests one after the other, each on a connection of its own: what came of them, and their 99th percentile."""
    seen: Counter[str] = Counter()
    took_s = []
    request = (
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer %b\r\n\r\n" % KEY.encode()
    )
    for _ in range(REQUESTS):
        began_s = time.perf_counter()
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
                writer.write(request)
                found = await reader.read()
                writer.close()
            seen["done" if found.startswith(b"HTTP/1.1 200 ") else "failed"] += 1
        except OSError:
            seen["failed"] += 1
        took_s.append(time.perf_counter() - began_s)
        await asyncio.sleep(PACE_S)
    return seen, sorted(took_s)[int(0.99 * REQUESTS)]


@pytest.mark.parametrize("key", ["-", KEY], ids=["without a key", "with a key"])
async def test_a_flood_of_connections_from_one_source_harms_no_other(fronted: Cluster, key: str) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(FLOOD, soft - OWN_FILES)
    alone, alone_s = await paced(fronted.port, ELSEWHERE)
    command = [sys.executable, "-m", "tests.faults.flood", str(fronted.port), str(count), key, "127.0.0.1"]
    flood = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert flood.stdout is not None
        assert (await asyncio.to_thread(flood.stdout.readline)).strip() == "ready"
        beside, beside_s = await paced(fronted.port, ELSEWHERE)
        counts = json.loads((await asyncio.to_thread(flood.communicate, ""))[0])
    finally:
        flood.kill()
        flood.wait()
    print(
        f"\n{count} connections {'without' if key == '-' else 'with'} a key: {json.dumps(counts)}\n"
        f"another source: alone {dict(alone)}, p99 {alone_s * 1000:.1f} ms; beside {dict(beside)}, "
        f"p99 {beside_s * 1000:.1f} ms ({beside_s / alone_s:.2f} of alone)"
    )
    assert alone == beside == Counter(done=REQUESTS)
    # The flood was one: it tried all, and had what one source may have and no more.
    assert sum(counts["opened"].values()) + counts["refused"] >= count
