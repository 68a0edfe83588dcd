"""A whole cluster, broken on purpose: gateways killed, updates and scale-downs under streams, a control plane that stops.

Simulated engines; HAProxy, gateways, Ray Serve and its controller are real.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import psutil
import pytest

from tests.faults.replicas import ask, report
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, RunningCluster, cluster, metric

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]

CONFIG = CONFIGS / "faults.yaml"
PORT = 18350
REPLICAS = 3
CHANGE_S = 180.0
OUTCOMES = ("completed", "rejected", "failed", "cancelled")


@dataclass
class Cluster:
    """The cluster, and what is done to it."""

    running: RunningCluster

    def process(self, name: str) -> psutil.Process:
        """The process whose title or name begins so."""
        return next(p for p in self.running.processes() if _named(p, name))

    def engines(self) -> set[str]:
        return {engine["replica_id"] for engine in self.running.state()["engines"]["chat"]}

    def gateways(self) -> dict[str, int]:
        return {gateway["replica_id"]: gateway["pid"] for gateway in self.running.state()["gateways"]}

    def redeploy(self, version: str, replicas: int) -> None:
        """Deploy again, from a process that knows the cluster's token as its own processes do."""
        environ = psutil.Process(next(iter(self.gateways().values()))).environ()
        raylet = self.process("raylet").cmdline()
        gcs = next(a.partition("=")[2] for a in raylet if a.startswith(("--gcs-address=", "--gcs_address=")))
        command = [sys.executable, "-m", "tests.faults.redeploy", gcs, str(CONFIG)]
        token = self.running.state()["engine_token"]
        subprocess.run([*command, token, version, str(replicas)], check=True, env=environ, timeout=120)

    async def until(self, condition: Callable[[], bool], what: str) -> float:
        began_s = time.monotonic()
        while not condition():
            assert time.monotonic() - began_s < CHANGE_S, f"never came: {what}"
            await asyncio.sleep(0.2)
        return time.monotonic() - began_s

    def books(self) -> dict[str, int]:
        """Of the gateways that live: what they accepted and how it ended."""
        found: Counter[str] = Counter()
        for gateway in self.running.state()["gateways"]:
            url = f"http://127.0.0.1:{gateway['metrics_port']}/metrics"
            found["accepted"] += int(metric(url, "galerne_requests_accepted_total"))
            for outcome in OUTCOMES:
                found[outcome] += int(metric(url, "galerne_requests_finished_total", outcome=outcome))
        return {name: found[name] for name in ("accepted", *OUTCOMES)}

    async def settled(self) -> dict[str, int]:
        """Wait until engines and gateways have nothing under way; the books, which must add up."""

        def idle() -> bool:
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            count = len(self.running.state()["engines"]["chat"])
            return not any(self.running.engine_metric("chat", name, i) for name in names for i in range(count))

        await self.until(idle, "engines with nothing in flight")
        books = self.books()
        assert books["accepted"] == sum(books[outcome] for outcome in OUTCOMES)
        return books


def _named(process: psutil.Process, name: str) -> bool:
    try:
        return process.name().startswith(name) or (process.cmdline() or [""])[0].startswith(name)
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(CONFIG, tmp_path_factory.mktemp("faults"), FAKE_START_TIMEOUT_S) as running:
        yield Cluster(running)


@asynccontextmanager
async def load(max_tokens: int, at_once: int) -> AsyncIterator[Counter[str]]:
    """Streams without a pause while the block lasts; what came of each is in the counter at its end."""
    seen: Counter[str] = Counter()
    over = asyncio.Event()

    async def worker() -> None:
        while not over.is_set():
            seen[await ask(PORT, KEY, max_tokens)] += 1

    workers = [asyncio.create_task(worker()) for _ in range(at_once)]
    await asyncio.sleep(1.0)
    try:
        yield seen
    finally:
        over.set()
        await asyncio.gather(*workers)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


async def test_the_control_plane_stops_and_nobody_notices(broken: Cluster) -> None:
    await broken.until(lambda: len(broken.engines()) == REPLICAS and len(broken.gateways()) == 2, "the cluster")
    for name in ("ray::ServeController", "gcs_server"):
        before = broken.books()
        with stopped(broken.process(name)):
            async with load(25, 8) as seen:
                await asyncio.sleep(5)
        books = await broken.settled()
        report(f"{name} stopped", seen, books)
        assert set(seen) == {"done"}
        assert books["failed"] == before["failed"]


async def test_a_replica_dies_while_the_controller_is_stopped(broken: Cluster) -> None:
    with stopped(broken.process("ray::ServeController")):
        async with load(1, 8) as seen:
            gone = broken.running.state()["engines"]["chat"][0]
            os.kill(gone["pid"], signal.SIGKILL)
            await asyncio.sleep(4)
    ejections = [_gateway_metric(g["metrics_port"], "galerne_replica_ejections_total") for g in _gateways(broken)]
    gone_s = await broken.until(
        lambda: len(broken.engines() - {gone["replica_id"]}) == REPLICAS, "the replica's successor"
    )
    report("replica killed, controller stopped", seen, await broken.settled(), ejections=ejections, new_s=round(gone_s))
    # A first and only token: either it had come, or nothing had.
    assert set(seen) <= {"done", "cut"}
    assert seen["cut"] <= 8
    assert sum(ejections) >= 1


def _gateways(broken: Cluster) -> list[dict[str, int]]:
    return list(broken.running.state()["gateways"])


def _gateway_metric(port: int, name: str) -> int:
    return int(metric(f"http://127.0.0.1:{port}/metrics", name))


async def test_rolling_update_cuts_no_stream(broken: Cluster) -> None:
    engines, gateways = broken.engines(), set(broken.gateways())

    def updated() -> bool:
        return (
            not (engines & broken.engines() or gateways & broken.gateways().keys())
            and len(broken.engines()) == REPLICAS
            and len(broken.gateways()) == len(gateways)
        )

    async with load(50, 8) as seen:
        await asyncio.to_thread(broken.redeploy, "2", REPLICAS)
        update_s = await broken.until(updated, "every gateway and engine replaced")
    report("rolling update", seen, await broken.settled(), update_s=round(update_s))
    assert set(seen) == {"done"}


async def test_scale_down_cuts_no_stream(broken: Cluster) -> None:
    engines, gateways = broken.engines(), set(broken.gateways())
    async with load(100, 8) as seen:
        await asyncio.to_thread(broken.redeploy, "2", 1)
        await broken.until(lambda: len(broken.engines()) == 1, "one replica")
        # The streams of those that drain.
        await asyncio.sleep(5)
    report("scale-down", seen, await broken.settled())
    assert set(seen) == {"done"}
    # It was no update: one of the old ones is left.
    assert broken.engines() < engines
    assert set(broken.gateways()) == gateways


async def test_a_gateway_is_killed(broken: Cluster) -> None:
    gateways = broken.gateways()
    assert len(gateways) == 2
    gone, pid = next(iter(gateways.items()))
    async with load(25, 8) as seen:
        os.kill(pid, signal.SIGKILL)
        await broken.until(lambda: gone not in broken.gateways(), "the killed gateway off the list")
        during = Counter(seen)
        await asyncio.sleep(3)
        later = seen - during
    new_s = await broken.until(lambda: len(broken.gateways().keys() - {gone}) == len(gateways), "its successor")
    report("gateway killed", seen, await broken.settled(), later=dict(later), new_s=round(new_s))
    # Its own streams break off; the other gateway takes everything that comes.
    assert seen["done"] > 0
    assert sum(n for what, n in seen.items() if what != "done") <= 8
    assert set(later) == {"done"}
