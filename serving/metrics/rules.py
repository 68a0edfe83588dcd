"""Prometheus' recording rules: what a scaling decision is made from, per model, and the figures of the SLO alerts.

One source: `groups()` is in the rule file of every installation (`galerne rules` prints it). Scrapes come every 5 s,
as often as a decision is made. Rates look back 30 s: six samples, so a lost scrape or two leave a rate standing, and
half of a change in load shows after 15 s, less than a replica takes to start. Token means look back two minutes,
because a workload's shape changes slower than its rate and few requests make a poor mean; where no request ended in
them, the last hour's mean stands.

A sum over gateways or replicas of which one was not scraped is too small, and a rate without its newest samples
too low. So a signal is computed only while the newest scrape of every target behind it succeeded and is recent; else
the rule repeats what it recorded last, and `model:galerne_sampled:timestamp_seconds` stands still. That timestamp is
recorded, not its age: whoever reads it subtracts it from Prometheus' `time()`, and sees a stopped scrape, a target that
fails and rules that are no longer evaluated alike. A target that leaves is waited for until Prometheus forgets it,
about 11 s after it left the list: ages of 15 s are ordinary then, and 10 s at any other time.

Releases that one Prometheus watches are never added up (`serving.metrics.release`): every rule groups by the label of
the release and matches by it, and `groups(release)` are the rules of one release alone, as its chart installs them.

Counters of a new replica start anywhere (an engine has answered its warm-up by then): `rate` takes differences only.
The gateway's counters exist from its start with 0, because `rate` does not see how a series begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from serving.metrics.release import ANY, LABEL, matcher, scoped

SCRAPE_S: Final = 5
RATE_WINDOW_S: Final = 30
MEAN_WINDOW_S: Final = 120
REMEMBERED_MEAN_S: Final = 3600
SLOW_INTERVAL_S: Final = 30
# Prometheus' own bound: a rate whose newest sample is older is no longer extrapolated to now.
FRESH_S: Final = SCRAPE_S * 1.1
# Prometheus scrapes every target of its list this often, and records `up` for one that fails too. A series that is so
# much older than the newest is of a target that left while Prometheus was down: nothing ends it for five minutes. Far
# above the interval, so that one of 15 s, on a Prometheus of somebody else, only ages the signals.
LISTED_S: Final = 30
QUANTILE: Final = 0.95
# Windows of the multi-window burn rates.
BURN_WINDOWS: Final = ("5m", "30m", "1h", "6h", "3d")

GATEWAY_JOB: Final = "galerne-gateway"
ENGINE_JOB: Final = "vllm"
GATEWAYS_SAMPLED: Final = "galerne:gateways_sampled:timestamp_seconds"
SAMPLED: Final = "model:galerne_sampled:timestamp_seconds"
# What a model is known by: one of another release is another.
MODEL: Final = f"{LABEL}, model"
COMPLETE: Final = "model:galerne_samples_complete:bool"
READY: Final = "model:galerne_replicas_ready:max"

# Whose samples a signal is made of, the value of SAMPLED's label `source`.
Source = Literal["gateway", "engine"]
BOTH: Final[tuple[Source, ...]] = ("gateway", "engine")


@dataclass(frozen=True, slots=True)
class Rule:
    """One recording rule."""

    record: str
    expr: str
    labels: tuple[tuple[str, str], ...] = ()

    def document(self, only: str = ANY) -> dict[str, Any]:
        """As Prometheus' rule file has it, for the releases that a matcher chooses."""
        found: dict[str, Any] = {"record": self.record, "expr": scoped(self.expr, only)}
        return found | ({"labels": dict(self.labels)} if self.labels else {})


@dataclass(frozen=True, slots=True)
class SignalRule:
    """The rule of one field of `serving.autoscaling.snapshot.Snapshot`; `sources`: whose samples it needs."""

    field: str
    record: str
    sources: tuple[Source, ...]
    expr: str

    def rule(self) -> Rule:
        """Computed from complete samples, else repeated."""
        complete = f'min by ({MODEL}) ({COMPLETE}{{source=~"{"|".join(self.sources)}"}})'
        return Rule(
            self.record,
            f"(({self.expr}) and on ({MODEL}) ({complete} == 1)) or ({self.record} and on ({MODEL}) ({complete} == 0))",
        )


