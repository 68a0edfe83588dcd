"""Serve's controller and HAProxy are killed, as the kernel does it, while clients ask without a pause.

`make test-faults` does the same with every kind of process, on a cluster of its own (docs/faults.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.faults.traffic import Traffic, traffic
from tests.integration.running import KEY, RunningCluster

pytestmark = pytest.mark.cluster

CONTROLLER = "ray::ServeController"
CLIENTS = 8
TOKENS = 20
WAIT_S = 60.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def named(cluster: RunningCluster, name: str) -> psutil.Process | None:
    """The newest process whose name begins so, if there is one."""
    found = []
    for process in cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(name) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return max(found, key=lambda process: process.create_time(), default=None)


def begun_since(load: Traffic, moment_s: float) -> bool:
    """Whether every client has had answers to requests that it sent after that."""
    return sum(load.begun_since(moment_s).values()) >= 3 * CLIENTS


def replicas(cluster: RunningCluster) -> set[tuple[str, int]]:
    """Every replica of engines and gateways, with its process."""
    state = cluster.state()
    found = [*state["gateways"], *(engine for engines in state["engines"].values() for engine in engines)]
    return {(replica["replica_id"], replica["pid"]) for replica in found}


async def test_the_controller_is_killed_and_nobody_notices(fake_cluster: RunningCluster) -> None:
    before = replicas(fake_cluster)
    written = fake_cluster.ready_file.stat().st_mtime_ns
    killed = named(fake_cluster, CONTROLLER)
    assert killed is not None
    port = int(fake_cluster.url.rpartition(":")[2])
    async with traffic(port, KEY, CLIENTS, TOKENS) as load:
        await until(lambda: len(load.answers) >= CLIENTS)
        killed.kill()
        await until(lambda: (new := named(fake_cluster, CONTROLLER)) is not None and new.pid != killed.pid)
        # It tells what it found when it has looked at every replica.
        await until(lambda: fake_cluster.ready_file.stat().st_mtime_ns > written)
        moment_s = load.now_s()
        await until(lambda: begun_since(load, moment_s))
    assert load.counts() == {"completed": len(load.answers)}
    # Its successor took over what it found, in whatever order.
    assert replicas(fake_cluster) == before


async def test_haproxy_is_killed_and_answers_again(fake_cluster: RunningCluster) -> None:
    killed = named(fake_cluster, "haproxy")
    assert killed is not None
    port = int(fake_cluster.url.rpartition(":")[2])
    async with traffic(port, KEY, CLIENTS, TOKENS) as load:
        await until(lambda: len(load.answers) >= CLIENTS)
        moment_s = load.now_s()
        os.kill(killed.pid, signal.SIGKILL)
        await until(lambda: load.begun_since(moment_s)["completed"] >= 3 * CLIENTS)
    counts = load.counts()
    print(f"\nHAProxy killed: {counts}, answers again after {load.outage_s(moment_s):.2f} s")
    # What it had is lost, visibly; nothing ended as if it were whole.
    assert counts.keys() <= {"completed", "lost", "refused"}
    # Of each client what was under way, and perhaps a connection that the kernel had taken and HAProxy had not.
    assert counts.get("lost", 0) <= 2 * CLIENTS
