"""Whether users get what they were promised, how much of it, and what it costs: the page to open first."""

from __future__ import annotations

from helm.dashboards.panels import (
    COUNT,
    EVENTS_PER_S,
    HOURS,
    MODEL,
    QUARTER,
    REPLICAS,
    REQUESTS_PER_S,
    SECONDS,
    SHARE,
    SHOWN,
    TIMES_ALLOWED,
    TOKENS_PER_S,
    WINDOW,
    Dashboard,
    Panel,
    Query,
    Row,
    grown,
    query,
    rate,
)
from serving.metrics.alerts import BUDGET
from serving.metrics.rules import ITL_MISSED, QUANTILE, READY, SCRAPE_S, TTFT_MISSED, burn_record

SLO = ("GalerneSloBurn", "GalerneSloBurnSlow")
# The burn rate that wakes somebody, of the alert's fast window.
FAST_BURN = 14.4
_READY = f"{READY}{{{MODEL}}}"
# One sample an evaluation: their sum counts only times that were observed, unlike a mean over a range with gaps.
_HOURS = f"sum_over_time({_READY}{SHOWN}) * {SCRAPE_S} / 3600"


def _kept(counter: str, what: str, objective: str) -> Panel:
    met = f'sum(increase({counter}{{{MODEL}, met="true"}}{SHOWN}))'
    return Panel(
        what,
        f"Share of streamed answers within the model's slo.{objective}_p95_s, over the time shown. Below 95% the "
        "promise is broken: see which model below, then its page. Models without this target do not count.",
        SHARE,
        query(f"{met} / (sum(increase({counter}{{{MODEL}}}{SHOWN})) > 0)", "kept"),
        "number",
        QUARTER,
        worry=QUANTILE,
        worry_below=True,
        alerts=SLO,
        most=1,
        decimals=2,
    )


