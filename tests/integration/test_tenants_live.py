"""A whole cluster follows its configuration file, and HAProxy says where clients are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.api.auth import digest
from tests.integration.running import KEY, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

# What is promised is 5 s; a busy machine is no failure.
TAKEN_S = 60.0
NEW, NEAR, FAR = "sk-new-tenant", "sk-from-here", "sk-from-elsewhere"


@pytest.fixture
def tenants(fake_config: Path) -> Iterator[str]:
    """The file with one tenant more, until the test is over; the text is the file's of before."""
    before = fake_config.read_text()
    keys = [
        f'{{id: any, sha256: "{digest(NEW)}"}}',
        f'{{id: near, sha256: "{digest(NEAR)}", networks: [127.0.0.0/8]}}',
        f'{{id: far, sha256: "{digest(FAR)}", networks: [10.0.0.0/8]}}',
    ]
    tenant = f"  - {{id: newcomer, keys: [{', '.join(keys)}]}}\n"
    _replace(fake_config, before.replace("tenants:\n", f"tenants:\n{tenant}"))
    yield before
    _replace(fake_config, before)


def _replace(path: Path, text: str) -> None:
    path.with_suffix(".next").write_text(text)
    path.with_suffix(".next").rename(path)


def _status(cluster: RunningCluster, key: str, **headers: str) -> int:
    answer = httpx.get(f"{cluster.url}/v1/models", headers={"authorization": f"Bearer {key}"} | headers, timeout=20)
    return answer.status_code


def _until(cluster: RunningCluster, key: str, status: int) -> None:
    deadline_s = time.monotonic() + TAKEN_S
    while _status(cluster, key) != status:
        assert time.monotonic() < deadline_s, f"never {status}"
        assert _status(cluster, KEY) == 200
        time.sleep(0.1)


def test_a_tenant_comes_and_goes_without_a_restart(
    fake_cluster: RunningCluster, fake_config: Path, tenants: str
) -> None:
    pids = fake_cluster.state()["pids"]["gateway"]
    _until(fake_cluster, NEW, 200)
    # Where the client is, HAProxy says; what the client says of it has no say.
    assert _status(fake_cluster, NEAR) == 200
    assert _status(fake_cluster, FAR) == 401
    for forged in ({"x-forwarded-for": "10.1.1.1"}, {"x-forwarded-for": "10.1.1.1", "x-galerne-edge": "f" * 64}):
        assert _status(fake_cluster, FAR, **forged) == 401
    _replace(fake_config, tenants)
    _until(fake_cluster, NEW, 401)
    assert fake_cluster.state()["pids"]["gateway"] == pids
