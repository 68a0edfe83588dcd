"""A real Prometheus: its rules over a cluster under load, and what the reader makes of it when things stop."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serving.autoscaling.external import ExternalReader
from serving.autoscaling.signals import SignalReader, query_of
from serving.autoscaling.snapshot import Signal
from serving.cli import prometheus, state
from serving.config import ExternalConfig
from serving.metrics import alerts, rules, targets
from tests.integration.running import GALERNE, KEY, RunningCluster
from tests.system_parts import required

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

AUTH = {"authorization": f"Bearer {KEY}"}
WAIT_S = 120
RATE_RPS, STREAMS, OUTPUT_TOKENS = 4.0, 160, 12


def until(what: str, found: Callable[[], Any]) -> Any:
    """The first true value; how long it takes does not matter."""
    deadline_s = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.5)
    return value


def query(url: str, expr: str) -> dict[str, float]:
    """Values by model of an instant query."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expr}).json()
    return {r["metric"].get("model", ""): float(r["value"][1]) for r in answer["data"]["result"]}


@pytest.fixture
def address(fake_cluster: RunningCluster) -> str:
    required("prometheus")
    url: str = fake_cluster.state()["prometheus_url"]
    return url


def stream(url: str, number: int) -> tuple[int, int]:
    """One streamed answer; its prompt and output tokens by its usage."""
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": f"{number} " * 40}],
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        events = [json.loads(e[6:]) for e in answer.iter_lines() if e.startswith("data: {")]
    usage = events[-1]["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return usage["prompt_tokens"] - cached, usage["completion_tokens"]


def test_every_signal_under_load(fake_cluster: RunningCluster, address: str) -> None:
    total = 'sum by (model) (galerne_slo_ttft_requests_total{model="chat", met="true"})'
    before = until("the gateway is scraped", lambda: query(address, total) or None)["chat"]
    reader = SignalReader(address, 10)
    started_s = time.monotonic()

    def send(number: int) -> tuple[int, int]:
        time.sleep(max(0.0, started_s + number / RATE_RPS - time.monotonic()))
        return stream(fake_cluster.url, number)

    seen: dict[str, Signal] = {}
    rates = []
    with ThreadPoolExecutor(32) as threads:
        work = [threads.submit(send, number) for number in range(STREAMS)]
        while not all(w.done() for w in work):
            time.sleep(1)
            signals = reader.signals("chat")
            seen |= {name: s for name, s in signals.items() if s.usable(rules.RATE_WINDOW_S)}
            if time.monotonic() - started_s > rules.RATE_WINDOW_S + 5:
                rates.append(signals["arrivals_rps"].value or 0.0)
        sent_rps = STREAMS / (time.monotonic() - started_s)
    tokens = [w.result() for w in work]
    # Every one of them, and a model with a replica never has requests that are held.
    assert set(seen) == {rule.field for rule in rules.SIGNALS}
    assert seen["held"].value == seen["held_oldest_s"].value == 0
    assert 0 <= (seen["kv_use"].value or 0.0) <= 1
    assert seen["ttft_missed"].value == 0
    assert (seen["itl_missed"].value or 0.0) > 0.9
    assert max(rates) == pytest.approx(sent_rps, rel=0.5), rates
    # Counted exactly, once Prometheus has seen the last.
    until("every stream is counted", lambda: query(address, total)["chat"] - before == STREAMS)
    prompt, output = (sum(column) / STREAMS for column in zip(*tokens, strict=True))
    assert output == OUTPUT_TOKENS
    for field, mean in (("prompt_tokens", prompt), ("output_tokens", output)):
        # Other tests' requests may be among those of the last two minutes.
        assert reader.signals("chat")[field].value == pytest.approx(mean, rel=0.5), field
    ages = {name: s.age_s for name, s in reader.signals("chat").items() if s.value is not None}
    assert ages
    assert max(ages.values()) < 60
    reader.stop()


def test_every_rule_is_evaluated_and_every_target_scraped(address: str) -> None:
    groups = httpx.get(f"{address}/api/v1/rules").json()["data"]["groups"]
    found = {rule["name"]: rule for group in groups for rule in group["rules"]}
    expected = {r.record for r in (*rules.RULES, *rules.SLOW_RULES)} | {a.name for a in alerts.ALERTS}
    assert set(found) == expected
    assert {name: rule.get("lastError") for name, rule in found.items() if rule["health"] == "err"} == {}
    targets = until(
        "every target has been scraped",
        lambda: [
            t
            for t in httpx.get(f"{address}/api/v1/targets").json()["data"]["activeTargets"]
            if t["health"] != "unknown"
        ],
    )
    assert {t["labels"]["job"] for t in targets} >= {"galerne-gateway", "vllm", "haproxy"}
    assert {t["scrapeUrl"]: t["lastError"] for t in targets if t["health"] != "up"} == {}


class Exporter(BaseHTTPRequestHandler):
    """A gateway's metrics with 10 requests a second, until it freezes."""

    frozen = threading.Event()
    started_s = time.monotonic()

    def do_GET(self) -> None:
        if self.frozen.is_set():
            time.sleep(30)
            return
        accepted = int(10 * (time.monotonic() - self.started_s))
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(
            f'galerne_replicas_ready{{model="m"}} 1\n'
            f'galerne_requests_accepted_total{{model="m",tenant="t"}} {accepted}\n'.encode()
        )

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def exporter() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_exporter_that_freezes_shows_as_age_and_never_as_less_load(exporter: str, tmp_path: Path) -> None:
    server = prometheus.LocalPrometheus(required("prometheus"), tmp_path)
    targets = [{"targets": [exporter], "labels": {"job": rules.GATEWAY_JOB}}]
    (tmp_path / state.TARGETS_FILE).write_text(json.dumps(targets))
    server.start()
    reader = SignalReader(server.url, 2.5, refresh_s=1)
    ready = 'galerne_replicas_ready{model="m"}'
    named = ExternalReader(server.url, 2.5, ExternalConfig(query=ready), refresh_s=1)
    reckoned = ExternalConfig(query=f"3 * sum({ready}) # three", sampled=f"min(timestamp({ready}))")
    computed = ExternalReader(server.url, 2.5, reckoned, refresh_s=1)

    def wanted() -> list[float | None]:
        found = [one.signals()["external"] for one in (named, computed)]
        return [signal.value if signal.usable(2.5 * rules.SCRAPE_S) else None for signal in found]

    def arrivals() -> Signal:
        return reader.signals("m")["arrivals_rps"]

    try:
        until("the rate is seen", lambda: (arrivals().value or 0) > 5)
        until("what something else wants is seen", lambda: wanted() == [1.0, 3.0])
        lowest, Exporter.frozen = 10.0, threading.Event()
        Exporter.frozen.set()
        while arrivals().age_s < 2.5 * rules.SCRAPE_S:
            lowest = min(lowest, arrivals().value or 0.0)
            time.sleep(0.2)
        assert lowest > 5, "a rate without its newest samples was believed"
        frozen = arrivals()
        assert not frozen.usable(2.5 * rules.SCRAPE_S)
        assert wanted() == [None, None]
        (child,) = (p for p in psutil.Process().children() if p.name() == "prometheus")
        assert server.ended() is None
        child.kill()
        news = until("its end is noticed", server.ended)
        assert server.url.removeprefix("http://") in news
        assert server.ended() is None
        until("the reader notices", lambda: reader.state().problem)
        assert arrivals().value == frozen.value
        assert arrivals().age_s > frozen.age_s
    finally:
        reader.stop()
        for child in psutil.Process().children():
            if child.name() == "prometheus":
                child.kill()
                child.wait()


class Busy(BaseHTTPRequestHandler):
    """A gateway's metrics: so many requests a second, all of them held."""

    rps = 0
    started_s = time.monotonic()

    def do_GET(self) -> None:
        accepted = int(self.rps * (time.monotonic() - self.started_s))
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(
            f'galerne_replicas_ready{{model="m"}} 1\n'
            f'galerne_requests_held{{model="m",tenant="t"}} {5 * self.rps}\n'
            f'galerne_requests_accepted_total{{model="m",tenant="t"}} {accepted}\n'.encode()
        )

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Idle(Busy):
    """The same without any."""


def test_of_two_releases_each_scaler_reads_its_own(tmp_path: Path) -> None:
    Busy.rps = 10
    Idle.rps = 0
    gateways = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Busy, Idle)]
    server = prometheus.LocalPrometheus(required("prometheus"), tmp_path)
    rows = [
        targets.gateway_row("127.0.0.1", gateway.server_address[1], name)
        for gateway, name in zip(gateways, ("prod/galerne", "test/galerne"), strict=True)
    ]
    (tmp_path / state.TARGETS_FILE).write_text(json.dumps(rows))
    for gateway in gateways:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
    server.start()
    names = ("prod/galerne", "test/galerne", "")
    readers = [SignalReader(server.url, 2.5, refresh_s=1, query=query_of(name)) for name in names]

    def seen(field: str) -> list[float | None]:
        return [reader.signals("m")[field].value for reader in readers]

    try:
        until("the busy one's rate is seen", lambda: (seen("arrivals_rps")[0] or 0) > 5)
        until("the idle one is, too", lambda: seen("arrivals_rps")[1] is not None)
        assert seen("held") == [50.0, 0.0, None]
        # Nobody is without a name here, and no other's load is taken for one's own.
        assert seen("arrivals_rps")[1:] == [0.0, None]
    finally:
        for reader in readers:
            reader.stop()
        for child in psutil.Process().children():
            if child.name() == "prometheus":
                child.kill()
                until("it has ended", server.ended)
        for gateway in gateways:
            gateway.shutdown()
            gateway.server_close()


def test_without_the_program_the_message_says_how_to_get_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [GALERNE, "serve", "--fake", "--with-prometheus", "--port", "18399"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "apt-get install prometheus" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cluster_outlives_prometheus(fake_cluster: RunningCluster, address: str) -> None:
    """The last of this file: the shared cluster has none afterwards."""
    (measuring,) = (p for p in psutil.Process(fake_cluster.process.pid).children() if p.name() == "prometheus")
    os.kill(measuring.pid, signal.SIGKILL)
    until("the operator is told", lambda: "Prometheus has ended" in fake_cluster.log.read_text())
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = httpx.post(f"{fake_cluster.url}/v1/chat/completions", json=body, headers=AUTH, timeout=60)
    assert answer.status_code == 200
    # As an operator would, with what the terminal says.
    log = fake_cluster.log.read_text()
    command = shlex.split(log.partition("To start it again: ")[2].splitlines()[0])
    again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    reader = SignalReader(address, 10)
    try:
        until("signals come again", lambda: reader.signals("chat")["arrivals_rps"].usable(30))
        assert fake_cluster.process.poll() is None
    finally:
        reader.stop()
        again.terminate()
        again.wait(60)