DASHBOARD = Dashboard(
    "overview",
    "Galerne / Overview",
    "Promises kept, goodput, answers, and what they cost.",
    (
        Row(
            "Promises",
            (
                _kept(TTFT_MISSED, "First token in time", "ttft"),
                _kept(ITL_MISSED, "Tokens in time", "itl"),
                Panel(
                    "Goodput",
                    "Streamed answers a second whose first token came in time: the load that was served as promised. "
                    "Far below the arrivals (next row) with a missed target means that capacity is lacking.",
                    REQUESTS_PER_S,
                    query(f'sum(rate({TTFT_MISSED}{{{MODEL}, met="true"}}{WINDOW}))', "goodput"),
                    "number",
                    QUARTER,
                    decimals=2,
                ),
                Panel(
                    "Alerts that fire",
                    "Galerne's alerts that fire now. Anything but 0 has a section in the runbook; when each began is "
                    "marked on every graph.",
                    COUNT,
                    query('count(ALERTS{alertname=~"Galerne.+", alertstate="firing"}) or vector(0)', "firing"),
                    "number",
                    QUARTER,
                    worry=1,
                ),
                Panel(
                    "Targets missed",
                    "Share of answers of the last 30 s that missed a target, by model. Short peaks are within the "
                    "allowance of 5%; a line that stays above it spends it.",
                    SHARE,
                    (
                        Query(f"model:galerne_ttft_missed:ratio30s{{{MODEL}}}", "{{model}} first token"),
                        Query(f"model:galerne_itl_missed:ratio30s{{{MODEL}}}", "{{model}} tokens"),
                    ),
                    worry=BUDGET,
                    alerts=SLO,
                    most=1,
                ),
                Panel(
                    "Allowance spent",
                    "How many times faster than allowed the month's 5% of missed answers is spent. 1 lasts the month;"
                    " 14.4 in the last hour and still in the last 5 minutes wakes somebody.",
                    TIMES_ALLOWED,
                    tuple(
                        Query(
                            f"{burn_record(window)}{{{MODEL}}} / {BUDGET:g}",
                            f"{{{{model}}}} {{{{objective}}}} {window}",
                        )
                        for window in ("5m", "1h")
                    ),
                    worry=FAST_BURN,
                    alerts=SLO,
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Load and goodput",
                    "Requests that arrive and pass the checks, and streamed answers in time. Not streamed ones "
                    "(embeddings among them) have no first token, so they are load and never goodput.",
                    REQUESTS_PER_S,
                    (
                        Query(f"sum(model:galerne_arrivals:rate30s{{{MODEL}}})", "arrivals"),
                        Query(f'sum(rate({TTFT_MISSED}{{{MODEL}, met="true"}}{WINDOW}))', "first token in time"),
                    ),
                ),
                Panel(
                    "Requests by outcome",
                    "How accepted requests ended. completed: answered, also with an error of the engine's; rejected: "
                    "no replica in time; failed: engine or gateway broke; cancelled: the client left. Worry when "
                    "failed or rejected grow.",
                    REQUESTS_PER_S,
                    query(rate("galerne_requests_finished_total", "outcome", MODEL), "{{outcome}}"),
                    "stacked",
                    alerts=("GalerneGatewayErrors",),
                ),
                Panel(
                    "Answers by status",
                    "All answers, refused ones and health checks included. 4xx is the clients' matter (401: a key "
                    "that expired?), 499: they left first; 5xx and cut are ours.",
                    REQUESTS_PER_S,
                    query(rate("galerne_requests_total", "status"), "{{status}}"),
                    "stacked",
                    alerts=("GalerneGatewayErrors",),
                ),
                Panel(
                    "Output tokens",
                    "Tokens that the engines generate. Falling under equal load: answers became shorter, or engines "
                    "slower (the model's page tells).",
                    TOKENS_PER_S,
                    query(rate("vllm:generation_tokens_total", "model", MODEL)),
                    "stacked",
                ),
            ),
        ),
        Row(
            "Capacity and cost",
            (
                Panel(
                    "Replicas ready",
                    "Replicas that take requests, by model. Worry when it is below what the autoscaler asks for (its "
                    "page) or 0 for a model that should not sleep.",
                    REPLICAS,
                    query(_READY),
                    alerts=("GalerneReplicasMissing", "GalerneReplicaCrashLoop"),
                ),
                Panel(
                    "Replica-seconds per 1000 output tokens",
                    "What a thousand tokens cost in time of a replica, over five minutes. It rises as replicas idle "
                    "and falls as batches fill; for good high with a full queue means a slow engine.",
                    SECONDS,
                    query(
                        f"{_READY} * 1000 / on (model) "
                        f"(sum by (model) (rate(vllm:generation_tokens_total{{{MODEL}}}[5m])) > 0)"
                    ),
                ),
                Panel(
                    "Replica-hours",
                    "Time of ready replicas, summed over the time shown. Starting ones are not in it, though their "
                    "nodes are paid for: add the starts of the autoscaler's page.",
                    HOURS,
                    query(f"sum by (model) ({_HOURS})"),
                    "bars",
                    width=8,
                    decimals=2,
                ),
                Panel(
                    "GPU-hours",
                    "Replica-hours times the GPUs that a replica takes today (tensor × pipeline workers). 0: it "
                    "computes on processors, or is simulated.",
                    HOURS,
                    query(f"sum by (model) ({_HOURS}) * on (model) max by (model) (galerne_replica_gpus)"),
                    "bars",
                    width=8,
                    decimals=2,
                ),
                Panel(
                    "Requests",
                    "Accepted requests in the time shown, by model.",
                    COUNT,
                    query(grown("galerne_requests_accepted_total", "model", MODEL)),
                    "bars",
                    width=8,
                    decimals=0,
                ),
                Panel(
                    "Streams cut and engine failures",
                    "Streams that broke off with an error event, and failures on the engines' side. Single ones come "
                    "with a node that goes; a line that stays is an engine that dies.",
                    EVENTS_PER_S,
                    (
                        Query(rate("galerne_streams_cut_total", "model", MODEL), "{{model}} cut"),
                        Query(rate("galerne_upstream_errors_total", "model", MODEL), "{{model}} failures"),
                    ),
                    width=24,
                    alerts=("GalerneStreamsCut", "GalerneGatewayErrors"),
                ),
            ),
        ),
    ),
)
