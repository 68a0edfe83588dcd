"""What pods need of the product: the configuration by revision, the list of scrape targets, a drain before the end."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from deployments.mounted import load_revision
from serving.cluster.node_drain import REPLICA, drain, main, replicas_here
from serving.errors import ConfigError
from serving.metrics import targets

CONFIG = """
models: [{{id: {model}, source: "fake:a"}}]
tenants: [{{id: a, keys: [{{id: k, sha256: "{digest}"}}]}}]
"""


def written(path: Path, model: str, revision: str | None) -> Path:
    """A configuration of one model, with a revision in its first line."""
    first = f"# revision: {revision}\n" if revision else ""
    path.write_text(first + CONFIG.format(model=model, digest="0" * 64))
    return path


class Clock:
    """Time that passes only where somebody sleeps; what happens then is given."""

    def __init__(self, *events: object) -> None:
        self.now_s = 0.0
        self._events = list(events)

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if self._events:
            event = self._events.pop(0)
            if callable(event):
                event()


def test_a_file_is_read_once_it_is_of_the_wanted_revision(tmp_path: Path) -> None:
    path = written(tmp_path / "galerne.yaml", "old", "1")
    clock = Clock(None, lambda: written(path, "new", "2"))
    config = load_revision(path, "2", clock=clock, sleep=clock.sleep)
    assert [model.id for model in config.models] == ["new"]
    assert clock.now_s == 2


def test_a_file_that_stays_as_it_was_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "galerne.yaml", "old", "1")
    clock = Clock()
    with pytest.raises(ConfigError, match="still of revision 1 after 30 s, and 2 is wanted"):
        load_revision(path, "2", wait_s=30, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(("said", "wanted"), [(None, "2"), ("1", None), ("1", ""), (None, None)])
def test_without_a_revision_on_either_side_nothing_is_waited_for(
    tmp_path: Path, said: str | None, wanted: str | None
) -> None:
    path = written(tmp_path / "galerne.yaml", "a", said)
    clock = Clock()
    assert load_revision(path, wanted, clock=clock, sleep=clock.sleep).models
    assert clock.now_s == 0


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_revision(tmp_path / "none.yaml", "1", sleep=lambda _: None)


def test_targets_are_beside_the_metrics() -> None:
    registry = CollectorRegistry()
    Gauge("something", "A gauge.", registry=registry).set(3)
    rows = [targets.gateway_row("10.0.0.1", 9400), targets.engine_row("fd00::1", 40000, "chat", "r1")]
    server, thread = start_http_server(0, "127.0.0.1", registry=registry)
    server.set_app(targets.app(registry, lambda: rows))
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with urllib.request.urlopen(f"{url}/targets", timeout=5) as response:
            assert response.headers["Content-Type"] == "application/json"
            found = json.load(response)
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
            assert "something 3.0" in response.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert found == [
        {"targets": ["10.0.0.1:9400"], "labels": {"job": "galerne-gateway"}},
        {"targets": ["[fd00::1]:40000"], "labels": {"job": "vllm", "model": "chat", "replica": "r1"}},
    ]
    assert not [t for t in threading.enumerate() if t is thread]


def test_replicas_are_found_by_what_ray_calls_their_processes(tmp_path: Path) -> None:
    for pid, command in {
        1: b"/bin/bash\0-c",
        20: REPLICA + b"galerne:gateway\0",
        3: REPLICA + b"galerne:engine-a.initialize\0",
        4: b"ray::ProxyActor\0",
    }.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(command)
    (tmp_path / "5").mkdir()  # ended between two looks
    (tmp_path / "meminfo").write_text("")
    assert replicas_here(tmp_path) == [3, 20]


def test_a_drain_waits_until_the_last_replica_has_gone() -> None:
    left = [7, 8]
    clock = Clock(None, lambda: left.remove(7), None, lambda: left.remove(8))
    told: list[float] = []

    def tell() -> bool:
        told.append(clock.now_s)
        return True

    assert drain(60, tell, lambda: list(left), clock, clock.sleep)
    assert told == [0]
    assert clock.now_s == 2


def test_a_drain_ends_in_time_whatever_is_left() -> None:
    clock = Clock()
    assert not drain(10, lambda: True, lambda: [7], clock, clock.sleep)
    assert clock.now_s == 10


def test_a_drain_that_nobody_hears_does_not_wait() -> None:
    clock = Clock()
    assert not drain(600, lambda: False, lambda: [7], clock, clock.sleep)
    assert clock.now_s == 0


def test_a_pod_without_replicas_tells_that_it_goes_all_the_same() -> None:
    told: list[bool] = []
    assert drain(600, lambda: bool(told.append(True)) or True, list)
    assert told == [True]


def test_the_hook_never_fails(capsys: pytest.CaptureFixture[str]) -> None:
    # Outside a cluster: no address, nobody to tell, and no replica to wait for.
    assert main(["5"], {}) == 0
    assert "node_drain: " in capsys.readouterr().err
