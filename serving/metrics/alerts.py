"""Prometheus' alert rules: what an operator is told, why, and which section of docs/runbook.md says what to do.

Burn rates follow the Site Reliability Workbook (chapter 5): an alert fires while a long window shows that it matters
and a short one that it still goes on. The objective is the configured p95 target, so 5% of events may miss it
in 30 days; a burn rate of 14.4 spends 2% of that in an hour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from serving.metrics.release import ANY, LABEL, scoped
from serving.metrics.rules import (
    ENGINE_JOB,
    GATEWAY_JOB,
    GATEWAYS_SAMPLED,
    ITL_MISSED,
    MODEL,
    QUANTILE,
    READY,
    SAMPLED,
    TTFT_MISSED,
    burn_record,
    chosen,
)

RUNBOOK: Final = "docs/runbook.md"
BUDGET: Final = 1 - QUANTILE
# Below so many events in the long window a share says little: one slow request at night wakes nobody.
LEAST_EVENTS: Final = 20
STALE_S: Final = 30
FULL_KV: Final = 0.95
LONG_HOLD_S: Final = 60
ERROR_SHARE: Final = 0.05
LEDGER_LAG_S: Final = 60
# Twice the longest `refresh_s`.
KEYS_OLD_S: Final = 3600

Severity = Literal["critical", "warning"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert rule; `for_` is how long its expression must hold."""

    name: str
    severity: Severity
    expr: str
    for_: str
    summary: str
    description: str

    def document(self, only: str = ANY) -> dict[str, Any]:
        """As Prometheus' rule file has it, for the releases that a matcher chooses."""
        return {
            "alert": self.name,
            "expr": scoped(self.expr, only),
            "for": self.for_,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "release": f"{{{{ $labels.{LABEL} }}}}",
                "runbook": f"{RUNBOOK}#{self.name.lower()}",
            },
        }


def _burn(long: str, short: str, rate: float) -> str:
    """Both windows above a burn rate, for each objective, on enough events."""
    bound = f"{rate * BUDGET:.3g}"
    parts = []
    for objective, counter in (("ttft", TTFT_MISSED), ("itl", ITL_MISSED)):
        over = " and on (galerne_release, model) ".join(
            f'{burn_record(window)}{{objective="{objective}"}} > {bound}' for window in (long, short)
        )
        parts.append(f"({over} and on ({MODEL}) sum by ({MODEL}) (increase({counter}[{long}])) > {LEAST_EVENTS})")
    return " or ".join(parts)


def _errors(window: str) -> str:
    return (
        f'sum by (galerne_release, model) (rate(galerne_requests_total{{status=~"5..|cut"}}[{window}]))'
        f" / sum by (galerne_release, model) (rate(galerne_requests_total[{window}])) > {ERROR_SHARE}"
        f' and on ({MODEL}) sum by ({MODEL}) (increase(galerne_requests_total{{status=~"5..|cut"}}[{window}])) > 5'
    )


