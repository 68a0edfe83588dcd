"""The reader of signals against a Prometheus that misbehaves in every way: age or no value, never an error or a jump."""

from __future__ import annotations

import gc
import json
import math
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serving.autoscaling.signals import QUERY, SignalReader, fetch_http, parse
from serving.autoscaling.snapshot import NO_SIGNAL, Signal, Snapshot
from serving.metrics.rules import SAMPLED, SIGNALS

NOW_S = 1_700_000_000.0
RECORD = {rule.field: rule.record for rule in SIGNALS}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def row(name: str, value: object, model: str = "m", **labels: str) -> dict[str, Any]:
    return {"metric": {"__name__": name, "model": model, **labels}, "value": [NOW_S, value]}


def answer(*rows: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": list(rows)}} | more).encode()


SAMPLES = (
    row(SAMPLED, str(NOW_S - 3), source="gateway"),
    row(SAMPLED, str(NOW_S - 7), source="engine"),
)
GOOD = answer(
    row(RECORD["arrivals_rps"], "2.5"),
    row(RECORD["running"], "4"),
    row(RECORD["prompt_tokens"], "120"),
    *SAMPLES,
)


def test_every_field_of_a_snapshot_that_is_a_signal_has_a_rule() -> None:
    # The one that is no load is asked for where a configuration names it.
    wanted = {f.name for f in fields(Snapshot) if f.type == "Signal"} - {"external"}
    assert wanted == set(RECORD)
    assert len(set(RECORD.values())) == len(RECORD)
    assert all(record in QUERY for record in RECORD.values())


def test_values_come_with_the_age_of_their_samples() -> None:
    clock = Clock()
    reader = SignalReader("http://p", clock=clock, fetch=lambda *_: GOOD, refresh_s=3600)
    reader.refresh()
    reader.stop()
    snapshot = reader.fill(Snapshot(at_s=NOW_S, ready=1, target=1), "m")
    assert snapshot.arrivals_rps == Signal(2.5, 3.0)
    assert snapshot.running == Signal(4.0, 7.0)
    # Of both sources: as old as the older.
    assert snapshot.prompt_tokens == Signal(120.0, 7.0)
    assert snapshot.held == snapshot.ttft_p95_s == NO_SIGNAL
    assert reader.fill(snapshot, "another").arrivals_rps == NO_SIGNAL
    clock.now_s += 20
    assert reader.signals("m")["arrivals_rps"] == Signal(2.5, 23.0)
    assert not reader.signals("m")["running"].usable(25)


@pytest.mark.parametrize(
    "bad",
    ["NaN", "+Inf", "-Inf", "-1", "many", "", None, [], {}, "1e999"],
)
def test_a_value_that_is_no_amount_is_no_signal(bad: object) -> None:
    found = parse(answer(row(RECORD["held"], bad), row(RECORD["arrivals_rps"], "1"), *SAMPLES))["m"]
    assert set(found) == {"arrivals_rps"}


def test_a_value_that_stands_twice_is_no_signal() -> None:
    twice = row(RECORD["held"], "1", cluster="a"), row(RECORD["held"], "9", cluster="b")
    assert parse(answer(*twice, *SAMPLES)) == {"m": {}}


@pytest.mark.parametrize("age", ["NaN", str(NOW_S + 5), "x"])
def test_a_sample_without_an_age_is_no_signal(age: str) -> None:
    assert parse(answer(row(RECORD["held"], "1"), row(SAMPLED, age, source="gateway"))) == {"m": {}}
    assert parse(answer(row(RECORD["held"], "1"), SAMPLES[1])) == {"m": {}}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>nginx</html>",
        b"null",
        b"[]",
        b'"success"',
        b'{"status": "error", "error": "query timed out"}',
        b'{"status": "success"}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": []}}',
        b'{"status": "success", "data": {"resultType": "vector", "result": {}}}',
        GOOD[:-20],
        b"[" * 100_000,
        b"\xff\xfe\x00",
        answer(*SAMPLES, warnings=["a store did not answer"]),
    ],
)
def test_an_answer_that_cannot_be_believed_changes_nothing(body: bytes) -> None:
    clock, bodies = Clock(), [GOOD]
    reader = SignalReader("http://p", clock=clock, fetch=lambda *_: bodies[-1], refresh_s=3600)
    reader.stop()
    reader.refresh()
    bodies.append(body)
    clock.now_s += 5
    reader.refresh()
    assert reader.signals("m")["arrivals_rps"] == Signal(2.5, 8.0)
    state = reader.state()
    assert state.answer_age_s == 5.0
    assert state.failures == 1
    assert state.problem
    bodies.append(GOOD)
    reader.refresh()
    assert reader.signals("m")["arrivals_rps"] == Signal(2.5, 3.0)
    assert reader.state().problem == ""


