"""Every metric Galerne exports: name, kind, labels, unit and meaning, in one place.

vLLM's own metrics (`vllm:*`), Ray's (`ray_*`) and HAProxy's (`haproxy_*`) keep their names; this table holds
what none of them can know: who asked, what the client waited for, and what was decided. Labels are bounded: tenants
and models come from the configuration, statuses from HTTP, routes from the allow-list, replicas from the cluster;
nothing a client sends becomes a label value. A counter's name stands without the `_total` it is exported with.
"""

from __future__ import annotations

from serving.config import LIMITS
from serving.metrics.spec import Spec

SECONDS_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
SECONDS_START = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
SECONDS_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
PLACES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NO_TENANT = "none"  # label value before a key was recognised
NO_MODEL = "none"  # label value where a request names no served model
MET, MISSED = "true", "false"  # label values of `met`
UPSTREAM_KINDS = ("connect", "broken", "timeout", "server_error", "stalled")
# Failures after which a request may go to another replica, and what came of it.
RETRY_KINDS = ("broken", "server_error", "stalled")
SHED_REASONS = ("requests", "tenant", "bodies", "event_loop", "memory")
EJECTION_REASONS = ("failures", "stalled", "probes")
RETRY_ENDS = ("sent", "no_replica", "no_budget")
# Whose answer a client got of a request that two replicas had.
HEDGE_WINNERS = ("first", "second", "neither")
RELOADS = ("applied", "failed")
RENEWALS = ("renewed", "failed")
HOLD_ENDS = ("released", "full", "displaced", "late", "left")
ROUTE_REASONS = ("prefix", "adapter", "load", "tie", "session", "turn", "only")
HELD, NOT_HELD = "true", "false"  # label values of `held`
TOKEN_KINDS = ("prompt", "cached", "completion")
START_PHASES = ("schedule", "load", "compile", "warm_up")