ALERTS: Final = (
    Alert(
        "GalerneSloBurn",
        "critical",
        f"{_burn('1h', '5m', 14.4)} or {_burn('6h', '30m', 6)}",
        "1m",
        "{{ $labels.model }} misses its {{ $labels.objective }} target {{ $value | humanizePercentage }} of the time",
        "At this rate the month's allowance of slow answers is gone in days. See whether replicas are missing, "
        "starting or saturated, and whether one tenant sends far more than usual.",
    ),
    Alert(
        "GalerneSloBurnSlow",
        "warning",
        _burn("3d", "6h", 1),
        "30m",
        "{{ $labels.model }} slowly spends its allowance for {{ $labels.objective }}",
        "For three days more than 5% of events missed the target. Raise replicas.min or replicas.max, or set a target "
        "that the hardware can keep.",
    ),
    Alert(
        "GalerneSaturated",
        "warning",
        "model:galerne_waiting:sum > on (galerne_release, model) model:galerne_running:sum"
        f" or model:galerne_kv_use:avg > {FULL_KV} or model:galerne_held_oldest_seconds:max > {LONG_HOLD_S}",
        "5m",
        "{{ $labels.model }} has more work than its replicas take",
        "More requests wait than run, the KV cache is full, or requests are held for want of a replica. More replicas "
        "help, if the autoscaler may start them and the nodes have room.",
    ),
    Alert(
        "GalerneSignalsStale",
        "critical",
        f"time() - {SAMPLED} > {STALE_S} or galerne_autoscaler_stale == 1 or absent({GATEWAYS_SAMPLED})",
        "1m",
        "The signals of {{ $labels.model }} are too old to scale by",
        "The autoscaler holds the present number of replicas. A target's scrape fails, Prometheus is in trouble, or "
        "its rules are not evaluated.",
    ),
    Alert(
        "GalerneScrapeFails",
        "warning",
        f'up{{job=~"{GATEWAY_JOB}|{ENGINE_JOB}"}} == 0',
        "1m",
        "{{ $labels.job }} {{ $labels.instance }} cannot be scraped",
        "While a listed target fails, sums over all of them are not believed and scaling holds. It hangs, or its "
        "metrics port cannot be reached.",
    ),
    Alert(
        "GalerneAutoscalerErrors",
        "warning",
        "sum by (galerne_release, model) (increase(galerne_autoscaler_errors_total[10m])) > 0",
        "1m",
        "Scaling decisions of {{ $labels.model }} fail",
        "A decision that fails leaves the target as it was. The autoscaler's log has the reason.",
    ),
    Alert(
        "GalerneScaleAtMax",
        "warning",
        "galerne_autoscaler_target_replicas >= on (galerne_release, model) galerne_autoscaler_max_replicas"
        " and on (galerne_release, model) (model:galerne_waiting:sum > 0 or model:galerne_held:sum > 0)",
        "10m",
        "{{ $labels.model }} is at replicas.max and requests wait",
        "Load beyond it queues. Raise replicas.max if there are nodes for it, or bound the tenants that cause it.",
    ),
    Alert(
        "GalerneReplicasMissing",
        "warning",
        f"galerne_autoscaler_target_replicas > on (galerne_release, model) {READY}",
        "20m",
        "{{ $labels.model }} was promised more replicas than have become ready",
        "Nodes are missing, or replicas do not start.",
    ),
    Alert(
        "GalerneReplicaCrashLoop",
        "critical",
        'sum by (galerne_release, model) (increase(galerne_replica_starts_total{outcome="failed"}[15m])) > 2'
        ' or (sum by (galerne_release, model) (increase(galerne_replica_starts_total{outcome="ready"}[30m])) > 2'
        " and on (galerne_release, model) changes(galerne_autoscaler_target_replicas[30m]) == 0"
        " and on (galerne_release, model) (galerne_autoscaler_target_replicas offset 30m))",
        "0m",
        "Replicas of {{ $labels.model }} fail or restart again and again",
        "Starts fail, or replicas are started anew although their number was not changed. The replica's log has the "
        "reason: memory, a driver, weights that cannot be read.",
    ),
    Alert(
        "GalerneGatewayErrors",
        "critical",
        _errors("5m"),
        "2m",
        "{{ $value | humanizePercentage }} of the requests to {{ $labels.model }} end with an error of ours",
        "Answers of 500 and above, or cut off. See which kind galerne_upstream_errors_total counts: connect, broken, "
        "timeout or server_error.",
    ),
    Alert(
        "GalerneStreamsCut",
        "warning",
        "sum by (galerne_release, model) (increase(galerne_streams_cut_total[10m])) > 2",
        "0m",
        "Streams of {{ $labels.model }} break off",
        "Clients got a part of an answer and an error event. An engine died or was stopped before it was drained.",
    ),
    Alert(
        "GalerneReplicasEjected",
        "warning",
        "max by (galerne_release, model) (galerne_replicas_ejected) > 0",
        "5m",
        "Replicas of {{ $labels.model }} get no new requests because they fail",
        "A gateway has ejected {{ $value }} of them for failures, stalled answers or probes without an answer, and "
        "Ray Serve has not replaced them: they look healthy from where it looks.",
    ),
    Alert(
        "GalerneShedding",
        "critical",
        'sum by (galerne_release, reason) (rate(galerne_requests_shed_total{reason!="tenant"}[5m])) > 1',
        "2m",
        "Gateways refuse requests for want of room ({{ $labels.reason }})",
        "Clients get 503 with Retry-After: a gateway has as many requests as it takes, its event loop is late, or its "
        "memory is at its bound. More gateways help.",
    ),
    Alert(
        "GalerneConfigReloadFails",
        "critical",
        "galerne_config_reload_ok == 0",
        "1m",
        "{{ $labels.instance }} cannot use the configuration file as it stands",
        "It goes on with the state before: a key that was to be revoked is still good. The gateway's log "
        "names file and line of each problem, `galerne config check` does too.",
    ),
    Alert(
        "GalerneConfigDiffers",
        "warning",
        "count by (galerne_release) (count by (galerne_release, revision) (galerne_config_info)) > 1",
        "10m",
        "Gateways know different tenants and keys",
        "A change of the configuration file has reached some of them and not others: its Secret or file is not brought "
        "to every node, or some cannot use it.",
    ),
    Alert(
        "GalerneConfigWaits",
        "warning",
        "max by (galerne_release) (galerne_config_sections_waiting) > 0",
        "30m",
        "{{ $value }} section(s) of the configuration file wait for a restart or a rollout",
        "Tenants, keys and administrators change live, the rest does not. The gateway's log names the sections.",
    ),
    Alert(
        "GalerneIssuerKeysOld",
        "warning",
        f"time() - galerne_issuer_keys_timestamp_seconds > {KEYS_OLD_S}",
        "5m",
        "{{ $labels.instance }} has had no new keys of the issuer {{ $labels.issuer }} for "
        "{{ $value | humanizeDuration }}",
        "Its tokens are taken by the keys it gave last until `keep_s` has passed, then answered with 503. API keys are "
        "not affected. The gateway's log has the reason.",
    ),
    Alert(
        "GalerneLimitsStoreDown",
        "critical",
        "min by (galerne_release) (galerne_limits_store_up) == 0",
        "1m",
        "The store of quotas does not answer",
        "Until it does, limits_on_outage decides: gateways count by themselves, let everything pass, or refuse. "
        "Bring the "
        "store back; nothing else has to be restarted.",
    ),
    Alert(
        "GalerneTenantQueueFull",
        "warning",
        "max by (galerne_release, model, tenant) (galerne_queue_bound_part) >= 1",
        "5m",
        "{{ $labels.tenant }} has as many requests for {{ $labels.model }} waiting as it may have",
        "Further ones hear 429. Others are served beside it by their weights. It sends more than its part of "
        "the engines "
        "gives: more replicas, more weight, or a quota that tells its clients sooner.",
    ),
    Alert(
        "GalerneLedgerBehind",
        "warning",
        f"max by (galerne_release) (galerne_ledger_lag_seconds) > {LEDGER_LAG_S}",
        "5m",
        "Usage records wait for {{ $value | humanizeDuration }} to be written",
        "The database is slow or away. Records wait on the gateways' disks, up to ledger.spill_bytes, and get there "
        "when it is back.",
    ),
    Alert(
        "GalerneUsageLost",
        "critical",
        'sum by (galerne_release) (increase(galerne_ledger_rows_total{state="dropped"}[10m])) > 0',
        "0m",
        "Usage of {{ $value | humanize }} requests was not recorded",
        "The spill of a gateway is full, or its disk takes nothing. Requests are served and not billed until there is "
        "room: bring the database back, or raise ledger.spill_bytes.",
    ),
)


def group(release: str | None = None) -> dict[str, Any]:
    """The alerts' group of the rule file, for one release or for every one."""
    only = chosen(release)
    return {"name": "galerne-alerts", "interval": "30s", "rules": [alert.document(only) for alert in ALERTS]}
