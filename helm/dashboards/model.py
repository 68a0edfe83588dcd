"""One model's latency, engines and replicas: where a slow answer's time goes."""

from __future__ import annotations

from helm.dashboards.panels import (
    EVENTS_PER_S,
    MODEL,
    REPLICAS,
    REQUESTS,
    SECONDS,
    SHARE,
    TOKENS,
    TOKENS_PER_S,
    Dashboard,
    Panel,
    Query,
    Row,
    mean,
    quantile,
    quantiles,
    query,
    rate,
)
from serving.metrics.alerts import BUDGET, FULL_KV, LONG_HOLD_S
from serving.metrics.rules import READY

_TARGET = "galerne_autoscaler_target_replicas"
_SLO = ("GalerneSloBurn",)
_SATURATED = ("GalerneSaturated",)

DASHBOARD = Dashboard(
    "model",
    "Galerne / Model",
    "Latency as clients see it, the engines behind it, and the replicas.",
    (
        Row(
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "From a request's last byte to the first byte of its streamed answer, as the gateway saw it: "
                    "waiting, prefill and the way there. Compare p95 with slo.ttft_p95_s.",
                    SECONDS,
                    quantiles("galerne_time_to_first_token_seconds", "model", MODEL),
                    alerts=_SLO,
                ),
                Panel(
                    "Time between tokens",
                    "Between two chunks of a stream (a token each). p95 grows with the batch; p99 alone with long "
                    "prompts of others, which are prefilled in between. Compare with slo.itl_p95_s.",
                    SECONDS,
                    quantiles("galerne_inter_chunk_seconds", "model", MODEL),
                    alerts=_SLO,
                ),
                Panel(
                    "Where an answer's time goes",
                    "Means of the engine's own phases. A queue that grows wants replicas; prefill that grows means "
                    "longer prompts or fewer cache hits; decode is output length times step time.",
                    SECONDS,
                    tuple(
                        Query(mean(f"vllm:request_{phase}_time_seconds", "model", MODEL), f"{{{{model}}}} {phase}")
                        for phase in ("queue", "prefill", "decode")
                    ),
                ),
                Panel(
                    "Time of whole requests",
                    "p95 from a request's last byte to its answer's last byte, by route. It follows output length: no"
                    " promise is made of it, but a step without a change in traffic is news.",
                    SECONDS,
                    query(
                        quantile(0.95, "galerne_request_seconds", "model, route", MODEL, 'model!="none"'),
                        "{{model}} {{route}}",
                    ),
                ),
                Panel(
                    "Targets missed",
                    "Share of the last 30 seconds' answers that missed a target of the model. 5% are allowed.",
                    SHARE,
                    (
                        Query(f"model:galerne_ttft_missed:ratio30s{{{MODEL}}}", "{{model}} first token"),
                        Query(f"model:galerne_itl_missed:ratio30s{{{MODEL}}}", "{{model}} tokens"),
                    ),
                    worry=BUDGET,
                    alerts=_SLO,
                    most=1,
                ),
                Panel(
                    "Tokens of a request",
                    "Mean prompt tokens that had to be computed (cache hits are not in it) and output tokens. A step "
                    "here explains a step in latency: the traffic changed, not the cluster.",
                    TOKENS,
                    (
                        Query(f"model:galerne_prompt_tokens_computed:mean2m{{{MODEL}}}", "{{model}} prompt computed"),
                        Query(f"model:galerne_output_tokens:mean2m{{{MODEL}}}", "{{model}} output"),
                    ),
                ),
            ),
        ),
        Row(
            "Engines",
            (
                Panel(
                    "Running and waiting",
                    "Requests in the batches of all replicas, and in the engines' queues. Waiting above running for "
                    "minutes: the replicas do not suffice.",
                    REQUESTS,
                    (
                        Query(f"model:galerne_running:sum{{{MODEL}}}", "{{model}} running"),
                        Query(f"model:galerne_waiting:sum{{{MODEL}}}", "{{model}} waiting"),
                    ),
                    alerts=_SATURATED,
                ),
                Panel(
                    "KV cache use",
                    "Share of the KV cache in use: the mean over replicas, and the fullest. Near 1 requests are "
                    "preempted and computed again. Full with few requests: long contexts.",
                    SHARE,
                    (
                        Query(f"model:galerne_kv_use:avg{{{MODEL}}}", "{{model}} mean"),
                        Query(f"max by (model) (vllm:kv_cache_usage_perc{{{MODEL}}})", "{{model}} fullest"),
                    ),
                    worry=FULL_KV,
                    alerts=_SATURATED,
                    most=1,
                ),
                Panel(
                    "Held in the gateways",
                    "Requests that wait in the gateways because the model has no replica: it sleeps, starts or lost "
                    "them all.",
                    REQUESTS,
                    query(f"model:galerne_held:sum{{{MODEL}}}"),
                    alerts=_SATURATED,
                ),
                Panel(
                    "Longest wait for a replica",
                    "How long the oldest held request has waited. More than a start takes (row below): the replica "
                    "does not come.",
                    SECONDS,
                    query(f"model:galerne_held_oldest_seconds:max{{{MODEL}}}"),
                    worry=LONG_HOLD_S,
                    alerts=_SATURATED,
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens that were prefilled (cached ones included) and tokens generated. Capacity is "
                    "reached where they stop growing while requests wait.",
                    TOKENS_PER_S,
                    (
                        Query(rate("vllm:prompt_tokens_total", "model", MODEL), "{{model}} prompt"),
                        Query(rate("vllm:generation_tokens_total", "model", MODEL), "{{model}} output"),
                    ),
                ),
                Panel(
                    "Prefix cache hits",
                    "Share of prompt tokens found in the engines' prefix caches. A fall under equal traffic: requests"
                    " of one conversation go to different replicas, or the caches are too small.",
                    SHARE,
                    query(
                        # Each rate is extrapolated by itself: a young counter's share may come out above 1.
                        f"clamp_max({rate('vllm:prefix_cache_hits_total', 'model', MODEL)}"
                        f" / ({rate('vllm:prefix_cache_queries_total', 'model', MODEL)} > 0), 1)"
                    ),
                    most=1,
                ),
                Panel(
                    "Preemptions",
                    "Requests thrown out of a batch because the KV cache was full; their work is done again. More "
                    "than a few an hour: lower max_num_seqs or max_model_len, or add replicas.",
                    EVENTS_PER_S,
                    query(rate("vllm:num_preemptions_total", "model", MODEL)),
                    alerts=_SATURATED,
                ),
                Panel(
                    "Failures",
                    "Failures on the engines' side by kind. connect: a replica went and is still listed; broken: it "
                    "died; timeout: it hangs; server_error: it refused.",
                    EVENTS_PER_S,
                    query(rate("galerne_upstream_errors_total", "model, kind", MODEL), "{{model}} {{kind}}"),
                    "stacked",
                    alerts=("GalerneGatewayErrors", "GalerneStreamsCut"),
                ),
            ),
        ),
        Row(
            "Replicas",
            (
                Panel(
                    "Ready and asked for",
                    "Replicas that take requests, and how many the autoscaler asks for (models with autoscaling). A "
                    "gap that outlasts a start: nodes are missing or starts fail.",
                    REPLICAS,
                    (
                        Query(f"{READY}{{{MODEL}}}", "{{model}} ready"),
                        Query(f"max by (model) ({_TARGET}{{{MODEL}}})", "{{model}} asked for"),
                    ),
                    alerts=("GalerneReplicasMissing", "GalerneReplicaCrashLoop"),
                ),
                Panel(
                    "Warming",
                    "Replicas asked for that are not ready: they wait for a node, load, compile or warm up. Never for"
                    " longer than the start of a replica (beside).",
                    REPLICAS,
                    query(f"clamp_min(max by (model) ({_TARGET}{{{MODEL}}}) - on (model) {READY}{{{MODEL}}}, 0)"),
                    "stacked",
                    alerts=("GalerneReplicasMissing",),
                ),
                Panel(
                    "Start of a replica",
                    "Mean of the measured starts by phase. schedule: from asked for to placed (a node that must come "
                    "first shows here); load: weights; compile; warm_up.",
                    SECONDS,
                    query(
                        f"sum by (model, phase) (galerne_replica_start_seconds_sum{{{MODEL}}})"
                        f" / sum by (model, phase) (galerne_replica_start_seconds_count{{{MODEL}}})",
                        "{{model}} {{phase}}",
                    ),
                    "bars",
                    decimals=1,
                ),
                Panel(
                    "In flight by replica",
                    "Requests of the gateways on each replica. Lines far apart for long: one replica is slow, or a "
                    "popular prefix pulls traffic to it.",
                    REQUESTS,
                    query(f"sum by (model, replica) (galerne_replica_in_flight{{{MODEL}}})", "{{model}} {{replica}}"),
                ),
            ),
        ),
    ),
)
