"""The way in: HAProxy, the gateways' relay, their errors, and the gateways as processes."""

from __future__ import annotations

from helm.dashboards.panels import (
    BYTES,
    BYTES_PER_S,
    COUNT,
    EVENTS_PER_S,
    MODEL,
    REPLICAS,
    REQUESTS,
    REQUESTS_PER_S,
    SECONDS,
    SHARE,
    THIRD,
    Dashboard,
    Panel,
    Query,
    Row,
    quantile,
    query,
    rate,
)
from serving.metrics.alerts import ERROR_SHARE
from serving.metrics.rules import GATEWAY_JOB

_FRONT = 'proxy!="prometheus"'
_BACK = 'proxy!="default_backend"'
_PROCESS = f'job="{GATEWAY_JOB}"'
_ERRORS = ("GalerneGatewayErrors",)
# A gateway within 250 MB is part of what is promised; twice of it is a leak.
_MUCH_MEMORY = 500e6
_LATE_S = 0.1
_ANSWERS = "galerne_requests_total"
_OURS = 'status=~"5..|cut"'

DASHBOARD = Dashboard(
    "gateway",
    "Galerne / Gateway",
    "HAProxy, relay, errors, and the gateways' processes.",
    (
        Row(
            "HAProxy",
            (
                Panel(
                    "Requests",
                    "Requests that reached HAProxy, refused ones included. More here than the gateways answer (next "
                    "row): the edge refuses, see the statuses beside.",
                    REQUESTS_PER_S,
                    query(rate("haproxy_frontend_http_requests_total", "proxy", _FRONT), "{{proxy}}"),
                ),
                Panel(
                    "Answers by status class",
                    "Answers of HAProxy to clients, its own and the gateways'. 5xx here and none at the gateways: no "
                    "gateway is ready. 4xx here and not there: floods of headers or bodies, refused at the edge.",
                    REQUESTS_PER_S,
                    query(rate("haproxy_frontend_http_responses_total", "code", _FRONT, 'code!="1xx"'), "{{code}}"),
                    "stacked",
                ),
                Panel(
                    "Connections",
                    "Open client sessions, and requests that HAProxy queues because no gateway takes one more. A "
                    "queue above 0 for long: more gateway replicas.",
                    COUNT,
                    (
                        Query(f"sum(haproxy_frontend_current_sessions{{{_FRONT}}})", "client sessions"),
                        Query(f"sum(haproxy_backend_current_queue{{{_BACK}}})", "queued"),
                    ),
                ),
                Panel(
                    "Gateways that take requests",
                    "Gateways by HAProxy's health checks; the backup is Ray Serve's own proxy, which answers while "
                    "none runs.",
                    COUNT,
                    (
                        Query(f"sum by (proxy) (haproxy_backend_active_servers{{{_BACK}}})", "{{proxy}} active"),
                        Query(f"sum by (proxy) (haproxy_backend_backup_servers{{{_BACK}}})", "{{proxy}} backup"),
                    ),
                    worry=1,
                    worry_below=True,
                ),
                Panel(
                    "Errors towards the gateways",
                    "Connections to gateways that failed, answers that broke, tries again. Any that stay: a gateway "
                    "hangs or is killed over and over.",
                    EVENTS_PER_S,
                    tuple(
                        Query(f"sum(rate(haproxy_backend_{metric}_total{{{_BACK}}}[$__rate_interval]))", name)
                        for metric, name in (
                            ("connection_errors", "connection errors"),
                            ("response_errors", "broken answers"),
                            ("retry_warnings", "tries again"),
                            ("redispatch_warnings", "sent to another"),
                        )
                    ),
                ),
                Panel(
                    "Bytes",
                    "From and to clients, as HAProxy sees them.",
                    BYTES_PER_S,
                    (
                        Query(f"sum(rate(haproxy_frontend_bytes_in_total{{{_FRONT}}}[$__rate_interval]))", "in"),
                        Query(f"sum(rate(haproxy_frontend_bytes_out_total{{{_FRONT}}}[$__rate_interval]))", "out"),
                    ),
                ),
            ),
        ),
        Row(
            "Relay",
            (
                Panel(
                    "Answers by route",
                    "What the gateways answered, by route of the allow-list. other: everything outside it.",
                    REQUESTS_PER_S,
                    query(rate("galerne_requests_total", "route"), "{{route}}"),
                    "stacked",
                ),
                Panel(
                    "Share of errors that are ours",
                    "Answers of 500 and above or cut off, of all answers, by model. The alert fires above 5% for two "
                    "minutes.",
                    SHARE,
                    query(
                        f"({rate(_ANSWERS, 'model', MODEL, _OURS)} or 0 * {rate(_ANSWERS, 'model', MODEL)})"
                        f" / ({rate(_ANSWERS, 'model', MODEL)} > 0)"
                    ),
                    worry=ERROR_SHARE,
                    alerts=_ERRORS,
                    most=1,
                ),
                Panel(
                    "Failures of engines by kind",
                    "connect: a listed replica is gone; broken: it died in an answer; timeout: it hangs; "
                    "server_error: it answered with one.",
                    EVENTS_PER_S,
                    query(rate("galerne_upstream_errors_total", "kind", MODEL), "{{kind}}"),
                    "stacked",
                    alerts=_ERRORS,
                ),
                Panel(
                    "Streams cut",
                    "Streams that broke off in the middle and ended with an error event: clients got half an answer.",
                    EVENTS_PER_S,
                    query(rate("galerne_streams_cut_total", "model", MODEL)),
                    alerts=("GalerneStreamsCut",),
                ),
                Panel(
                    "Replicas ejected",
                    "Get no new requests of a gateway because they fail, hang or answer no probe; the gateway that sees"
                    " most of them. For long: Ray Serve takes them for healthy.",
                    REPLICAS,
                    query(f"max by (model) (galerne_replicas_ejected{{{MODEL}}})", "{{model}}"),
                    width=THIRD,
                    alerts=("GalerneReplicasEjected",),
                ),
                Panel(
                    "Second tries",
                    "Requests that a replica lost before it answered: sent to another, or not for want of one or of"
                    " budget.",
                    EVENTS_PER_S,
                    query(rate("galerne_retries_total", "end", MODEL), "{{end}}"),
                    "stacked",
                    width=THIRD,
                ),
                Panel(
                    "Hedges",
                    "Requests that a second replica got because the first was late (faults.hedge_after_s), by whose"
                    " answer was relayed. Mostly first: it is set too short; neither: both failed, or clients left.",
                    EVENTS_PER_S,
                    query(rate("galerne_hedges_total", "won", MODEL), "{{won}}"),
                    "stacked",
                    width=THIRD,
                ),
                Panel(
                    "Requests shed by reason",
                    "Answered 503 because a gateway has too many requests, a late event loop or too much memory.",
                    EVENTS_PER_S,
                    query(rate("galerne_requests_shed_total", "reason"), "{{reason}}"),
                    "stacked",
                    alerts=("GalerneShedding",),
                ),
                Panel(
                    "Readers cut off",
                    "Clients that took nothing of their answer for gateway.faults.slow_reader_s.",
                    EVENTS_PER_S,
                    query(rate("galerne_slow_readers_total", "model", MODEL)),
                ),
                Panel(
                    "In flight by gateway",
                    "Requests under way in each gateway. Near gateway.max_ongoing_requests it answers 503; far apart,"
                    " HAProxy does not spread them.",
                    REQUESTS,
                    query(f"sum by (instance) (galerne_requests_in_flight{{{MODEL}}})", "{{instance}}"),
                ),
                Panel(
                    "Time of refusals and own answers",
                    "p95 of the gateways' answers without an engine (model none: refusals, lists, health). "
                    "Milliseconds; more means a gateway without processor time.",
                    SECONDS,
                    query(quantile(0.95, "galerne_request_seconds", "route", 'model="none"'), "{{route}}"),
                ),
            ),
        ),
        Row(
            "Configuration",
            (
                Panel(
                    "Configuration in force",
                    "1: a gateway follows the configuration file as it stands; 0: it cannot use it and goes on with an"
                    " older state, in which a revoked key is still good.",
                    COUNT,
                    query("galerne_config_reload_ok", "{{instance}}"),
                    worry=1,
                    worry_below=True,
                    alerts=("GalerneConfigReloadFails",),
                    most=1,
                ),
                Panel(
                    "States of the configuration",
                    "How many different states of tenants and keys the gateways know. More than 1 for longer than a"
                    " minute or two: a change does not reach all of them.",
                    COUNT,
                    query("count(count by (revision) (galerne_config_info))", "states"),
                    alerts=("GalerneConfigDiffers",),
                ),
                Panel(
                    "Sections that wait",
                    "Sections of the file that changed and need a restart or a rollout. Tenants, keys and"
                    " administrators change live.",
                    COUNT,
                    query("max(galerne_config_sections_waiting)", "sections"),
                    alerts=("GalerneConfigWaits",),
                ),
                Panel(
                    "Age of issuers' keys",
                    "Since an issuer of tokens (oidc) last gave its keys. none: no issuer is configured.",
                    SECONDS,
                    query(
                        "max by (issuer) (time() - galerne_issuer_keys_timestamp_seconds)"
                        ' or label_replace(vector(0), "issuer", "none", "", "")',
                        "{{issuer}}",
                    ),
                    alerts=("GalerneIssuerKeysOld",),
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Panel(
                    "Event loop lag",
                    "How late a gateway's timers are, p99: every chunk of every stream waits as long. Over 0.1 s for "
                    "minutes: more gateway replicas or processors for them.",
                    SECONDS,
                    query(quantile(0.99, "galerne_event_loop_lag_seconds", "instance"), "{{instance}}"),
                    worry=_LATE_S,
                ),
                Panel(
                    "Memory",
                    "Resident memory of each gateway; idle it is below 250 MB. Growth that does not follow requests "
                    "in flight or held bytes is a leak: restart it and report.",
                    BYTES,
                    (
                        Query(f"process_resident_memory_bytes{{{_PROCESS}}}", "{{instance}}"),
                        Query(f"sum by (instance) (galerne_held_bytes{{{MODEL}}})", "{{instance}} held bodies"),
                    ),
                    worry=_MUCH_MEMORY,
                ),
                Panel(
                    "Processor time",
                    "Processors that each gateway uses. It is one event loop: at 1 it is full, whatever the node has.",
                    SHARE,
                    query(f"rate(process_cpu_seconds_total{{{_PROCESS}}}[$__rate_interval])", "{{instance}}"),
                    worry=0.9,
                ),
                Panel(
                    "Open files",
                    "Share of the file descriptors a gateway may open, sockets among them. Two a stream; near 1 "
                    "connections fail.",
                    SHARE,
                    query(f"process_open_fds{{{_PROCESS}}} / process_max_fds{{{_PROCESS}}}", "{{instance}}"),
                    worry=0.8,
                    most=1,
                ),
                Panel(
                    "Usage not in the database",
                    "Rows of usage that wait on each gateway's machine. They fall to 0 within seconds; a line that "
                    "grows: the ledger's database is slow or away, and beyond ledger.spill_bytes usage is lost.",
                    COUNT,
                    (
                        Query("galerne_ledger_rows_behind", "{{instance}} waiting"),
                        Query(
                            'increase(galerne_ledger_rows_total{state="dropped"}[$__rate_interval])',
                            "{{instance}} lost",
                        ),
                    ),
                    width=24,
                    alerts=("GalerneLedgerBehind", "GalerneUsageLost"),
                ),
                Panel(
                    "Versions",
                    "Gateways by the version they run. Two for longer than a rollout: it is stuck.",
                    COUNT,
                    query("count by (version) (galerne_build_info)", "{{version}}"),
                    "bars",
                    decimals=0,
                ),
                Panel(
                    "HAProxy idle",
                    "Share of its time that HAProxy waits. Below 0.2 it is the bottleneck: give the node's proxy more"
                    " threads.",
                    SHARE,
                    query("haproxy_process_idle_time_percent / 100", "{{instance}}"),
                    worry=0.2,
                    worry_below=True,
                    most=1,
                ),
            ),
        ),
    ),
)
