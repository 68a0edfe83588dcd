"""A whole cluster follows its configuration file, and HAProxy says where clients are."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from serving.api.auth import digest
from tests.integration.running import GALERNE, KEY, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

# What is promised is 5 s; a busy machine is no failure.
TAKEN_S = 60.0
NEW, NEAR, FAR, SECOND = "sk-new-tenant", "sk-from-here", "sk-from-elsewhere", "sk-second-tenant"


@pytest.fixture
def tenants(fake_config: Path) -> Iterator[str]:
    """The file with two tenants more, until the test is over; the text is the file's of before."""
    before = fake_config.read_text()
    keys = [
        f'{{id: any, sha256: "{digest(NEW)}", scopes: [inference, models, usage]}}',
        f'{{id: near, sha256: "{digest(NEAR)}", networks: [127.0.0.0/8]}}',
        f'{{id: far, sha256: "{digest(FAR)}", networks: [10.0.0.0/8]}}',
    ]
    second = f'{{id: any, sha256: "{digest(SECOND)}", scopes: [models, usage]}}'
    limits = "quota: {requests_per_minute: 1000}"
    added = f"  - {{id: newcomer, keys: [{', '.join(keys)}], {limits}}}\n  - {{id: second, keys: [{second}]}}\n"
    _replace(fake_config, before.replace("tenants:\n", f"tenants:\n{added}"))
    yield before
    _replace(fake_config, before)


def _replace(path: Path, text: str) -> None:
    path.with_suffix(".next").write_text(text)
    path.with_suffix(".next").rename(path)


def _status(cluster: RunningCluster, key: str, port: int | None = None, **headers: str) -> int:
    url = cluster.url if port is None else f"http://127.0.0.1:{port}"
    answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"} | headers, timeout=20)
    return answer.status_code


def _usage(cluster: RunningCluster, key: str, **params: str) -> httpx.Response:
    return httpx.get(f"{cluster.url}/v1/usage", headers={"authorization": f"Bearer {key}"}, params=params, timeout=60)


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
        # Nor past HAProxy, where uvicorn would believe whoever connects from this machine.
        for port in fake_cluster.ports_past_haproxy().values():
            assert _status(fake_cluster, NEAR, port, **forged) == 200
            assert _status(fake_cluster, FAR, port, **forged) == 401
    _replace(fake_config, tenants)
    _until(fake_cluster, NEW, 401)
    assert fake_cluster.state()["pids"]["gateway"] == pids


def test_a_tenant_asks_what_it_used(fake_cluster: RunningCluster, tenants: str) -> None:
    _until(fake_cluster, NEW, 200)
    # The ledger outlives clusters: what an earlier run left there is not of this one.
    since_s = int(time.time())
    headers = {"authorization": f"Bearer {NEW}"}
    for body in (
        {"model": "chat", "messages": [{"role": "user", "content": "What did we use?"}], "max_tokens": 9},
        {"model": "chat", "messages": [{"role": "user", "content": "And now?"}], "max_tokens": 4, "stream": True},
    ):
        answer = httpx.post(f"{fake_cluster.url}/v1/chat/completions", headers=headers, json=body, timeout=60)
        assert answer.status_code == 200
    body = {"model": "vectors", "input": "some words"}
    assert httpx.post(f"{fake_cluster.url}/v1/embeddings", headers=headers, json=body, timeout=60).status_code == 200
    deadline_s = time.monotonic() + TAKEN_S
    while True:
        answer = _usage(fake_cluster, NEW, group_by="model", **{"from": str(since_s)})
        # 503: the process that reads starts for the first time, on a busy machine.
        if answer.status_code == 200:
            ((*results,),) = [bucket["results"] for bucket in answer.json()["data"]]
            if sum(r["num_model_requests"] for r in results) == 3:
                break
        assert time.monotonic() < deadline_s, answer.text
        time.sleep(0.2)
    command = [str(GALERNE), "usage", "--port", fake_cluster.url.rpartition(":")[2]]
    command += ["--tenant", "newcomer", "--by", "model", "--format", "json"]
    command += ["--from", datetime.fromtimestamp(since_s, UTC).isoformat()]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert [(r["model"], r["num_model_requests"], r["input_tokens"], r["output_tokens"]) for r in results] == [
        (r["model"], r["requests"], r["prompt_tokens"], r["completion_tokens"]) for r in rows
    ]
    assert {r["model"]: r["num_model_requests"] for r in results} == {"chat": 2, "vectors": 1}
    page = answer.json()
    # All gateways of this machine write to one file.
    assert page["covers"] == "host"
    assert page["quota"]["requests_per_minute"]["limit"] == 1000
    assert page["queue"] == {"waiting": 0, "in_flight": 0, "models": []}
    # Another tenant has used nothing, and who may not ask hears so.
    ((nothing,),) = [bucket["results"] for bucket in _usage(fake_cluster, SECOND).json()["data"]]
    assert (nothing["num_model_requests"], nothing["input_tokens"]) == (0, 0)
    assert _usage(fake_cluster, SECOND, model="chat", group_by="model").json()["data"][0]["results"] == []
    assert _usage(fake_cluster, KEY).status_code == 403
    refused = _usage(fake_cluster, NEW, tenant="press-agency")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")
