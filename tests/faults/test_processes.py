"""Every kind of process, killed and stopped under load: what clients saw, what the ledger says, how long it lasted.

Streams and whole answers without a pause, each with an id. Whatever dies, a request completes, or its client can see
that it did not; each that a gateway accepted and lived to tell has one row in the ledger, of the same outcome.
"""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.config import ENV_LEDGER_DIR
from tests.faults.blows import SIGNALS, given_to_one_other, retries, struck, tell, whole
from tests.faults.cluster import Cluster
from tests.faults.kinds import KINDS, VITAL, Kind
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(600)]

CONFIG = CONFIGS / "faults-processes.yaml"
REPLICAS, GATEWAYS = 3, 2
CLIENTS = 12
# 50 tokens, 40 ms each: six streams and six whole answers of two seconds.
TOKENS = 50
# What a killed HAProxy may cost: its process is started again at once; the rest is for a machine that does more.
HAPROXY_BACK_S = 5.0


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "galerne.db"


@pytest.fixture(scope="module")
def broken(ledger: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_LEDGER_DIR, str(ledger.parent))
        with cluster(CONFIG, tmp_path_factory.mktemp("processes"), FAKE_START_TIMEOUT_S) as running:
            yield Cluster(running, CONFIG)


def usage(broken: Cluster) -> int:
    """Ask the ledger through a gateway, which starts its reader; the status."""
    hour_ago = int(time.time()) - 3600
    request = urllib.request.Request(
        f"{broken.running.url}/v1/usage?from={hour_ago}", headers={"authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.status)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
async def test_one_of_a_kind(broken: Cluster, ledger: Path, kind: Kind, number: signal.Signals) -> None:
    await whole(broken, REPLICAS, GATEWAYS)
    if kind.name == "ledger reader":
        assert await asyncio.to_thread(usage, broken) == 200
    engines, sent = broken.engines(), retries(broken)
    load, books, outage_s = await struck(broken, ledger, kind, number, CLIENTS, TOKENS)
    tell(kind, number, load, books, first_answer_s=round(outage_s, 2))
    allowed = kind.killed if number == signal.SIGKILL else kind.stopped
    assert books.clients.keys() <= allowed
    assert "silent" not in books.clients
    if kind.name == "HAProxy" and number == signal.SIGKILL:
        assert outage_s < HAPROXY_BACK_S
        assert books.clients.get("lost", 0) <= 2 * CLIENTS
    if kind.name == "engine replica":
        given_to_one_other(broken, books, engines, sent)
    if kind.name == "ledger reader":
        assert await asyncio.to_thread(usage, broken) == 200


@pytest.mark.parametrize("kind", VITAL, ids=lambda kind: kind.name.replace(" ", "-"))
async def test_one_that_the_cluster_needs_is_stopped(broken: Cluster, ledger: Path, kind: Kind) -> None:
    await whole(broken, REPLICAS, GATEWAYS)
    load, books, _ = await struck(broken, ledger, kind, signal.SIGSTOP, CLIENTS, TOKENS)
    tell(kind, signal.SIGSTOP, load, books)
    assert books.clients.keys() == {"completed"}
