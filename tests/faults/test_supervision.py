"""The service as a whole ends: its own process is killed, or Ray's. What is left, what is said, who starts it again.

Everything real but the engines' answers, which are simulated.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving.cli.supervision import STOPPED
from serving.cluster import guard
from serving.cluster.processes import port_is_free
from tests.faults.cluster import Cluster
from tests.faults.replicas import ask, report
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(600)]

CONFIG = CONFIGS / "faults.yaml"
# Ray's agents used to stay for a minute.
ENDED_WITHIN_S = 20.0
# 80 tokens, 40 ms each: a few seconds of stream.
TOKENS, STREAMS = 80, 8
SAID_WITHIN_S = 5.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(CONFIG, tmp_path, FAKE_START_TIMEOUT_S) as running:
        yield Cluster(running, CONFIG)


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_nothing_is_left_of_a_service_that_is_killed(service: Cluster) -> None:
    caused = service.running.processes()
    service.running.process.kill()
    assert service.running.process.wait(ENDED_WITHIN_S) == -signal.SIGKILL
    # Those that were started meanwhile hold the port too.
    seconds = await service.until(
        lambda: all(map(_gone, caused)) and port_is_free("127.0.0.1", service.port), "its end", ENDED_WITHIN_S
    )
    assert guard.LEFT in " ".join(service.running.log.read_text().split())
    assert not service.running.ready_file.exists()
    print(f"\ngalerne serve killed: {len(caused)} processes and every port gone after {seconds:.1f} s")


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
async def test_the_service_ends_in_order_when_ray_has_ended(service: Cluster, name: str) -> None:
    caused = service.running.processes()
    streams = [asyncio.create_task(ask(service.port, KEY, TOKENS)) for _ in range(STREAMS)]
    await service.until(
        lambda: sum(service.under_way(engine) for engine in service.engines()) == STREAMS, "streams under way"
    )
    service.process(name).kill()
    await service.until(lambda: f"Ray's {name}" in service.running.log.read_text(), "a word on it", SAID_WITHIN_S)
    seen = Counter(await asyncio.gather(*streams))
    seconds = await service.until(lambda: all(map(_gone, caused)), "its end", 2 * ENDED_WITHIN_S)
    # A supervisor starts again what ended so.
    assert service.running.process.wait(ENDED_WITHIN_S) == 1
    said = service.running.log.read_text()
    assert "deployments/systemd/galerne.service" in said
    assert STOPPED in said
    report(f"{name} killed: the service ends", seen, {}, seconds=round(seconds, 1))
    # Those under way end as they should.
    assert seen == {"done": STREAMS}
