"""Processes that the whole service ends with: each is killed under load, in a cluster of its own.

In a module of its own: two clusters on one machine would want the same ports.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from serving.config import ENV_LEDGER_DIR, LedgerConfig
from serving.metering.settings import settings
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.faults.blows import BACK_S, tell, whole
from tests.faults.books import balanced
from tests.faults.cluster import Cluster
from tests.faults.kinds import VITAL, Kind
from tests.faults.test_processes import CLIENTS, CONFIG, GATEWAYS, REPLICAS, TOKENS
from tests.faults.traffic import traffic
from tests.integration.conftest import FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", VITAL, ids=lambda kind: kind.name.replace(" ", "-"))
async def test_one_that_the_cluster_needs_is_killed(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service ends, soon, says why, leaves nothing behind, and every request is accounted for."""
    monkeypatch.setenv(ENV_LEDGER_DIR, str(tmp_path))
    with cluster(CONFIG, tmp_path, FAKE_START_TIMEOUT_S) as running:
        made = Cluster(running, CONFIG)
        await whole(made, REPLICAS, GATEWAYS)
        every = made.running.processes()
        async with traffic(made.port, KEY, CLIENTS, TOKENS) as load:
            await made.until(lambda: len(load.answers) >= 2 * CLIENTS, "answers before the blow")
            moment_s = load.now_s()
            kind.find(made)[0].kill()
            await made.until(lambda: running.process.poll() is not None, "the command's end", BACK_S)
            ended_s = load.now_s() - moment_s
            await made.until(lambda: load.under_way == 0 or bool(load.begun_since(moment_s + ended_s)), "last answers")
        await made.until(lambda: not any(map(_runs, every)), "every process's end")
        gone_s = load.now_s() - moment_s
        said = running.log.read_text()
        status = running.process.returncode
    # What a killed cluster left in its spill is the next one's to write.
    kept = settings(LedgerConfig(), os.environ)
    writer = Writer(Spill(kept.spill_dir), kept.url, pytest.fail)
    writer.drain()
    writer.close()
    books = await balanced(tmp_path / "galerne.db", load, may_miss=True)
    tell(kind, signal.SIGKILL, load, books, ended_s=round(ended_s, 1), gone_s=round(gone_s, 1), status=status)
    assert "silent" not in books.clients
    assert books.clients.keys() <= kind.killed
    assert status != 0
    assert ("the serving process was killed" if kind.name == "galerne serve" else "has ended, so nothing") in said


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
