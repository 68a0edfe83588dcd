"""A whole cluster, broken on purpose: updates and scale-downs under streams, a replica that dies while nobody replaces it.

Simulated engines; HAProxy, gateways, Ray Serve and its controller are real. Each process by itself: test_processes, test_vital_processes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.faults.cluster import Cluster, Seen
from tests.faults.replicas import EJECTED_S, MARGIN_S, report
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S
from tests.integration.running import cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(1500)]

CONFIG = CONFIGS / "faults.yaml"
REPLICAS = 3
# 1,500 tokens, 40 ms each.
LONG_S, LONG_TOKENS = 60.0, 1500
# An update waits for streams of this length, of one replica after the other.
LONG_CHANGE_S = 900.0


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(CONFIG, tmp_path_factory.mktemp("faults"), FAKE_START_TIMEOUT_S) as running:
        yield Cluster(running, CONFIG)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


async def test_a_replica_dies_while_the_controller_is_stopped(broken: Cluster) -> None:
    with stopped(broken.process("ray::ServeController")):
        async with broken.load(1, 8) as seen:
            gone = broken.running.state()["engines"]["chat"][0]
            os.kill(gone["pid"], signal.SIGKILL)
            # Until one of the gateways has it out, as its own metric says.
            first_s = await broken.until(
                lambda: any(broken.gateway_metrics("galerne_replica_ejections_total")), "an ejection"
            )
            await asyncio.sleep(4)
    ejections = broken.gateway_metrics("galerne_replica_ejections_total")
    gone_s = await broken.until(
        lambda: len(broken.engines().keys() - {gone["replica_id"]}) == REPLICAS, "the replica's successor"
    )
    books = await broken.settled()
    report(
        "replica killed, controller stopped",
        seen,
        books,
        ejections=ejections,
        ejected_s=round(first_s, 1),
        new_s=round(gone_s),
    )
    # A first and only token: either it had come, or nothing had.
    assert set(seen) <= {"done", "cut"}
    assert seen["cut"] <= 8
    assert sum(ejections) >= 1
    assert first_s <= EJECTED_S + MARGIN_S


async def test_rolling_update_cuts_no_stream_of_a_minute(broken: Cluster) -> None:
    engines, gateways = broken.engines(), broken.gateways()

    def updated() -> bool:
        return (
            not (engines.keys() & broken.engines() or gateways.keys() & broken.gateways())
            and len(broken.engines()) == REPLICAS
            and len(broken.gateways()) == len(gateways)
        )

    old = (*engines.values(), *gateways.values())
    async with broken.load(LONG_TOKENS, 8) as seen:
        await asyncio.sleep(5)
        on_old = sum(broken.under_way(engine) for engine in engines)
        began_s = time.monotonic()
        await asyncio.to_thread(broken.redeploy, "2", REPLICAS)
        await broken.until(updated, "every gateway and engine replaced", LONG_CHANGE_S)
        update_s = time.monotonic() - began_s
        await broken.until(lambda: not any(map(psutil.pid_exists, old)), "the old ones' end", LONG_CHANGE_S)
        drain_s = time.monotonic() - began_s
    books = await broken.settled()
    _report_long("rolling update", seen, books, on_old, update_s=round(update_s), drain_s=round(drain_s))
    assert on_old == 8


async def test_scale_down_cuts_no_stream_of_a_minute(broken: Cluster) -> None:
    engines, gateways = broken.engines(), broken.gateways()
    async with broken.load(LONG_TOKENS, 8) as seen:
        await asyncio.sleep(5)
        under_way = {engine: broken.under_way(engine) for engine in engines}
        began_s = time.monotonic()
        await asyncio.to_thread(broken.redeploy, "2", 1)
        await broken.until(lambda: len(broken.engines()) == 1, "one replica", LONG_CHANGE_S)
        unlisted_s = time.monotonic() - began_s
        gone = engines.keys() - broken.engines()
        await broken.until(
            lambda: not any(psutil.pid_exists(engines[engine]) for engine in gone), "the others' end", LONG_CHANGE_S
        )
        drain_s = time.monotonic() - began_s
    on_gone = sum(under_way[engine] for engine in gone)
    books = await broken.settled()
    _report_long("scale-down", seen, books, on_gone, unlisted_s=round(unlisted_s, 1), drain_s=round(drain_s))
    assert on_gone > 0
    # They went when their streams had ended, and not before.
    assert drain_s > LONG_S / 2
    # It was no update: one of the old ones is left.
    assert broken.engines().items() < engines.items()
    assert broken.gateways() == gateways


def _report_long(scenario: str, seen: Seen, books: dict[str, int], on_leaving: int, **more: float) -> None:
    """Print the counts of streams of a minute: all of them whole, and as long as they were to be."""
    whole, cut = seen["done"], sum(seen.values()) - seen["done"]
    spans_s = [round(min(seen.whole_s)), round(max(seen.whole_s))] if seen.whole_s else []
    report(scenario, seen, books, whole=whole, cut=cut, on_replicas_that_leave=on_leaving, lasted_s=spans_s, **more)
    assert cut == 0
    assert min(seen.whole_s) >= LONG_S
