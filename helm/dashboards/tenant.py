"""What each tenant uses, how it is served beside the others, and what it is refused."""

from __future__ import annotations

from helm.dashboards.panels import (
    BYTES_PER_S,
    COUNT,
    EVENTS_PER_S,
    MODEL,
    REQUESTS,
    REQUESTS_PER_S,
    SECONDS,
    SHARE,
    TENANT,
    THIRD,
    TOKENS,
    TOKENS_PER_S,
    Dashboard,
    Panel,
    Query,
    Row,
    grown,
    quantile,
    query,
    rate,
)
from serving.metrics.alerts import BUDGET
from serving.metrics.rules import ITL_MISSED, TTFT_MISSED

_BOTH = (MODEL, TENANT)
_ACCEPTED = "galerne_requests_accepted_total"


def _missed(counter: str, what: str, target: str) -> Panel:
    missed = rate(counter, "tenant", *_BOTH, 'met="false"')
    return Panel(
        f"{what} too late, by tenant",
        f"Share of a tenant's streamed answers that missed slo.{target}_p95_s. One tenant far above the others is "
        "served unfairly, or asks for more than the rest (longer prompts).",
        SHARE,
        query(f"{missed} / ({rate(counter, 'tenant', *_BOTH)} > 0)", "{{tenant}}"),
        worry=BUDGET,
        alerts=("GalerneSloBurn",),
        most=1,
    )


