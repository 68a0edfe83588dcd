"""A running cluster with one model, `chat`: what is done to it, streams on it, and its gateways' books."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.replicas import ask
from tests.integration.running import KEY, RunningCluster, metric

CHANGE_S = 180.0
LOOK_EVERY_S = 0.1
OUTCOMES = ("completed", "rejected", "failed", "cancelled")


@dataclass
class Cluster:
    """The cluster, and what is done to it."""

    running: RunningCluster
    config: Path

    @property
    def port(self) -> int:
        return int(self.running.url.rpartition(":")[2])

    def process(self, name: str) -> psutil.Process:
        """The process whose title or name begins so."""
        return next(p for p in self.running.processes() if _named(p, name))

    def engines(self) -> dict[str, int]:
        """The replicas that are listed, with their processes."""
        return {engine["replica_id"]: engine["pid"] for engine in self.running.state()["engines"]["chat"]}

    def gateways(self) -> dict[str, int]:
        return {gateway["replica_id"]: gateway["pid"] for gateway in self.running.state()["gateways"]}

    def redeploy(self, version: str, replicas: int) -> None:
        """Deploy again, from a process that knows the cluster's token as its own processes do."""
        environ = psutil.Process(next(iter(self.gateways().values()))).environ()
        raylet = self.process("raylet").cmdline()
        gcs = next(a.partition("=")[2] for a in raylet if a.startswith(("--gcs-address=", "--gcs_address=")))
        command = [sys.executable, "-m", "tests.faults.redeploy", gcs, str(self.config)]
        token = self.running.state()["engine_token"]
        subprocess.run([*command, token, version, str(replicas)], check=True, env=environ, timeout=120)

    async def until(self, condition: Callable[[], bool], what: str, within_s: float = CHANGE_S) -> float:
        began_s = time.monotonic()
        while not condition():
            assert time.monotonic() - began_s < within_s, f"never came: {what}"
            await asyncio.sleep(LOOK_EVERY_S)
        return time.monotonic() - began_s

    def gateway_metrics(self, name: str, **labels: str) -> list[int]:
        """A metric's sum at each gateway."""
        return [
            int(metric(f"http://127.0.0.1:{gateway['metrics_port']}/metrics", name, **labels))
            for gateway in self.running.state()["gateways"]
        ]

    def under_way(self, replica: str) -> int:
        """Requests that gateways have in flight on a replica."""
        return sum(self.gateway_metrics("galerne_replica_in_flight", replica=replica))

    def books(self) -> dict[str, int]:
        """Of the gateways that live: what they accepted and how it ended."""
        found = {"accepted": sum(self.gateway_metrics("galerne_requests_accepted_total"))}
        for outcome in OUTCOMES:
            found[outcome] = sum(self.gateway_metrics("galerne_requests_finished_total", outcome=outcome))
        return found

    async def settled(self) -> dict[str, int]:
        """Wait until engines and gateways have nothing under way; the books, which must add up."""

        def idle() -> bool:
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            count = len(self.running.state()["engines"]["chat"])
            return not any(self.running.engine_metric("chat", name, i) for name in names for i in range(count))

        await self.until(idle, "engines with nothing in flight")
        await self.until(lambda: not any(self.gateway_metrics("galerne_requests_in_flight")), "requests' ends")
        assert not any(self.gateway_metrics("galerne_replica_in_flight"))
        books = self.books()
        assert books["accepted"] == sum(books[outcome] for outcome in OUTCOMES)
        return books

    @asynccontextmanager
    async def load(self, max_tokens: int, at_once: int, **more: object) -> AsyncIterator[Seen]:
        """Streams without a pause while the block lasts; what came of each is in the counter at its end."""
        seen = Seen()
        over = asyncio.Event()

        async def worker() -> None:
            while not over.is_set():
                began_s = time.monotonic()
                answer = await ask(self.port, KEY, max_tokens, **more)
                seen[answer] += 1
                if answer == "done":
                    seen.whole_s.append(time.monotonic() - began_s)

        workers = [asyncio.create_task(worker()) for _ in range(at_once)]
        await asyncio.sleep(1.0)
        try:
            yield seen
        finally:
            over.set()
            await asyncio.gather(*workers)


class Seen(Counter[str]):
    """What came of streams, and how long those lasted that are whole."""

    def __init__(self) -> None:
        super().__init__()
        self.whole_s: list[float] = []


def _named(process: psutil.Process, name: str) -> bool:
    try:
        return process.name().startswith(name) or (process.cmdline() or [""])[0].startswith(name)
    except psutil.Error:
        return False