def _rate(metric: str, window: str = f"{RATE_WINDOW_S}s", by: str = MODEL) -> str:
    return f"sum by ({by}) (rate({metric}[{window}]))"


def _mean(tokens: str, window_s: int) -> str:
    """Tokens of requests that ended, a request of the gateway: n, best_of and batches are one there, several here."""
    window = f"{window_s}s"
    return f"({_rate(tokens + '_sum', window)} > 0) / ({_ended(window)} > 0)"


def _means(tokens: str) -> str:
    return f"{_mean(tokens, MEAN_WINDOW_S)} or {_mean(tokens, REMEMBERED_MEAN_S)}"


def _quantile(histogram: str) -> str:
    # No observation in the window is NaN, which no comparison holds for.
    return f"histogram_quantile({QUANTILE}, {_rate(histogram + '_bucket', by=f'{MODEL}, le')}) >= 0"


def _missed(counter: str, window: str = f"{RATE_WINDOW_S}s") -> str:
    missed = counter + '{met="false"}'
    return f"{_rate(missed, window)} / ({_rate(counter, window)} > 0)"


def _no_output() -> str:
    """Models whose answers have no tokens: embeddings."""
    window = f"{REMEMBERED_MEAN_S}s"
    return f"({_rate('vllm:request_generation_tokens_sum', window)} == 0) and on ({MODEL}) ({_ended(window)} > 0)"


def _ended(window: str) -> str:
    return _rate('galerne_requests_finished_total{outcome="completed"}', window)


def _listed(job: str) -> str:
    """When each target of Prometheus' list was scraped last."""
    newest = f'max by ({LABEL}) (timestamp(up{{job=~"{GATEWAY_JOB}|{ENGINE_JOB}"}}))'
    return f'(timestamp(up{{job="{job}"}}) > on ({LABEL}) group_left () ({newest} - {LISTED_S}))'


def _of_listed(metric: str, job: str) -> str:
    """A gauge of those targets alone."""
    return f"({metric} and on ({LABEL}, job, instance) {_listed(job)})"


def _on_gateways(metric: str) -> str:
    return _of_listed(metric, GATEWAY_JOB)


def _on_engines(metric: str) -> str:
    """A sum over replicas; 0 where the gateways know of none."""
    return f"sum by ({MODEL}) {_of_listed(metric, ENGINE_JOB)} or on ({MODEL}) ({READY} == 0)"


TTFT_MISSED: Final = "galerne_slo_ttft_requests_total"
ITL_MISSED: Final = "galerne_slo_itl_requests_total"

SIGNALS: Final = (
    SignalRule(
        "arrivals_rps", "model:galerne_arrivals:rate30s", ("gateway",), _rate("galerne_requests_accepted_total")
    ),
    SignalRule(
        "prompt_tokens",
        "model:galerne_prompt_tokens_computed:mean2m",
        BOTH,
        _means("vllm:request_prefill_kv_computed_tokens"),
    ),
    SignalRule(
        "output_tokens",
        "model:galerne_output_tokens:mean2m",
        BOTH,
        f"{_means('vllm:request_generation_tokens')} or {_no_output()}",
    ),
    SignalRule(
        "held", "model:galerne_held:sum", ("gateway",), f"sum by ({MODEL}) {_on_gateways('galerne_requests_held')}"
    ),
    SignalRule(
        "held_oldest_s",
        "model:galerne_held_oldest_seconds:max",
        ("gateway",),
        f"max by ({MODEL}) {_on_gateways('galerne_held_oldest_seconds')}",
    ),
    SignalRule("running", "model:galerne_running:sum", ("engine",), _on_engines("vllm:num_requests_running")),
    SignalRule("waiting", "model:galerne_waiting:sum", ("engine",), _on_engines("vllm:num_requests_waiting")),
    SignalRule(
        "kv_use",
        "model:galerne_kv_use:avg",
        ("engine",),
        f"avg by ({MODEL}) {_of_listed('vllm:kv_cache_usage_perc', ENGINE_JOB)}",
    ),
    SignalRule(
        "ttft_p95_s",
        "model:galerne_ttft_seconds:p95_30s",
        ("gateway",),
        _quantile("galerne_time_to_first_token_seconds"),
    ),
    SignalRule(
        "itl_p95_s", "model:galerne_itl_seconds:p95_30s", ("gateway",), _quantile("galerne_inter_chunk_seconds")
    ),
    SignalRule("ttft_missed", "model:galerne_ttft_missed:ratio30s", ("gateway",), _missed(TTFT_MISSED)),
    SignalRule("itl_missed", "model:galerne_itl_missed:ratio30s", ("gateway",), _missed(ITL_MISSED)),
)