DASHBOARD = Dashboard(
    "tenant",
    "Galerne / Tenant",
    "Usage, service and refusals by tenant.",
    (
        Row(
            "Usage",
            (
                Panel(
                    "Requests accepted",
                    "Requests that passed the key and the bounds, by tenant. A jump of one tenant explains "
                    "everybody's queue: bound it, or raise replicas.max.",
                    REQUESTS_PER_S,
                    query(rate(_ACCEPTED, "tenant", *_BOTH), "{{tenant}}"),
                    "stacked",
                    alerts=("GalerneScaleAtMax",),
                ),
                Panel(
                    "In flight",
                    "Accepted requests that have not ended, by tenant. A tenant whose line only grows holds streams "
                    "open or is queued.",
                    REQUESTS,
                    query(f"sum by (tenant) (galerne_requests_in_flight{{{', '.join(_BOTH)}}})", "{{tenant}}"),
                    "stacked",
                ),
                Panel(
                    "Share of the traffic",
                    "Each tenant's part of all accepted requests. It shows demand; what demand gets is in the next "
                    "row.",
                    SHARE,
                    query(
                        f"{rate(_ACCEPTED, 'tenant', *_BOTH)} / on () group_left () "
                        f"(sum(rate({_ACCEPTED}{{{MODEL}}}[$__rate_interval])) > 0)",
                        "{{tenant}}",
                    ),
                    most=1,
                ),
                Panel(
                    "Tokens",
                    "Tokens of requests that ended, as the ledger has them: prompt (cached ones among them) and "
                    "completion. A tenant whose completion tokens grow takes the engines' time, whatever its number "
                    "of requests.",
                    TOKENS_PER_S,
                    query(rate("galerne_tokens_total", "tenant, kind", *_BOTH), "{{tenant}} {{kind}}"),
                ),
                Panel(
                    "Tokens in the time shown",
                    "The same as a sum, by tenant and model: what a bill is made of. The bill itself comes from the "
                    "ledger (galerne usage), which also has what a gateway that ended had counted.",
                    TOKENS,
                    query(
                        grown("galerne_tokens_total", "tenant, model, kind", *_BOTH), "{{tenant}} {{model}} {{kind}}"
                    ),
                    "bars",
                    decimals=0,
                ),
                Panel(
                    "Bytes",
                    "Bytes of request bodies, and of answers that ended. Much more of them than tokens would make: "
                    "log probabilities, or bodies that are refused.",
                    BYTES_PER_S,
                    (
                        Query(rate("galerne_request_bytes_total", "tenant", *_BOTH), "{{tenant}} in"),
                        Query(rate("galerne_response_bytes_total", "tenant", *_BOTH), "{{tenant}} out"),
                    ),
                ),
                Panel(
                    "Requests by tenant and model",
                    "Accepted requests in the time shown: what a tenant is billed by, where requests are.",
                    COUNT,
                    query(grown(_ACCEPTED, "tenant, model", *_BOTH), "{{tenant}} {{model}}"),
                    "bars",
                    decimals=0,
                ),
                Panel(
                    "Requests by outcome",
                    "How a tenant's accepted requests ended. cancelled: its clients leave, often because of a time "
                    "limit of theirs that is too short; failed and rejected are ours.",
                    REQUESTS_PER_S,
                    query(rate("galerne_requests_finished_total", "tenant, outcome", *_BOTH), "{{tenant}} {{outcome}}"),
                    "stacked",
                    alerts=("GalerneGatewayErrors",),
                ),
            ),
        ),
        Row(
            "Service",
            (
                Panel(
                    "Time to first token by tenant",
                    "p95 from a request's last byte to the first byte of its answer. Fair service keeps the lines of "
                    "tenants with like prompts together, whoever sends most.",
                    SECONDS,
                    query(quantile(0.95, "galerne_time_to_first_token_seconds", "tenant", *_BOTH), "{{tenant}}"),
                    alerts=("GalerneSloBurn",),
                ),
                _missed(TTFT_MISSED, "First token", "ttft"),
                _missed(ITL_MISSED, "Tokens", "itl"),
                Panel(
                    "Service by tenant",
                    "Tokens read, and twice those written, a second: what the queue keeps fair. While tenants "
                    "wait, their "
                    "lines stand to each other as their weights do.",
                    TOKENS_PER_S,
                    query(rate("galerne_service_tokens_total", "tenant", *_BOTH), "{{tenant}}"),
                    "stacked",
                ),
                Panel(
                    "Waiting, by tenant",
                    "Requests in the gateways' queues, each tenant's as part of the places it may have in one of them; "
                    "at 1 its further requests hear 429. That is one tenant's doing as long as the others' "
                    "lines are low.",
                    SHARE,
                    query(f"max by (tenant) (galerne_queue_bound_part{{{', '.join(_BOTH)}}})", "{{tenant}}"),
                    worry=1,
                    alerts=("GalerneTenantQueueFull",),
                    most=1,
                    width=THIRD,
                ),
                Panel(
                    "Wait for a turn, p95",
                    "How long those waited that had to: for a replica, or for room on one; 0: nobody had to. A tenant "
                    "that sends little waits little, whatever others send.",
                    SECONDS,
                    query(
                        f"({quantile(0.95, 'galerne_hold_seconds', 'tenant', *_BOTH)})"
                        f" or 0 * {rate('galerne_requests_accepted_total', 'tenant', *_BOTH)}",
                        "{{tenant}}",
                    ),
                    alerts=("GalerneSaturated",),
                    width=THIRD,
                ),
                Panel(
                    "Place in the queue, p95",
                    "How many of its tenant's own requests a request that had to wait found before it, itself "
                    "included; 0: nobody had to wait. A high line is that tenant's own burst.",
                    REQUESTS,
                    query(
                        f"({quantile(0.95, 'galerne_queue_place', 'tenant', *_BOTH)})"
                        f" or 0 * {rate('galerne_requests_accepted_total', 'tenant', *_BOTH)}",
                        "{{tenant}}",
                    ),
                    alerts=("GalerneTenantQueueFull",),
                    width=THIRD,
                ),
                Panel(
                    "Quotas used",
                    "Part of each limit that is used, as of the tenant's newest request: requests and tokens of "
                    "a minute, "
                    "requests at once, the day's and the month's budget. At 1 requests hear 429.",
                    SHARE,
                    query(f"max by (tenant, limit) (galerne_quota_use{{{TENANT}}})", "{{tenant}} {{limit}}"),
                    worry=1,
                    alerts=("GalerneLimitsStoreDown",),
                    most=1,
                ),
                Panel(
                    "Waits by their end",
                    "Requests that had to wait for a replica or for room on one, by how it ended. released: "
                    "served; late: "
                    "over hold.wait_s; full and displaced: the hold's bound was reached, and the tenant with "
                    "most of it "
                    "gave way; left: the client went.",
                    EVENTS_PER_S,
                    query(rate("galerne_holds_total", "tenant, end", *_BOTH), "{{tenant}} {{end}}"),
                    "stacked",
                    alerts=("GalerneSaturated",),
                ),
            ),
        ),
        Row(
            "Refusals",
            (
                Panel(
                    "Refusals by quota",
                    "Requests over a limit: requests or tokens of a minute, requests at once, a day's or "
                    "month's budget; "
                    "store: limits could not be checked. Steady ones are a client without back-off.",
                    EVENTS_PER_S,
                    query(rate("galerne_quota_refusals_total", "tenant, limit", TENANT), "{{tenant}} {{limit}}"),
                    "stacked",
                    width=24,
                ),
                Panel(
                    "Refusals by reason",
                    "Requests that the gateway answered with an error of its own, by the error's code (tenant none: "
                    "no valid key). model_not_ready and overloaded are capacity; invalid_api_key in numbers is an "
                    "expired key or a guesser; all others are the client's request.",
                    EVENTS_PER_S,
                    query(rate("galerne_requests_refused_total", "tenant, code", TENANT), "{{tenant}} {{code}}"),
                    "stacked",
                ),
                Panel(
                    "Refusals in the time shown",
                    "The same as a sum: what to tell a tenant who asks why.",
                    COUNT,
                    query(grown("galerne_requests_refused_total", "tenant, code", TENANT), "{{tenant}} {{code}}"),
                    "bars",
                    decimals=0,
                ),
                Panel(
                    "Answers that are errors",
                    "Answers of 400 and above by status, the engines' own included; cut: broken off in the middle.",
                    REQUESTS_PER_S,
                    query(
                        rate("galerne_requests_total", "tenant, status", TENANT, 'status=~"[45]..|cut"'),
                        "{{tenant}} {{status}}",
                    ),
                    "stacked",
                    width=24,
                    alerts=("GalerneGatewayErrors",),
                ),
            ),
        ),
    ),
    by_tenant=True,
)
