"""Two replicas of real vLLM under load: one engine's core is killed, as the kernel does when memory is out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from tests.faults.cluster import Cluster
from tests.faults.replicas import EJECTED_S, MARGIN_S, report
from tests.integration.conftest import CONFIGS, ENGINE_START_TIMEOUT_S
from tests.integration.running import cluster

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.timeout(1500)]

CONFIG = CONFIGS / "faults-engine.yaml"
PORT = 18370
REPLICAS = 2
CLIENTS = 8
# Long enough that streams are in their middle, and within the model's length.
TOKENS = 300
SUCCESSOR_S = 420.0


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(CONFIG, tmp_path_factory.mktemp("faults-engine"), ENGINE_START_TIMEOUT_S) as running:
        yield Cluster(running, CONFIG, PORT)


def core_of(pid: int) -> psutil.Process:
    """The core of a replica's engine."""
    below = psutil.Process(pid).children(recursive=True)
    return next(p for p in below if "EngineCore" in " ".join(p.cmdline()))


@dataclass
class Seen:
    """What the gateway's metrics say from the kill on; seconds since it."""

    broken: Cluster
    began_s: float = field(default_factory=time.monotonic)
    # It gets no new requests: ejected, or off the list.
    out_s: float | None = None
    # The last time that a request was put on it, or broke off there.
    failed_s: float = 0.0
    errors: int = 0

    def look(self) -> None:
        errors = sum(self.broken.gateway_metrics("galerne_upstream_errors_total"))
        ejected = sum(self.broken.gateway_metrics("galerne_replicas_ejected", model="chat"))
        ready = sum(self.broken.gateway_metrics("galerne_replicas_ready", model="chat"))
        now_s = time.monotonic() - self.began_s
        if errors != self.errors:
            self.errors, self.failed_s = errors, now_s
        if self.out_s is None and (ejected or ready < REPLICAS):
            self.out_s = now_s


async def test_an_engine_core_is_killed(broken: Cluster) -> None:
    await broken.until(lambda: len(broken.engines()) == REPLICAS, "two replicas")
    before = broken.books()
    async with broken.load(TOKENS, CLIENTS, ignore_eos=True) as seen:
        victim, pid = next(iter(broken.engines().items()))
        await broken.until(lambda: broken.under_way(victim) >= 2, "streams on the replica")
        begun = broken.under_way(victim)
        core_of(pid).kill()
        found = Seen(broken)
        while found.out_s is None or time.monotonic() - found.began_s < EJECTED_S + MARGIN_S:
            found.look()
            assert time.monotonic() - found.began_s < 60, "requests still go to the dead core's replica"
            await asyncio.sleep(0.05)
        left = broken.under_way(victim)
    new_s = await broken.until(
        lambda: len(broken.engines().keys() - {victim}) == REPLICAS, "the replica's successor", SUCCESSOR_S
    )
    books = await broken.settled()
    assert found.out_s is not None
    report(
        "engine core killed",
        seen,
        books,
        on_it=begun,
        no_new_requests_s=round(found.out_s, 2),
        last_failure_s=round(found.failed_s, 2),
        retries=sum(broken.gateway_metrics("galerne_retries_total", end="sent")),
        ejections=sum(broken.gateway_metrics("galerne_replica_ejections_total")),
        new_s=round(new_s),
    )
    # What had begun there ends with an error event, everything else is whole.
    assert set(seen) == {"done", "cut"}
    assert 0 < seen["cut"] <= begun
    assert books["failed"] - before["failed"] == seen["cut"]
    assert books["completed"] - before["completed"] == seen["done"]
    assert books["rejected"] == before["rejected"]
    assert left == 0
    assert max(found.out_s, found.failed_s) <= EJECTED_S + MARGIN_S
