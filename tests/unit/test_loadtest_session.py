"""From a scenario to a run: against a server in a thread, over real sockets and real worker processes."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from loadtest import progress, replicas, run_file, scenario
from loadtest.client import FailureKind
from loadtest.errors import LoadtestError
from loadtest.records import Outcome, Record
from loadtest.reports.model import ReplicaCount, ReportRun, SloTarget
from loadtest.reports.verdict import State, judge
from loadtest.sender import Tally
from loadtest.session import SessionSettings, run_scenario

SCENARIO = """
name: tiny
warm_up_s: 0.2
duration_s: 1
slo: {ttft_p95_s: 20.0, max_error_share: 0.25}
streams:
  - tenant: one
    key: sk-one
    model: m
    workload: {kind: synthetic, tail_tokens: 4, output_tokens: 3}
    arrivals: {kind: constant, rate_rps: 20}
"""


class OpenAI(BaseHTTPRequestHandler):
    """Three tokens for a right key, 401 for a wrong one; also a Prometheus, for its one query."""

    protocol_version = "HTTP/1.1"
    simulated = False
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/api/v1/query_range":
            assert parse_qs(url.query)["query"] == [replicas.QUERY]
            start = float(parse_qs(url.query)["start"][0])
            values = [[start + 1, "2"], [start + 2, "3"]]
            found = [{"metric": {"model": "m"}, "values": values}] if self.simulated else []
            return self._answer(200, {"data": {"result": found}})
        if self.headers["Authorization"] != "Bearer sk-one":
            return self._answer(401, {"error": {"message": "no such key"}})
        return self._answer(200, {"data": [{"id": "m", "simulated": self.simulated}]})

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(3):
            self._event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at the client."""

    def _event(self, payload: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(payload).encode() + b"\n\n")

    def _chunk(self, raw: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(raw), raw))

    def _answer(self, status: int, payload: dict[str, Any]) -> None:
        raw = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def serving(*, simulated: bool = False) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    bodies: list[dict[str, Any]] = []
    handler = type("Handler", (OpenAI,), {"simulated": simulated, "bodies": bodies})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tiny(**changes: Any) -> scenario.Scenario:
    return scenario.parse(SCENARIO, "tiny.yaml").model_copy(update=changes)


def test_a_scenario_becomes_a_run_with_every_request_in_it(tmp_path: Path) -> None:
    with serving(simulated=True) as (url, bodies):
        run = run_scenario(tiny(), SessionSettings(url=url, workers=2, prometheus=url))
    assert len(run.records) == len(bodies) == 24
    assert {record.outcome for record in run.records} == {Outcome.COMPLETED}
    assert [record.index for record in run.records] == list(range(24))
    assert sum(record.warm_up for record in run.records) == 4
    assert {record.completion_tokens for record in run.records} == {3}
    assert run.simulated
    assert [(count.model, count.count) for count in run.replicas] == [("m", 2), ("m", 3)]
    assert {target.metric: target.limit for target in run.slo} == {"ttft_p95_s": 20.0, "completed_share": 0.75}
    assert "sk-one" not in str(run.scenario)
    run_file.save(run, tmp_path / "deep" / "run.json.gz")
    again = run_file.load(tmp_path / "deep" / "run.json.gz")
    assert again.records[5].chunks_s == pytest.approx(run.records[5].chunks_s, abs=1e-6)
    assert judge(again).lines[1] == judge(run).lines[1]


def test_twice_the_speed_is_twice_the_requests_in_the_same_time() -> None:
    with serving() as (url, bodies):
        run = run_scenario(tiny(), SessionSettings(url=url, speed=2.0, simulated=True))
    assert len(bodies) == 48
    assert max(record.scheduled_s for record in run.records) == pytest.approx(1.175)
    assert sum(record.warm_up for record in run.records) == 8
    assert run.simulated


def test_users_wait_for_their_answers() -> None:
    with serving() as (url, bodies):
        run = run_scenario(tiny(), SessionSettings(url=url, users=1, think_s=0.3))
    assert 1 <= len(run.records) == len(bodies) <= 5
    assert "closed" in run.scenario["loop"]
    assert not run.simulated


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"key": "sk-two"}, "HTTP 401 for tenant one: .*no such key"),
        ({"model": "n"}, "no model 'n' for tenant one; it has: m"),
    ],
)
def test_what_the_server_would_refuse_is_said_before_anything_is_sent(changes: dict[str, str], problem: str) -> None:
    wanted = scenario.parse(
        SCENARIO.replace("sk-one", changes.get("key", "sk-one")).replace(
            "model: m", f"model: {changes.get('model', 'm')}"
        ),
        "x",
    )
    with serving() as (url, bodies), pytest.raises(LoadtestError, match=problem):
        run_scenario(wanted, SessionSettings(url=url))
    assert not bodies


def test_a_server_that_is_not_there_is_named() -> None:
    with serving() as (url, _):
        pass
    with pytest.raises(LoadtestError, match=rf"{url}/v1/models: no answer"):
        run_scenario(tiny(), SessionSettings(url=url))


class Starting(OpenAI):
    """Says in turn what a cluster says while it starts, then answers; a model that loads has no replica yet."""

    lists: list[dict[str, Any] | int]

    def do_GET(self) -> None:
        said = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        if isinstance(said, int):
            return self._answer(said, {"error": {"message": "not now"}})
        return self._answer(200, {"data": [{"id": "m", "simulated": True} | said]})


