"""Every alert fires on what it is for and is silent on what looks like it, judged by promtool."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.metrics import alerts, prometheus
from serving.metrics.alerts import ALERTS
from serving.metrics.release import LABEL, matcher, scoped
from serving.metrics.table import TABLE
from tests.system_parts import required

ROOT = Path(__file__).parents[2]
MODEL = '{model="m"}'


@dataclass(frozen=True)
class Case:
    """Series (in promtool's notation, a sample a minute) and whether the alert fires at a minute of them."""

    alert: str
    fires: bool
    series: dict[str, str]
    at: str = "60m"


def burn(objective: str, counter: str, long: str, short: str, share: float, now: float, events: int) -> dict[str, str]:
    labels = f'{{model="m", objective="{objective}"}}'
    return {
        f"model:galerne_slo_missed:ratio_rate{long}{labels}": f"{share}x1000",
        f"model:galerne_slo_missed:ratio_rate{short}{labels}": f"{now}x1000",
        f'{counter}{{model="m", met="true"}}': f"0+{events}x1000",
    }


TTFT, ITL = "galerne_slo_ttft_requests_total", "galerne_slo_itl_requests_total"
FRESH = {
    "galerne:gateways_sampled:timestamp_seconds": "0+60x1000",
    'model:galerne_sampled:timestamp_seconds{model="m", source="gateway"}': "0+60x1000",
}
STARTS = 'galerne_replica_starts_total{model="m", outcome="%s"}'
TARGET = f"galerne_autoscaler_target_replicas{MODEL}"
REQUESTS = 'galerne_requests_total{model="m", tenant="t", route="r", status="%s"}'

CONFIG_INFO = 'galerne_config_info{instance="%s", revision="%s"}'
CONFIG_OK, WAITING = 'galerne_config_reload_ok{instance="g1"}', 'galerne_config_sections_waiting{instance="g1"}'

KEYS_AT = 'galerne_issuer_keys_timestamp_seconds{instance="g1", issuer="entra"}'

CASES = (
    Case("GalerneIssuerKeysOld", True, {KEYS_AT: "0x200"}, "120m"),
    Case("GalerneIssuerKeysOld", False, {KEYS_AT: "0+60x200"}, "120m"),
    Case("GalerneConfigReloadFails", True, {CONFIG_OK: "1x50 0x100"}),
    Case("GalerneConfigReloadFails", False, {CONFIG_OK: "0x50 1x100"}),
    Case("GalerneConfigDiffers", True, {CONFIG_INFO % ("g1", "a"): "1x100", CONFIG_INFO % ("g2", "b"): "1x100"}),
    Case("GalerneConfigDiffers", False, {CONFIG_INFO % ("g1", "a"): "1x100", CONFIG_INFO % ("g2", "a"): "1x100"}),
    # A change on its way.
    Case("GalerneConfigDiffers", False, {CONFIG_INFO % ("g1", "a"): "1x100", CONFIG_INFO % ("g2", "b"): "_x55 1x9"}),
    Case("GalerneConfigWaits", True, {WAITING: "2x100"}),
    Case("GalerneConfigWaits", False, {WAITING: "0x20 1x20 0x100"}),
    Case("GalerneSloBurn", True, burn("ttft", TTFT, "1h", "5m", 0.8, 0.8, 10)),
    Case("GalerneSloBurn", True, burn("itl", ITL, "6h", "30m", 0.4, 0.4, 10)),
    # It is over: the short window shows it.
    Case("GalerneSloBurn", False, burn("ttft", TTFT, "1h", "5m", 0.8, 0.1, 10)),
    # A blip: the long window does not.
    Case("GalerneSloBurn", False, burn("ttft", TTFT, "1h", "5m", 0.1, 1.0, 10)),
    # One slow request of a quiet night.
    Case("GalerneSloBurn", False, burn("ttft", TTFT, "1h", "5m", 1.0, 1.0, 0)),
    Case("GalerneSloBurnSlow", True, burn("itl", ITL, "3d", "6h", 0.06, 0.06, 10)),
    Case("GalerneSloBurnSlow", False, burn("itl", ITL, "3d", "6h", 0.04, 0.06, 10)),
    Case(
        "GalerneSaturated",
        True,
        {f"model:galerne_waiting:sum{MODEL}": "9x1000", f"model:galerne_running:sum{MODEL}": "8x1000"},
    ),
    Case("GalerneSaturated", True, {f"model:galerne_kv_use:avg{MODEL}": "0.99x1000"}),
    Case("GalerneSaturated", True, {f"model:galerne_held_oldest_seconds:max{MODEL}": "0+60x1000"}),
    Case(
        "GalerneSaturated",
        False,
        {
            f"model:galerne_waiting:sum{MODEL}": "2x1000",
            f"model:galerne_running:sum{MODEL}": "8x1000",
            f"model:galerne_kv_use:avg{MODEL}": "0.9x1000",
            f"model:galerne_held_oldest_seconds:max{MODEL}": "5x1000",
        },
    ),
    # Recorded anew each minute, but of samples that are no newer.
    Case("GalerneSignalsStale", True, FRESH | {next(reversed(FRESH)): "0+60x50 3000x1000"}),
    Case("GalerneSignalsStale", True, FRESH | {f"galerne_autoscaler_stale{MODEL}": "1x1000"}),
    # No gateway was ever scraped.
    Case("GalerneSignalsStale", True, {"up": "1x1000"}),
    Case("GalerneSignalsStale", False, FRESH | {f"galerne_autoscaler_stale{MODEL}": "0x1000"}),
    Case("GalerneScrapeFails", True, {'up{job="vllm", instance="i"}': "1x57 0x10"}),
    Case("GalerneScrapeFails", False, {'up{job="vllm", instance="i"}': "1x1000", 'up{job="else"}': "0x1000"}),
    Case("GalerneAutoscalerErrors", True, {f"galerne_autoscaler_errors_total{MODEL}": "0x55 1x1000"}),
    Case("GalerneAutoscalerErrors", False, {f"galerne_autoscaler_errors_total{MODEL}": "5x1000"}),
    Case(
        "GalerneScaleAtMax",
        True,
        {TARGET: "4x1000", f"galerne_autoscaler_max_replicas{MODEL}": "4x1000", f"model:galerne_held:sum{MODEL}": "1x1000"},
    ),
    # At its maximum, and nobody waits.
    Case(
        "GalerneScaleAtMax",
        False,
        {TARGET: "4x1000", f"galerne_autoscaler_max_replicas{MODEL}": "4x1000", f"model:galerne_held:sum{MODEL}": "0x1000"},
    ),
    Case(
        "GalerneScaleAtMax",
        False,
        {TARGET: "3x1000", f"galerne_autoscaler_max_replicas{MODEL}": "4x1000", f"model:galerne_held:sum{MODEL}": "1x1000"},
    ),
    Case("GalerneReplicasMissing", True, {TARGET: "3x1000", f"model:galerne_replicas_ready:max{MODEL}": "1x1000"}),
    # They came.
    Case("GalerneReplicasMissing", False, {TARGET: "3x1000", f"model:galerne_replicas_ready:max{MODEL}": "1x50 3x1000"}),
    Case("GalerneReplicaCrashLoop", True, {STARTS % "failed": "0x50 1 2 3 4 4x1000"}),
    Case("GalerneReplicaCrashLoop", True, {STARTS % "ready": "2x40 3 4 5 6 6x1000", TARGET: "2x1000"}),
    # It was told to start three more.
    Case("GalerneReplicaCrashLoop", False, {STARTS % "ready": "2x40 3 4 5 6 6x1000", TARGET: "2x38 6x1000"}),
    Case("GalerneReplicaCrashLoop", False, {STARTS % "failed": "0x50 1x1000"}),
    Case("GalerneGatewayErrors", True, {REQUESTS % "200": "0+90x1000", REQUESTS % "502": "0+10x1000"}),
    Case("GalerneGatewayErrors", True, {REQUESTS % "200": "0+90x1000", REQUESTS % "cut": "0+10x1000"}),
    # Clients' own errors and refusals.
    Case("GalerneGatewayErrors", False, {REQUESTS % "200": "0+90x1000", REQUESTS % "400": "0+90x1000"}),
    Case("GalerneGatewayErrors", False, {REQUESTS % "200": "0+990x1000", REQUESTS % "502": "0+10x1000"}),
    Case("GalerneStreamsCut", True, {f"galerne_streams_cut_total{MODEL}": "0x55 2 4 6x1000"}),
    Case("GalerneStreamsCut", False, {f"galerne_streams_cut_total{MODEL}": "0x55 1x1000"}),
    # Ejected by one of two gateways; back after its penalty.
    Case("GalerneReplicasEjected", True, {f'galerne_replicas_ejected{{model="m", instance="{i}"}}': f"{n}x1000" for i, n in (("a", 0), ("b", 1))}),
    Case("GalerneReplicasEjected", False, {f"galerne_replicas_ejected{MODEL}": "0x58 1 0 0x1000"}),
    Case("GalerneShedding", True, {'galerne_requests_shed_total{reason="memory"}': "0+120x1000"}),
    Case("GalerneShedding", False, {'galerne_requests_shed_total{reason="requests"}': "0+30x1000"}),
    Case("GalerneShedding", False, {'galerne_requests_shed_total{reason="tenant"}': "0+120x1000"}),
    Case("GalerneLimitsStoreDown", True, {'galerne_limits_store_up{instance="a"}': "1x1000", 'galerne_limits_store_up{instance="b"}': "0x1000"}),
    Case("GalerneLimitsStoreDown", False, {'galerne_limits_store_up{instance="a"}': "1x1000"}),
    Case("GalerneTenantQueueFull", True, {'galerne_queue_bound_part{model="m", tenant="t", instance="a"}': "1x1000"}),
    Case("GalerneTenantQueueFull", False, {'galerne_queue_bound_part{model="m", tenant="t", instance="a"}': "0.9x1000"}),
    Case("GalerneLedgerBehind", True, {"galerne_ledger_lag_seconds": "0+10x1000"}),
    Case("GalerneLedgerBehind", False, {"galerne_ledger_lag_seconds": "2x1000"}),
    Case("GalerneUsageLost", True, {'galerne_ledger_rows_total{state="dropped"}': "0x55 3x1000"}),
    Case("GalerneUsageLost", False, {'galerne_ledger_rows_total{state="dropped"}': "3x1000", 'galerne_ledger_rows_total{state="spilled"}': "0+9x1000"}),
)  # fmt: skip


def test_rules_alerts_and_alerting_are_valid(tmp_path: Path) -> None:
    promtool = required("promtool")
    path = tmp_path / "rules.yaml"
    path.write_text(prometheus.rule_file())
    config = tmp_path / "prometheus.yaml"
    config.write_text(prometheus.config_file(path, tmp_path / "targets.json"))
    done = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.alert}-{'fires' if c.fires else 'silent'}-{CASES.index(c)}")