def _sampled() -> tuple[Rule, ...]:
    """When the oldest of the newest samples was taken, and whether they are complete and recent; by source."""
    scraped, up = _listed(GATEWAY_JOB), _of_listed(f'up{{job="{GATEWAY_JOB}"}}', GATEWAY_JOB)
    least, is_up = f"min by ({LABEL}) ({scraped})", f"min by ({LABEL}) ({up})"
    gateways = (
        f"({least} and on ({LABEL}) ({is_up} == 1))"
        f" or on ({LABEL}) ({GATEWAYS_SAMPLED} and on ({LABEL}) count by ({LABEL}) ({up}))"
    )
    ready = _on_gateways("galerne_replicas_ready")
    models = f"(group by ({MODEL}) {ready} or group by ({MODEL}) ({READY}))"
    gateway, engine = f'{SAMPLED}{{source="gateway"}}', f'{SAMPLED}{{source="engine"}}'
    recent = f"(time() - max by ({MODEL}) (%s) < bool {FRESH_S:g})"
    engines_scraped, engines_up = _listed(ENGINE_JOB), _of_listed(f'up{{job="{ENGINE_JOB}"}}', ENGINE_JOB)
    engines = (
        f"(min by ({MODEL}) {engines_scraped} and on ({MODEL}) (min by ({MODEL}) {engines_up} == 1))"
        f" or on ({MODEL}) (max by ({MODEL}) ({engine}) and on ({MODEL}) count by ({MODEL}) {engines_up})"
        f" or on ({MODEL}) (max by ({MODEL}) ({gateway}) and on ({MODEL}) ({READY} == 0))"
    )
    return (
        Rule(GATEWAYS_SAMPLED, gateways),
        Rule(SAMPLED, f"{models} * on ({LABEL}) group_left () {GATEWAYS_SAMPLED}", (("source", "gateway"),)),
        Rule(COMPLETE, f"{recent % gateway} * on ({LABEL}) group_left () {is_up}", (("source", "gateway"),)),
        SignalRule("", READY, ("gateway",), f"max by ({MODEL}) {ready}").rule(),
        Rule(SAMPLED, engines, (("source", "engine"),)),
        Rule(
            COMPLETE,
            f"{recent % engine} * on ({MODEL}) min by ({MODEL}) {engines_up} or on ({MODEL}) {recent % engine}",
            (("source", "engine"),),
        ),
    )


def burn_record(window: str) -> str:
    """The rule of the share of missed events over a window, by model and objective."""
    return f"model:galerne_slo_missed:ratio_rate{window}"


def _burns() -> tuple[Rule, ...]:
    return tuple(
        Rule(burn_record(window), _missed(counter, window), (("objective", objective),))
        for objective, counter in (("ttft", TTFT_MISSED), ("itl", ITL_MISSED))
        for window in BURN_WINDOWS
    )


RULES: Final[tuple[Rule, ...]] = (*_sampled(), *(signal.rule() for signal in SIGNALS))
SLOW_RULES: Final[tuple[Rule, ...]] = _burns()


def chosen(release: str | None) -> str:
    """The matcher of one release, or of every one, each by itself."""
    return ANY if release is None else matcher(release)


def groups(release: str | None = None) -> list[dict[str, Any]]:
    """The groups of the rule file, for one release or every one; rules of a group see what those before recorded."""
    only = chosen(release)
    return [_group("galerne-signals", SCRAPE_S, RULES, only), _group("galerne-slo", SLOW_INTERVAL_S, SLOW_RULES, only)]


def _group(name: str, interval_s: int, rules: Sequence[Rule], only: str) -> dict[str, Any]:
    return {"name": name, "interval": f"{interval_s}s", "rules": [rule.document(only) for rule in rules]}