@contextmanager
def starting(*lists: dict[str, Any] | int) -> Iterator[str]:
    """A server that says so; it refuses connections for half a second first."""
    handler = type("Handler", (Starting,), {"bodies": [], "lists": list(lists)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.server_bind()
    timer = threading.Timer(0.5, lambda: (server.server_activate(), server.serve_forever()))
    timer.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        timer.join(0.6)
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.session.READY_POLL_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_starts_is_waited_for() -> None:
    said = (503, 404, {"ready_replicas": 0, "min_replicas": 1}, {"ready_replicas": 1, "min_replicas": 1})
    with starting(*said) as url:
        run = run_scenario(tiny(), SessionSettings(url=url, wait_ready_s=30.0))
    assert {record.outcome for record in run.records} == {Outcome.COMPLETED}


@pytest.mark.usefixtures("impatient")
def test_a_model_that_sleeps_is_not_waited_for() -> None:
    with starting({"ready_replicas": 0, "min_replicas": 0}) as url:
        assert run_scenario(tiny(), SessionSettings(url=url, wait_ready_s=30.0)).records


@pytest.mark.usefixtures("impatient")
def test_the_wait_for_a_server_has_an_end_and_none_for_a_refusal() -> None:
    loads = {"ready_replicas": 0, "min_replicas": 1}
    with starting(loads) as url, pytest.raises(LoadtestError, match=r"not ready within 1 s: no replica yet of m"):
        run_scenario(tiny(), SessionSettings(url=url, wait_ready_s=1.0))
    with starting(401) as url, pytest.raises(LoadtestError, match="HTTP 401 for tenant one"):
        run_scenario(tiny(), SessionSettings(url=url, wait_ready_s=30.0))
    # Without a wait a model that loads is measured as it is: that is what was asked for.
    with serving() as (url, _):
        assert run_scenario(tiny(), SessionSettings(url=url)).records


def test_a_prometheus_without_samples_costs_the_plot_not_the_run() -> None:
    with serving() as (url, _):
        run = run_scenario(tiny(duration_s=0.1), SessionSettings(url=url, prometheus=url))
        with pytest.raises(LoadtestError, match="does it scrape the cluster"):
            replicas.read(url, datetime.now(UTC), 10.0)
    assert not run.replicas
    assert "has no sample" in run.scenario["notes"][-1]
    with pytest.raises(LoadtestError, match="no Prometheus"):
        replicas.read("file:///etc/passwd", datetime.now(UTC), 1.0)


def failed_run() -> ReportRun:
    record = Record(
        index=0,
        tenant="t/é",
        model="m",
        scheduled_s=0.1234567,
        sent_s=0.2,
        chunks_s=(0.3, 0.4),
        end_s=0.5,
        status=200,
        outcome=Outcome.FAILED,
        prompt_tokens=None,
        completion_tokens=None,
        failure=FailureKind.BROKEN_STREAM,
        detail='cut "here"\u2028',
        warm_up=False,
    )
    return ReportRun(
        name="n",
        when=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        machine={"cores": 2},
        scenario={"name": "n"},
        records=[record],
        simulated=False,
        slo=[SloTarget("e2e_p99_s", 1.0, tenant="t")],
        replicas=[ReplicaCount(1.0, "m", 3)],
        invalid=["late"],
    )


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_a_run_comes_back_from_its_file_as_it_was(tmp_path: Path, name: str) -> None:
    run = failed_run()
    run_file.save(run, tmp_path / name)
    again = run_file.load(tmp_path / name)
    assert again.records[0].scheduled_s == 0.123457
    assert again.records[0].failure is FailureKind.BROKEN_STREAM
    assert again.records[0].detail == run.records[0].detail
    assert (again.slo, again.replicas, again.when) == (run.slo, run.replicas, run.when)
    assert judge(again).state is State.INVALID
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"{", "not the file of a run"),
        (b"[]", "not the file of a run"),
        (gzip.compress(b"{}"), "not the file of a run"),
        (gzip.compress(b"{}")[:-9], "not the file of a run"),
        (b'{"format": "galerne-loadtest-run", "version": 9}', "version 9"),
        (b'{"format": "galerne-loadtest-run", "version": 1}', "damaged"),
    ],
)
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(LoadtestError, match=rf"x\.json: .*{problem}"):
        run_file.load(path)


def test_progress_in_a_log_is_a_line_now_and_then() -> None:
    out = StringIO()
    with progress.shown(Console(file=out, width=200), "tiny", 20.0) as told:
        tally = Tally(sent=3, in_flight=1, tokens=10)
        tally.outcomes["completed"] += 1
        tally.outcomes["failed"] += 1
        told(tally, 0.0)
        told(tally, 5.0)
        tally.tokens = 110
        told(tally, 10.0)
    first, second = out.getvalue().splitlines()
    assert first == "tiny: 0 of 20 s, 3 sent, 1 in flight, 1 completed, 1 failed, 0 tok/s, no first token yet"
    assert "20 tok/s" in second


def test_progress_on_a_terminal_is_a_bar() -> None:
    out = StringIO()
    with progress.shown(Console(file=out, width=200, force_terminal=True), "tiny", 20.0) as told:
        told(Tally(sent=1, in_flight=1), 5.0)
    assert "1 sent" in out.getvalue()
