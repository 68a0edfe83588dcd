"""What the autoscaler saw, how old it was, what it decided and why."""

from __future__ import annotations

from helm.dashboards.panels import (
    EVENTS_PER_S,
    MODEL,
    REPLICAS,
    REQUESTS,
    REQUESTS_PER_S,
    SECONDS,
    SHARE,
    TOKENS,
    YES_NO,
    Dashboard,
    Panel,
    Query,
    Row,
    query,
    rate,
)
from serving.metrics.alerts import BUDGET, FULL_KV, STALE_S
from serving.metrics.rules import COMPLETE, ENGINE_JOB, GATEWAY_JOB, READY, SAMPLED

_STALE = ("GalerneSignalsStale",)


def _of(metric: str, by: str = "model") -> str:
    return f"max by ({by}) ({metric}{{{MODEL}}})"


DASHBOARD = Dashboard(
    "autoscaler",
    "Galerne / Autoscaler",
    "Signals, decisions, reasons, and what came of them; of models with `autoscaling`.",
    (
        Row(
            "Decisions",
            (
                Panel(
                    "Target and actual",
                    "Replicas asked for, ready, and the most that may be asked for. Ready below target for longer "
                    "than a start: nodes are missing. Target at the most while requests wait: raise replicas.max.",
                    REPLICAS,
                    (
                        Query(_of("galerne_autoscaler_target_replicas"), "{{model}} target"),
                        # Only of models that scale.
                        Query(f"{READY} and on (model) {_of('galerne_autoscaler_target_replicas')}", "{{model}} ready"),
                        Query(_of("galerne_autoscaler_max_replicas"), "{{model}} most"),
                    ),
                    alerts=("GalerneScaleAtMax", "GalerneReplicasMissing"),
                ),
                Panel(
                    "Terms of the decision",
                    "What each term of the newest decision asks for, in replicas: the largest wins. demand: arrivals "
                    "over what a replica can do; growth and forecast: what comes until a start is done; queue: work "
                    "that waits; feedback: missed targets; wanted: what came of them.",
                    REPLICAS,
                    query(_of("galerne_autoscaler_term_replicas", "model, term"), "{{model}} {{term}}"),
                ),
                Panel(
                    "Decisions by reason",
                    "Decisions a second by their reason, the decisive term or what held it back (cooldown, rate, "
                    "minimum, maximum). stale for more than a minute: signals are too old to scale by.",
                    EVENTS_PER_S,
                    query(rate("galerne_autoscaler_decisions_total", "model, reason", MODEL), "{{model}} {{reason}}"),
                    "stacked",
                    alerts=_STALE,
                ),
                Panel(
                    "Scale held",
                    "Yes while the scale is held because signals are missing or too old. Requests are served "
                    "meanwhile; a change in load is not followed.",
                    YES_NO,
                    query(_of("galerne_autoscaler_stale")),
                    worry=1,
                    alerts=_STALE,
                    most=1,
                ),
                Panel(
                    "Decisions that failed",
                    "Decisions that raised an error and left the target as it was. Never, in a healthy cluster.",
                    EVENTS_PER_S,
                    query(rate("galerne_autoscaler_errors_total", "model", MODEL)),
                    alerts=("GalerneAutoscalerErrors",),
                ),
                Panel(
                    "Starts that ended",
                    "Replica starts by outcome. Starts without a change of the target: replicas die and come again.",
                    EVENTS_PER_S,
                    query(rate("galerne_replica_starts_total", "model, outcome", MODEL), "{{model}} {{outcome}}"),
                    alerts=("GalerneReplicaCrashLoop",),
                ),
            ),
        ),
        Row(
            "Age of the signals",
            (
                Panel(
                    "Age at the newest decision",
                    "How old each signal was when the newest decision was made. No line: it has no sample (without "
                    "traffic there is no quantile). 5 to 10 s are ordinary, 15 s after a target left; over "
                    "stale_after_s the scale is held.",
                    SECONDS,
                    query(
                        f"{_of('galerne_autoscaler_signal_age_seconds', 'model, signal')} < Inf",
                        "{{model}} {{signal}}",
                    ),
                    worry=STALE_S,
                    alerts=_STALE,
                ),
                Panel(
                    "Age of the samples",
                    "Age of the oldest of the newest samples of gateways and of engines, from the recording rules. "
                    "One source alone that ages: one of its targets cannot be scraped.",
                    SECONDS,
                    query(f"time() - {SAMPLED}{{{MODEL}}}", "{{model}} {{source}}"),
                    worry=STALE_S,
                    alerts=(*_STALE, "GalerneScrapeFails"),
                ),
                Panel(
                    "Samples complete",
                    "Yes while every target of a source was scraped of late. No: the rules repeat what they recorded "
                    "last.",
                    YES_NO,
                    query(f"{COMPLETE}{{{MODEL}}}", "{{model}} {{source}}"),
                    alerts=("GalerneScrapeFails",),
                    most=1,
                ),
                Panel(
                    "Targets that answer",
                    "Share of the listed gateways and engines that answered the newest scrape. Below 1 the signals "
                    "age.",
                    SHARE,
                    query(f'avg by (job) (up{{job=~"{GATEWAY_JOB}|{ENGINE_JOB}|galerne-autoscaler"}})', "{{job}}"),
                    worry=1,
                    worry_below=True,
                    alerts=("GalerneScrapeFails",),
                    most=1,
                ),
            ),
        ),
        Row(
            "Signals",
            (
                Panel(
                    "Arrivals",
                    "Accepted requests a second of the last 30 s: the demand that replicas are reckoned from.",
                    REQUESTS_PER_S,
                    query(f"model:galerne_arrivals:rate30s{{{MODEL}}}"),
                ),
                Panel(
                    "Work that waits",
                    "Running and waiting in the engines, held in the gateways. Waiting or held for minutes: decisions"
                    " come too late or replicas do not come.",
                    REQUESTS,
                    (
                        Query(f"model:galerne_running:sum{{{MODEL}}}", "{{model}} running"),
                        Query(f"model:galerne_waiting:sum{{{MODEL}}}", "{{model}} waiting"),
                        Query(f"model:galerne_held:sum{{{MODEL}}}", "{{model}} held"),
                    ),
                    alerts=("GalerneSaturated",),
                ),
                Panel(
                    "Latency",
                    "p95 of the last 30 s: first token, and between tokens.",
                    SECONDS,
                    (
                        Query(f"model:galerne_ttft_seconds:p95_30s{{{MODEL}}}", "{{model}} first token"),
                        Query(f"model:galerne_itl_seconds:p95_30s{{{MODEL}}}", "{{model}} between tokens"),
                    ),
                    alerts=("GalerneSloBurn",),
                ),
                Panel(
                    "Targets missed",
                    "What the feedback term acts on.",
                    SHARE,
                    (
                        Query(f"model:galerne_ttft_missed:ratio30s{{{MODEL}}}", "{{model}} first token"),
                        Query(f"model:galerne_itl_missed:ratio30s{{{MODEL}}}", "{{model}} tokens"),
                    ),
                    worry=BUDGET,
                    alerts=("GalerneSloBurn",),
                    most=1,
                ),
                Panel(
                    "KV cache use",
                    "Mean over a model's replicas.",
                    SHARE,
                    query(f"model:galerne_kv_use:avg{{{MODEL}}}"),
                    worry=FULL_KV,
                    alerts=("GalerneSaturated",),
                    most=1,
                ),
                Panel(
                    "Tokens of a request",
                    "Means of the last two minutes (of the last hour where no request ended): the size of a request's"
                    " work.",
                    TOKENS,
                    (
                        Query(f"model:galerne_prompt_tokens_computed:mean2m{{{MODEL}}}", "{{model}} prompt computed"),
                        Query(f"model:galerne_output_tokens:mean2m{{{MODEL}}}", "{{model}} output"),
                    ),
                ),
            ),
        ),
    ),
)
