"""A live cluster whose model sleeps, wakes and stays as it is while Prometheus cannot be believed."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from serving.cli import state
from tests.faults.prometheus import PORT, PROXY_PORT, Prometheus, Proxy
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S
from tests.integration.running import KEY, RunningCluster, cluster, metric
from tests.system_parts import required

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SCALER = "http://127.0.0.1:18280/metrics"
GATEWAY = "http://127.0.0.1:18260/metrics"
AUTH = {"authorization": f"Bearer {KEY}"}
BODY: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 8,
}
IDLE_S = 15.0
FIRST = 50
HELD = 40


@dataclass
class Scaled:
    """A cluster, what its decisions are made from, and everything its target ever was."""

    running: RunningCluster
    prometheus: Prometheus
    proxy: Proxy
    targets: list[int] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, **changes: Any) -> httpx.Response:
        url = f"{self.running.url}/v1/chat/completions"
        return httpx.post(url, json=BODY | changes, headers=AUTH, timeout=120)

    def engines(self) -> int:
        return len(self.running.state()["engines"]["chat"])

    def stale(self) -> bool:
        return metric(SCALER, "galerne_autoscaler_stale", model="chat") == 1

    def watch(self) -> None:
        while not self.stop.wait(0.2):
            with contextlib.suppress(OSError):
                self.targets.append(int(metric(SCALER, "galerne_autoscaler_target_replicas", model="chat")))

    @contextlib.contextmanager
    def asked_all_the_time(self) -> Iterator[None]:
        """A request every two seconds, so that the model is not idle."""
        stop = threading.Event()

        def ask() -> None:
            while not stop.wait(2.0):
                assert self.ask().status_code == 200

        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(ask)
            try:
                yield
            finally:
                stop.set()
                asking.result(60)


def until(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never came: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    program = required("prometheus")
    directory = tmp_path_factory.mktemp("autoscaling")
    proxy = Proxy()
    prometheus = Prometheus(program, directory, state.state_dir(18250) / state.TARGETS_FILE)
    try:
        with cluster(CONFIGS / "autoscaling.yaml", directory, FAKE_START_TIMEOUT_S) as running:
            prometheus.start()
            made = Scaled(running, prometheus, proxy)
            watcher = threading.Thread(target=made.watch)
            watcher.start()
            try:
                yield made
            finally:
                made.stop.set()
                watcher.join()
    finally:
        prometheus.kill()
        proxy.stop()
    for port in (18250, 18260, 18280, PORT, PROXY_PORT):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=2).close()


def test_fifty_at_once_wake_a_sleeping_model_and_none_is_lost(scaled: Scaled) -> None:
    # Ready without it, and it is on the list.
    assert scaled.engines() == 0
    listed = httpx.get(f"{scaled.running.url}/v1/models", headers=AUTH).json()["data"]
    assert [(m["id"], m["ready_replicas"]) for m in listed] == [("chat", 0), ("broken", 0)]

    with ThreadPoolExecutor(FIRST) as threads:
        answers = list(threads.map(lambda i: scaled.ask(stream=i % 2 == 0), range(FIRST)))
    refused = [a for a in answers if a.status_code == 503]
    for answer in refused:
        assert answer.json()["error"]["code"] == "model_not_ready"
        assert int(answer.headers["retry-after"]) >= 1
    whole = [a for a in answers if a.status_code == 200 and complete(a)]
    assert len(whole) + len(refused) == FIRST
    assert len(whole) >= HELD  # as many as may wait; more where a replica was quicker than the last of them
    counts = {o: finished(o) for o in ("completed", "rejected", "failed", "cancelled")}
    assert counts == {"completed": len(whole), "rejected": len(refused), "failed": 0, "cancelled": 0}
    assert metric(GATEWAY, "galerne_requests_accepted_total", model="chat") == FIRST
    assert metric(GATEWAY, "galerne_requests_held", model="chat") == 0
    # The start was measured, and its phases came from the replica itself.
    assert metric(SCALER, "galerne_replica_starts_total", model="chat", outcome="ready") >= 1
    until(lambda: phase_s("load") >= 3, "the replica's own report of its start")


def complete(answer: httpx.Response) -> bool:
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
        return events[-1] == "data: [DONE]" and "error" not in json.loads(events[0].removeprefix("data: "))
    return bool(answer.json()["choices"])


def finished(outcome: str) -> float:
    return metric(GATEWAY, "galerne_requests_finished_total", model="chat", outcome=outcome)


def phase_s(phase: str) -> float:
    return metric(SCALER, "galerne_replica_start_seconds_sum", model="chat", phase=phase)


def awake_and_believed(scaled: Scaled) -> None:
    assert scaled.ask().status_code == 200
    # A burst that a slow machine answers late may have asked for a second, which goes when it was not needed for a while.
    until(
        lambda: scaled.engines() == 1 and scaled.targets[-1] == 1 and not scaled.stale(),
        "one replica and fresh signals",
        timeout_s=300,
    )


def test_a_frozen_and_then_killed_prometheus_holds_the_scale(scaled: Scaled) -> None:
    awake_and_believed(scaled)
    with scaled.asked_all_the_time():
        before = len(scaled.targets)
        scaled.prometheus.freeze()
        until(scaled.stale, "stale while frozen")
        scaled.prometheus.thaw()
        until(lambda: not scaled.stale(), "fresh again after a freeze")
        scaled.prometheus.kill()
        until(scaled.stale, "stale while dead")
    # Nobody asks now: a policy that took no value for none would send the model to sleep.
    time.sleep(IDLE_S + 10)
    assert set(scaled.targets[before:]) == {1}
    scaled.prometheus.start()
    until(lambda: not scaled.stale(), "fresh again after a restart")
    assert set(scaled.targets[before:]) == {1}


def test_answers_that_are_no_numbers_or_late_hold_the_scale(scaled: Scaled) -> None:
    awake_and_believed(scaled)
    with scaled.asked_all_the_time():
        before = len(scaled.targets)
        for mode in ("nan", "slow"):
            seen = scaled.proxy.answered[mode]
            scaled.proxy.mode = mode
            until(scaled.stale, f"stale while answers are {mode}")
            until(lambda m=mode, s=seen: scaled.proxy.answered[m] > s, "an answer spoiled")  # type: ignore[misc]
        scaled.proxy.mode = "pass"
        until(lambda: not scaled.stale(), "fresh again")
        assert set(scaled.targets[before:]) == {1}


def test_a_stream_keeps_its_model_awake_and_then_it_sleeps(scaled: Scaled) -> None:
    awake_and_believed(scaled)
    # Longer than the rate's window and idle_s: only what runs keeps the model.
    stream = scaled.ask(stream=True, max_tokens=2800, ignore_eos=True)
    assert complete(stream)
    assert stream.text.count("data: ") > 2800
    until(lambda: scaled.engines() == 0, "the model asleep")
    # And it wakes again.
    assert scaled.ask().status_code == 200
    assert finished("failed") == 0
    assert metric(GATEWAY, "galerne_streams_cut_total", model="chat") == 0


def test_a_model_that_cannot_start_is_counted_and_its_callers_hear(scaled: Scaled) -> None:
    # The last test: Serve goes on trying, which takes the processors that others would need.
    answer = scaled.ask(model="broken")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_not_ready"
    assert "no-such-format" not in answer.text
    until(lambda: failed_starts() >= 1, "a failed start that is counted")
    assert metric(SCALER, "galerne_replica_starts_total", model="broken", outcome="ready") == 0


def failed_starts() -> float:
    return metric(SCALER, "galerne_replica_starts_total", model="broken", outcome="failed")
