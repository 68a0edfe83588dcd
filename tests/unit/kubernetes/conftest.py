"""A fresh API server a test, a client through a real kubeconfig, and sleeps that are written down instead of slept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.cluster.kubernetes.client import Client, connect
from tests.unit.kubernetes.release import Run, command
from tests.unit.kubernetes.server import ApiServer

NAMESPACE = "galerne"
TOKEN = "operator-token"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as running:
        running.token = TOKEN
        yield running


def write_kubeconfig(path: Path, url: str, token: str = TOKEN, **cluster: str) -> Path:
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": url, **cluster}}],
                "users": [{"name": "operator", "user": {"token": token}}],
                "contexts": [
                    {"name": "test", "context": {"cluster": "test", "user": "operator", "namespace": NAMESPACE}}
                ],
            }
        )
    )
    return path


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> Path:
    return write_kubeconfig(tmp_path / "kubeconfig", server.url)


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def client(kubeconfig: Path, slept: list[float]) -> Iterator[Client]:
    connected, namespace = connect(str(kubeconfig))
    assert namespace == NAMESPACE
    connected._pause = slept.append
    yield connected
    connected.close()


@pytest.fixture
def node() -> Callable[..., dict[str, object]]:
    def make(name: str, **metadata: object) -> dict[str, object]:
        return {"metadata": {"name": name, **metadata}, "spec": {}}

    return make


@pytest.fixture
def galerne(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`galerne cluster …` in this process."""
    return lambda *arguments: command(monkeypatch, capsys, *arguments)
