"""Two replicas of real vLLM under load: one engine's core is killed, as the kernel does when memory is out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from tests.faults.cluster import Cluster
from tests.faults.replicas import EJECTED_S, MARGIN_S, ask, ask_many, report
from tests.integration.conftest import CONFIGS, ENGINE_START_TIMEOUT_S
from tests.integration.running import KEY, cluster

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.timeout(1500)]

CONFIG = CONFIGS / "faults-engine.yaml"
REPLICAS = 2
# Streams that are in their middle when the core dies, and within the model's length.
LONG, LONG_TOKENS = 4, 1900
# Requests without a pause beside them: as many as may be on their second replica at once.
SHORT, SHORT_TOKENS = 3, 4
SUCCESSOR_S = 420.0


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(CONFIG, tmp_path_factory.mktemp("faults-engine"), ENGINE_START_TIMEOUT_S) as running:
        yield Cluster(running, CONFIG)


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
    long = asyncio.create_task(
        ask_many(LONG, LONG, lambda: ask(broken.port, KEY, LONG_TOKENS, ignore_eos=True)),
    )
    await broken.until(
        lambda: sum(broken.gateway_metrics("galerne_time_to_first_token_seconds_count")) == LONG,
        "streams' first tokens",
    )
    begun = {engine: broken.under_way(engine) for engine in broken.engines()}
    victim = max(begun, key=begun.__getitem__)
    async with broken.load(SHORT_TOKENS, SHORT, ignore_eos=True) as short:
        assert not long.done()
        core_of(broken.engines()[victim]).kill()
        found = Seen(broken)
        while found.out_s is None or time.monotonic() - found.began_s < EJECTED_S + MARGIN_S:
            await asyncio.to_thread(found.look)
            assert time.monotonic() - found.began_s < 60, "requests still go to the dead core's replica"
            await asyncio.sleep(0.05)
        left = broken.under_way(victim)
    streams = await long
    new_s = await broken.until(
        lambda: len(broken.engines().keys() - {victim}) == REPLICAS, "the replica's successor", SUCCESSOR_S
    )
    books = await broken.settled()
    assert found.out_s is not None
    seen = streams + short
    report(
        "engine core killed",
        seen,
        books,
        streams=dict(streams),
        on_it=begun[victim],
        no_new_requests_s=round(found.out_s, 2),
        last_failure_s=round(found.failed_s, 2),
        retries=sum(broken.gateway_metrics("galerne_retries_total", end="sent")),
        ejections=sum(broken.gateway_metrics("galerne_replica_ejections_total")),
        new_s=round(new_s),
    )
    # What had begun there ends with an error event; everything else is whole, at the other replica where need be.
    assert streams == Counter(cut=begun[victim], done=LONG - begun[victim])
    assert set(short) <= {"done", "cut"}
    assert short["cut"] <= SHORT
    assert books == {
        "accepted": sum(seen.values()),
        "completed": seen["done"],
        "rejected": 0,
        "failed": seen["cut"],
        "cancelled": 0,
    }
    assert left == 0
    assert max(found.out_s, found.failed_s) <= EJECTED_S + MARGIN_S