TABLE: tuple[Spec, ...] = (
    Spec(
        "galerne_requests",
        "counter",
        ("route", "model", "tenant", "status"),
        "Requests answered, by HTTP status; 499: the client left first; of a held stream, what its error event says.",
    ),
    Spec(
        "galerne_requests_accepted",
        "counter",
        ("model", "tenant"),
        "Requests that passed authentication and bounds.",
    ),
    Spec(
        "galerne_requests_finished",
        "counter",
        ("model", "tenant", "outcome"),
        "Accepted requests that ended: completed, rejected, failed or cancelled.",
    ),
    Spec(
        "galerne_requests_refused",
        "counter",
        ("model", "tenant", "code"),
        "Requests answered with an error of the gateway's own, by its code; model none: refused before it was known.",
    ),
    Spec(
        "galerne_requests_denied",
        "counter",
        ("tenant", "reason"),
        "Requests that were not let in (401) or not there (403), by why; tenant none: nobody's key.",
    ),
    Spec(
        "galerne_requests_in_flight",
        "gauge",
        ("model", "tenant"),
        "Accepted requests not yet ended.",
    ),
    Spec(
        "galerne_time_to_first_token_seconds",
        "histogram",
        ("model", "tenant"),
        "From the request's last byte to the first byte of a streamed answer.",
        SECONDS_LONG,
    ),
    Spec(
        "galerne_inter_chunk_seconds",
        "histogram",
        ("model",),
        "Between two chunks of a streamed answer (with one token a chunk: ITL).",
        SECONDS_SHORT,
        at_scrape=True,
    ),
    Spec(
        "galerne_request_seconds",
        "histogram",
        ("route", "model", "tenant"),
        "From the request's last byte to the answer's last byte.",
        SECONDS_LONG,
    ),
    Spec("galerne_request_bytes", "counter", ("model", "tenant"), "Request body bytes accepted."),
    Spec("galerne_response_bytes", "counter", ("model", "tenant"), "Response body bytes relayed."),
    Spec(
        "galerne_upstream_errors",
        "counter",
        ("model", "kind"),
        f"Engine-side failures: {', '.join(UPSTREAM_KINDS)}.",
    ),
    Spec(
        "galerne_retries",
        "counter",
        ("model", "kind", "end"),
        "Requests that a replica lost before the first byte of an answer, by how it failed and whether another got "
        f"them: {', '.join(RETRY_ENDS)}.",
    ),
    Spec(
        "galerne_hedges",
        "counter",
        ("model", "won"),
        "Requests that went to a second replica because the first was late (faults.hedge_after_s), by whose answer "
        f"was relayed: {', '.join(HEDGE_WINNERS)} (both failed, or the client left).",
    ),
    Spec(
        "galerne_replica_ejections",
        "counter",
        ("model", "reason"),
        "Replicas judged unfit for new requests: too many failures, stalled, or probes without an answer.",
    ),
    Spec(
        "galerne_replicas_ejected",
        "gauge",
        ("model",),
        "Replicas that get no new requests of this gateway because of how they behave.",
        at_scrape=True,
    ),
    Spec(
        "galerne_slow_readers",
        "counter",
        ("model",),
        "Clients cut off because they took nothing of their answer for too long; their requests count as cancelled.",
    ),
    Spec(
        "galerne_requests_shed",
        "counter",
        ("reason",),
        f"Requests refused because the gateway has too much of something: {', '.join(SHED_REASONS)}.",
    ),
    Spec("galerne_streams_cut", "counter", ("model",), "Streams that broke off and ended with an error event."),
    Spec(
        "galerne_requests_held",
        "gauge",
        ("model", "tenant"),
        "Accepted requests that wait in this gateway for a replica or for their turn.",
        at_scrape=True,
    ),
    Spec(
        "galerne_held_oldest_seconds",
        "gauge",
        ("model",),
        "How long the oldest request has waited in this gateway; 0: none waits.",
        at_scrape=True,
    ),
    Spec("galerne_held_bytes", "gauge", ("model",), "Body bytes of the requests that wait.", at_scrape=True),
    Spec(
        "galerne_holds",
        "counter",
        ("model", "tenant", "end"),
        f"Waits that ended, by how: {', '.join(HOLD_ENDS)}.",
    ),
    Spec(
        "galerne_hold_seconds",
        "histogram",
        ("model", "tenant"),
        "How long requests waited for a replica or for their turn; those that did not wait are not here.",
        SECONDS_LONG,
    ),
    Spec(
        "galerne_queue_place",
        "histogram",
        ("model", "tenant"),
        "Place of a request among its own tenant's when it began to wait; 1: the tenant's next. Whose turn it is "
        "between tenants galerne_queue_lag_tokens tells.",
        PLACES,
    ),
    Spec(
        "galerne_service_tokens",
        "counter",
        ("model", "tenant"),
        "Service given: tokens read, and twice those written; over a tenant's weight it is what is kept fair.",
        at_scrape=True,
    ),
    Spec(
        "galerne_queue_lag_tokens",
        "gauge",
        ("model", "tenant"),
        "Service over weight that a waiting tenant had beyond the one that is served next; 0: it is next.",
        at_scrape=True,
    ),
    Spec(
        "galerne_queue_bound_part",
        "gauge",
        ("model", "tenant"),
        "Part of the places in the queue that a tenant may have which it has; 1: the next request is refused.",
        at_scrape=True,
    ),
    Spec(
        "galerne_in_flight_tokens",
        "gauge",
        ("model",),
        "Tokens of this gateway in flight on engines, estimated: prompts, and answers as far as they are expected.",
        at_scrape=True,
    ),
    Spec(
        "galerne_in_flight_tokens_limit",
        "gauge",
        ("model",),
        "The most of them before requests wait in the gateway; +Inf: only sequences are bounded.",
        at_scrape=True,
    ),
    Spec(
        "galerne_in_flight_sequences",
        "gauge",
        ("model",),
        "Sequences of this gateway in flight on engines.",
        at_scrape=True,
    ),
    Spec(
        "galerne_in_flight_sequences_limit",
        "gauge",
        ("model",),
        "The most of them before requests wait in the gateway.",
        at_scrape=True,
    ),
    Spec(
        "galerne_replicas_ready",
        "gauge",
        ("model",),
        "Engine replicas this gateway may choose from.",
        at_scrape=True,
    ),
    Spec(
        "galerne_replica_in_flight",
        "gauge",
        ("model", "replica"),
        "Requests of this gateway in flight on a replica.",
        at_scrape=True,
    ),
    Spec(
        "galerne_route_choices",
        "counter",
        ("model", "reason"),
        f"Replicas chosen for requests, by why: {', '.join(ROUTE_REASONS)}.",
    ),
    Spec(
        "galerne_route_prompt_tokens",
        "counter",
        ("model", "held"),
        "Prompt tokens routed (four bytes each), by whether the chosen replica was taken to hold them already.",
    ),
    Spec(
        "galerne_route_index_blocks",
        "gauge",
        ("model",),
        "Blocks of prompts that this gateway knows to be on replicas, once for each replica.",
        at_scrape=True,
    ),
    Spec(
        "galerne_slo_ttft_requests",
        "counter",
        ("model", "tenant", "met"),
        "Streamed requests by whether their first byte came within slo.ttft_p95_s; one that failed before it did not.",
    ),
    Spec(
        "galerne_slo_itl_requests",
        "counter",
        ("model", "tenant", "met"),
        "Streamed requests that ended, by whether the mean time between their events was within slo.itl_p95_s.",
    ),
    Spec(
        "galerne_config_info",
        "gauge",
        ("revision",),
        "1, by the digest of the configuration file whose tenants and administrators are in force.",
    ),
    Spec(
        "galerne_config_reload_ok",
        "gauge",
        (),
        "1 while the configuration file as it stands is in force; 0: it cannot be used, and an older state is.",
    ),
    Spec("galerne_config_reloads", "counter", ("outcome",), f"States of the file: {', '.join(RELOADS)}."),
    Spec(
        "galerne_config_applied_timestamp_seconds",
        "gauge",
        (),
        "When the newest state of the configuration file came into force, seconds since 1970.",
    ),
    Spec(
        "galerne_config_sections_waiting",
        "gauge",
        (),
        "Sections of the configuration file that changed and wait for a restart or a rollout.",
    ),
    Spec(
        "galerne_issuer_keys_renewals",
        "counter",
        ("issuer", "outcome"),
        f"Attempts to renew the public keys of an issuer of tokens: {', '.join(RENEWALS)}.",
    ),
    Spec(
        "galerne_issuer_keys_timestamp_seconds",
        "gauge",
        ("issuer",),
        "When an issuer's public keys were last renewed, seconds since 1970; 0: never yet.",
    ),
    Spec(
        "galerne_quota_refusals",
        "counter",
        ("tenant", "limit"),
        f"Requests refused by a quota: {', '.join(LIMITS)}; store: limits could not be checked.",
    ),
    Spec(
        "galerne_quota_use",
        "gauge",
        ("tenant", "limit"),
        "Part of a quota that is used, as of the tenant's newest request; 1: all of it.",
    ),
    Spec("galerne_limits_store_up", "gauge", (), "1 while the store of quotas answers this gateway."),
    Spec("galerne_build_info", "gauge", ("version",), "1, by the version of Galerne that runs."),
    Spec(
        "galerne_replica_gpus",
        "gauge",
        ("model",),
        "GPUs that one replica of a model takes; 0: it computes on processors.",
    ),
    Spec(
        "galerne_event_loop_lag_seconds",
        "histogram",
        (),
        "How much later than asked for the gateway's event loop woke a timer; every stream waits as long.",
        SECONDS_SHORT,
    ),
    Spec(
        "galerne_replica_start_seconds",
        "histogram",
        ("model", "phase"),
        "A replica's start by phase: schedule (asked for to placed), load, compile, warm_up.",
        SECONDS_START,
        exporter="autoscaler",
    ),
    Spec(
        "galerne_replica_starts",
        "counter",
        ("model", "outcome"),
        "Replica starts that ended: ready or failed.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_target_replicas",
        "gauge",
        ("model",),
        "Replicas that the autoscaler asks for.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_max_replicas",
        "gauge",
        ("model",),
        "The most that replicas.max lets it ask for.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_term_replicas",
        "gauge",
        ("model", "term"),
        "The terms of the newest decision, in replicas: demand, queue, feedback, floor and so on.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_decisions",
        "counter",
        ("model", "reason"),
        "Decisions by their reason.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_signal_age_seconds",
        "gauge",
        ("model", "signal"),
        "Age of the newest sample of each signal at the newest decision; +Inf: there is none.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_stale",
        "gauge",
        ("model",),
        "1 while the scale is held because its signals are missing or too old.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_autoscaler_errors",
        "counter",
        ("model",),
        "Decisions that failed and left the target as it was.",
        exporter="autoscaler",
    ),
    Spec(
        "galerne_tokens",
        "counter",
        ("model", "tenant", "kind"),
        f"Tokens of requests that ended, as billed: {', '.join(TOKEN_KINDS)}; cached ones are among the prompts'. "
        "An adapter stands under its own name.",
    ),
    Spec(
        "galerne_ledger_rows",
        "counter",
        ("state",),
        "Rows of usage of this gateway: spilled (safe on its disk) or dropped (lost to a bound).",
        at_scrape=True,
    ),
    Spec(
        "galerne_ledger_rows_behind",
        "gauge",
        (),
        "Rows of usage on this gateway's machine that are not in the database.",
        at_scrape=True,
    ),
    Spec(
        "galerne_ledger_lag_seconds",
        "gauge",
        (),
        "How long the oldest row of usage on this gateway's machine has waited for the database.",
        at_scrape=True,
    ),
)


def spec(name: str) -> Spec:
    """The table's row of this name; StopIteration where there is none."""
    return next(row for row in TABLE if row.name == name)
