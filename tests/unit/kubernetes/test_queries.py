"""What Prometheus makes of our queries, computed by promtool."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.cluster.kubernetes.bundle import QUERIES
from serving.cluster.kubernetes.rollout_run import REQUESTS, increase
from serving.cluster.kubernetes.status import ATTAINMENT, ENGINES, LAST_DECISIONS, TARGET
from serving.metrics.rules import ITL_MISSED, READY, TTFT_MISSED
from tests.system_parts import required

TTFT = 'galerne_slo_ttft_requests_total{job="galerne-gateway",instance="%s",model="%s",tenant="t",met="%s"}'
FAILED = 'galerne_requests_total{job="galerne-gateway",instance="%s",model="m",tenant="t",route="r",status="%s"}'
# A sample every 5 s for 10 minutes: so many a sample.
SERIES = {
    TTFT % ("10.0.1.1:9400", "m", "true"): "0+2x120",
    TTFT % ("10.0.1.1:9400", "m", "false"): "0+0x120",
    TTFT % ("10.0.2.1:9401", "m", "true"): "0+1x120",
    TTFT % ("10.0.2.1:9401", "m", "false"): "0+1x120",
    TTFT % ("10.0.2.1:9401", "other/model.v2", "true"): "0+5x120",
    TTFT % ("[fd00::2]:9400", "m", "true"): "0+3x120",
    # An address that only looks alike where the dots are not taken as dots.
    TTFT % ("10.0.211:9400", "m", "true"): "0+100x120",
    FAILED % ("10.0.2.1:9401", "200"): "0+4x120",
    FAILED % ("10.0.2.1:9401", "503"): "0+1x120",
    FAILED % ("10.0.2.1:9401", "cut"): "0+1x120",
    FAILED % ("10.0.2.1:9401", "404"): "0+1x120",
}
BAD = 'met="false"'


def check(tmp_path: Path, expected: dict[str, float]) -> None:
    document: dict[str, Any] = {
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": [{"series": series, "values": values} for series, values in SERIES.items()],
                "promql_expr_test": [
                    {"expr": expr, "eval_time": "600s", "exp_samples": [{"labels": "{}", "value": value}]}
                    for expr, value in expected.items()
                ],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(document))
    ran = subprocess.run(
        [required("promtool"), "test", "rules", str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_version_is_counted_by_its_own_gateways(tmp_path: Path) -> None:
    minute = 60
    check(
        tmp_path,
        {
            increase(TTFT_MISSED, "", ["10.0.1.1"], ["m"], minute): 24,
            increase(TTFT_MISSED, BAD, ["10.0.1.1"], ["m"], minute): 0,
            increase(TTFT_MISSED, "", ["10.0.2.1"], ["m"], minute): 24,
            increase(TTFT_MISSED, BAD, ["10.0.2.1"], ["m"], minute): 12,
            increase(TTFT_MISSED, "", ["10.0.2.1"], [], minute): 84,
            increase(TTFT_MISSED, "", ["10.0.2.1"], ["other/model.v2"], minute): 60,
            increase(TTFT_MISSED, "", ["10.0.1.1", "fd00::2"], ["m"], minute): 60,
            increase(REQUESTS, "", ["10.0.2.1"], [], minute): 84,
            increase(REQUESTS, 'status=~"5..|cut"', ["10.0.2.1"], [], minute): 24,
        },
    )


@pytest.mark.parametrize(
    "query",
    [READY, TARGET, ATTAINMENT, LAST_DECISIONS, ENGINES, *QUERIES.values(), increase(ITL_MISSED, BAD, ["::1"], [], 60)],
)
def test_queries_are_promql(tmp_path: Path, query: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [{"record": "x", "expr": query}]}]}))
    ran = subprocess.run(
        [required("promtool"), "check", "rules", str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
