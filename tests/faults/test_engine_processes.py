"""Two tensor-parallel replicas of real vLLM: an engine's host, core and worker, each killed and stopped under load."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.config import ENV_LEDGER_DIR
from tests.faults.blows import SIGNALS, given_to_one_other, retries, struck, tell, whole
from tests.faults.cluster import Cluster
from tests.faults.kinds import ENGINE_KINDS, Kind
from tests.integration.conftest import CONFIGS, ENGINE_START_TIMEOUT_S
from tests.integration.running import cluster

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.timeout(900)]

CONFIG = CONFIGS / "faults-tensor.yaml"
REPLICAS, GATEWAYS = 2, 1
CLIENTS, TOKENS = 6, 200


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "galerne.db"


@pytest.fixture(scope="module")
def broken(ledger: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_LEDGER_DIR, str(ledger.parent))
        with cluster(CONFIG, tmp_path_factory.mktemp("tensor"), ENGINE_START_TIMEOUT_S) as running:
            yield Cluster(running, CONFIG)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", ENGINE_KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
async def test_one_of_an_engines_processes(broken: Cluster, ledger: Path, kind: Kind, number: signal.Signals) -> None:
    await whole(broken, REPLICAS, GATEWAYS)
    engines, sent = broken.engines(), retries(broken)
    load, books, outage_s = await struck(broken, ledger, kind, number, CLIENTS, TOKENS)
    tell(kind, number, load, books, first_answer_s=round(outage_s, 2))
    assert books.clients.keys() <= (kind.killed if number == signal.SIGKILL else kind.stopped)
    assert "silent" not in books.clients
    given_to_one_other(broken, books, engines, sent)
