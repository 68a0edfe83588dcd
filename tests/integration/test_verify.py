"""`galerne verify`, the command itself, against a cluster that serves; nothing beyond loopback is tried."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from urllib.parse import urlsplit

import pytest

from tests.integration.running import GALERNE, KEY, OTHER_KEY, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def verify(*arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [GALERNE, "verify", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"GALERNE_KEY": key},
    )


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_cluster_that_serves_passes_and_its_line_verifies(fake_cluster: RunningCluster) -> None:
    done = verify("--url", fake_cluster.url, "--isolated", "--outside", f"tcp:127.0.0.1:{closed_port()}")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.rstrip("\n").splitlines()[-1]
    result = json.loads(last)["galerne_verify"]
    assert [(c["name"], c["verdict"]) for c in result["checks"][:6]] == [
        (name, "passed") for name in ("models", "chat", "stream", "embeddings", "wrong key", "unlisted routes")
    ]
    assert verify("--check", last).returncode == 0
    assert verify("--check", last, key=OTHER_KEY).returncode == 1


def test_a_tenant_without_the_model_and_a_wrong_key_fail(fake_cluster: RunningCluster) -> None:
    assert verify("--url", fake_cluster.url, "--model", "chat", key=OTHER_KEY).returncode == 1
    wrong = verify("--url", fake_cluster.url, "--json", key="sk-wrong")
    assert wrong.returncode == 1
    (line,) = wrong.stdout.splitlines()
    assert "401" in json.loads(line)["galerne_verify"]["checks"][0]["detail"]


def test_a_way_to_something_that_must_not_be_reached_fails(fake_cluster: RunningCluster) -> None:
    address = urlsplit(fake_cluster.url)
    target = f"tcp:{address.hostname}:{address.port}"
    done = verify("--url", fake_cluster.url, "--isolated", "--outside", target)
    assert done.returncode == 1
    assert "REACHED" in done.stdout