def test_alert(case: Case, tmp_path: Path) -> None:
    # Alone, without a name; and the same of one release beside another for which it is the other way round.
    other = next(one for one in CASES if one.alert == case.alert and one.fires is not case.fires)
    beside = of_release(OURS, case.series) | of_release(OTHERS, other.series)
    query = f'count(ALERTS{{alertname="{case.alert}", alertstate="firing"}}) > bool 0 or vector(0)'
    run([judged(case.series, query, case)], tmp_path)
    run([judged(beside, scoped(query, matcher(OURS)), case)], tmp_path, OURS)


OURS, OTHERS = "prod/galerne", "test/galerne"


def of_release(release: str, series: dict[str, str]) -> dict[str, str]:
    """The series as a release's targets have them."""
    named = f'{LABEL}="{release}"'
    return {
        name.replace("{", f"{{{named}, ") if "{" in name else f"{name}{{{named}}}": values
        for name, values in series.items()
    }


def judged(series: dict[str, str], query: str, case: Case) -> dict[str, Any]:
    """One of promtool's tests."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": case.at, "exp_samples": [{"labels": "{}", "value": int(case.fires)}]}
        ],
    }


def run(tests: list[dict[str, Any]], tmp_path: Path, release: str | None = None) -> None:
    promtool = required("promtool")
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": [alerts.group(release)]}))
    document = {"rule_files": ["alerts.yaml"], "evaluation_interval": "30s", "tests": tests}
    test = tmp_path / "test.yaml"
    test.write_text(yaml.safe_dump(document))
    done = subprocess.run([promtool, "test", "rules", test], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_of_each_kind_and_a_section_of_the_runbook() -> None:
    names = {alert.name for alert in ALERTS}
    for fires in (True, False):
        assert {case.alert for case in CASES if case.fires is fires} == names
    headings = {line[3:] for line in (ROOT / alerts.RUNBOOK).read_text().splitlines() if line.startswith("## Galerne")}
    assert headings == names


def test_rules_speak_of_metrics_that_exist() -> None:
    import re

    exported = {
        f"{row.name}{suffix}"
        for row in TABLE
        for suffix in {"counter": ("_total",), "gauge": ("",)}.get(row.kind, ("_bucket", "_sum", "_count"))
    }
    spoken = set(re.findall(r"(?<![:\w])galerne_\w+", prometheus.rule_file())) - {LABEL}
    assert spoken <= exported, spoken - exported
