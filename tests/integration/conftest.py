"""One cluster with fake engines and one with real ones, each started once and shared by all its tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.running import RunningCluster, cluster

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"
FAKE_START_TIMEOUT_S = 180
ENGINE_START_TIMEOUT_S = 420
# Where it is installed, clusters have one; tests about it ask for it with `system_parts.required`.
WITH_PROMETHEUS = ("--with-prometheus",) if shutil.which("prometheus") else ()


@pytest.fixture(scope="session")
def fake_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `fake_cluster` follows: a copy, for tests that change it and put it back."""
    return Path(shutil.copy(CONFIGS / "fake.yaml", tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="session")
def fake_cluster(fake_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Real HAProxy, gateway and Ray Serve, and Prometheus where it is installed; simulated engines."""
    with cluster(fake_config, tmp_path_factory.mktemp("fake"), FAKE_START_TIMEOUT_S, *WITH_PROMETHEUS) as running:
        yield running


@pytest.fixture(scope="session")
def engine_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Everything real: vLLM on CPU with three models, one of them tensor-parallel."""
    with cluster(CONFIGS / "engine.yaml", tmp_path_factory.mktemp("engine"), ENGINE_START_TIMEOUT_S) as running:
        yield running