@pytest.mark.parametrize("rows", [[None], [1], [[]], [{}], [{"metric": 1, "value": 2}], [{"metric": {}, "value": [1]}]])
def test_rows_that_are_none_of_ours_are_passed_over(rows: list[Any]) -> None:
    body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": rows}}).encode()
    assert parse(body) == {}


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("odd"), MemoryError(), ValueError("x" * 10_000)])
def test_whatever_fetching_raises_the_reader_does_not(error: Exception) -> None:
    def fetch(url: str, timeout_s: float) -> bytes:
        raise error

    reader = SignalReader("http://p", fetch=fetch, refresh_s=3600)
    reader.refresh()
    assert reader.signals("m")["arrivals_rps"] == NO_SIGNAL
    assert reader.state().answer_age_s == math.inf
    assert len(reader.state().problem) <= 200
    reader.stop()


def test_asking_never_waits_for_prometheus() -> None:
    asked, released = threading.Event(), threading.Event()

    def fetch(url: str, timeout_s: float) -> bytes:
        asked.set()
        released.wait(60)
        return GOOD

    reader = SignalReader("http://p", fetch=fetch, refresh_s=3600)
    assert reader.signals("m")["arrivals_rps"] == NO_SIGNAL
    assert asked.wait(60)
    # The thread is inside fetch: an answer comes all the same.
    assert reader.signals("m")["arrivals_rps"] == NO_SIGNAL
    released.set()
    while reader.state().answer_age_s == math.inf:
        time.sleep(0.01)
    assert reader.signals("m")["arrivals_rps"].value == 2.5
    reader.stop()


def test_the_thread_goes_with_its_reader() -> None:
    reader = SignalReader("http://p", fetch=lambda *_: GOOD, refresh_s=0.01)
    before = {t for t in threading.enumerate() if t.name == "galerne-signals"}
    reader.signals("m")
    (thread,) = {t for t in threading.enumerate() if t.name == "galerne-signals"} - before
    del reader
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_reader_travels_between_processes() -> None:
    reader = pickle.loads(pickle.dumps(SignalReader("http://127.0.0.1:9", 0.5)))  # noqa: S301 - our own bytes
    reader.refresh()
    assert reader.state().problem
    reader.stop()


class Hostile(BaseHTTPRequestHandler):
    """Answers by path prefix the way a sick server does."""

    released = threading.Event()

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "silent":
            self.released.wait(60)
            return
        if kind == "drip":
            self.send_response(200)
            self.end_headers()
            while not self.released.wait(0.02):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
            return
        if kind == "cut":
            self.send_response(200)
            self.send_header("content-length", str(len(GOOD)))
            self.end_headers()
            self.wfile.write(GOOD[:50])
            return
        if kind == "elsewhere":
            self.send_response(302)
            self.send_header("location", "/good")
            self.end_headers()
            return
        if kind == "huge":
            self.send_response(200)
            self.end_headers()
            for _ in range(80):
                self.wfile.write(b" " * 65536)
            return
        if kind == "raw":
            self.wfile.write(b"SSH-2.0-nothing\r\n")
            return
        self.send_response(200 if kind == "good" else 500)
        self.end_headers()
        self.wfile.write(GOOD)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that hang up are what this is about

    server = Server(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Hostile.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_in_order_answers(hostile: str) -> None:
    reader = SignalReader(f"{hostile}/good/", 10)
    reader.refresh()
    assert reader.signals("m")["running"].value == 4.0
    reader.stop()


@pytest.mark.parametrize("kind", ["silent", "drip", "cut", "elsewhere", "huge", "raw", "error"])
def test_a_sick_server_is_no_answer_within_the_time_allowed(hostile: str, kind: str) -> None:
    reader = SignalReader(f"{hostile}/{kind}", 1.0)
    reader.refresh()
    assert reader.state().problem
    assert reader.signals("m")["arrivals_rps"] == NO_SIGNAL
    reader.stop()


def test_nobody_there() -> None:
    with pytest.raises(OSError, match="refused"):
        fetch_http("http://127.0.0.1:9/", 5)
