"""One minute of load on the real front: every request that was planned is accounted for, on both sides of the wire."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest import run_file, scenario
from loadtest.records import Outcome
from loadtest.reports.verdict import EXIT_CODES, State
from tests.integration.running import RunningCluster, metric

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"


def test_the_smoke_scenario_leaves_no_request_unaccounted(fake_cluster: RunningCluster, tmp_path: Path) -> None:
    metrics = f"http://127.0.0.1:{fake_cluster.state()['gateways'][0]['metrics_port']}/metrics"
    finished = metric(metrics, "galerne_requests_finished_total", model=MODEL)
    generated = fake_cluster.engine_metric(MODEL, "vllm:generation_tokens_total")
    ended = subprocess.run(
        [sys.executable, "-m", "loadtest", "run", "smoke", "--url", fake_cluster.url, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    # A busy machine may miss latency targets or make the client late; what it may not do is fail to run or to count.
    assert ended.returncode in set(EXIT_CODES.values()), ended.stdout + ended.stderr
    run = run_file.load(tmp_path / "run.json.gz")
    planned = list(scenario.plan(scenario.load("smoke")))
    assert len(planned) > 300
    assert [record.index for record in run.records] == list(range(len(planned)))
    assert [(r.tenant, r.scheduled_s) for r in run.records] == [
        (request.tenant, pytest.approx(request.at_s, abs=1e-5)) for request in planned
    ]
    assert {record.outcome for record in run.records} == {Outcome.COMPLETED}, [
        (r.outcome, r.detail) for r in run.records if r.outcome is not Outcome.COMPLETED
    ][:5]
    # The answers are the plan's, to the token; the gateway and the engine counted the same.
    assert [record.completion_tokens for record in run.records] == [request.output_tokens for request in planned]
    assert metric(metrics, "galerne_requests_finished_total", model=MODEL) - finished == len(planned)
    counted = fake_cluster.engine_metric(MODEL, "vllm:generation_tokens_total") - generated
    assert counted == sum(request.output_tokens for request in planned)
    assert metric(metrics, "galerne_requests_in_flight", model=MODEL) == 0
    assert run.simulated
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"] in {state.value for state in State}
    assert "simulated" in (tmp_path / "report.html").read_text().lower()
