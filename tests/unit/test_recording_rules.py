"""What the recording rules make of gateways and replicas that fail, come and go; computed by promtool."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.metrics import rules
from serving.metrics.release import LABEL, matcher, scoped
from tests.system_parts import required

M = 'model="m"'
ARRIVALS, RUNNING, KV = "model:galerne_arrivals:rate30s", "model:galerne_running:sum", "model:galerne_kv_use:avg"
PROMPT, OUTPUT = "model:galerne_prompt_tokens_computed:mean2m", "model:galerne_output_tokens:mean2m"
TTFT, TTFT_MISSED = "model:galerne_ttft_seconds:p95_30s", "model:galerne_ttft_missed:ratio30s"


def gateway(name: str, up: str, accepted: str, ready: str = "1x200", **more: str) -> dict[str, str]:
    """One gateway's series, a sample every 5 s; requests of one tenant."""
    at = f'job="galerne-gateway", instance="{name}"'
    return {
        f"up{{{at}}}": up,
        f'galerne_requests_accepted_total{{{at}, {M}, tenant="t"}}': accepted,
        f"galerne_replicas_ready{{{at}, {M}}}": ready,
    } | {metric % f"{at}, {M}": values for metric, values in more.items()}


def engine(name: str, up: str, running: str, **more: str) -> dict[str, str]:
    """One replica's series."""
    at = f'job="vllm", instance="{name}", {M}, model_name="m"'
    return {
        f"up{{{at}}}".replace(', model_name="m"', ""): up,
        f"vllm:num_requests_running{{{at}}}": running,
    } | {metric % at: values for metric, values in more.items()}


def age(source: str) -> str:
    return f'time() - model:galerne_sampled:timestamp_seconds{{source="{source}"}}'


@dataclass(frozen=True)
class Case:
    """Series, and by expression what it is at so many seconds; None: it has no value."""

    name: str
    series: dict[str, str]
    expected: dict[tuple[str, int], float | None]


FINISHED = 'galerne_requests_finished_total{%s, tenant="t", outcome="completed"}'
COMPUTED, GENERATED = "vllm:request_prefill_kv_computed_tokens_sum{%s}", "vllm:request_generation_tokens_sum{%s}"
BUCKETS = {
    'galerne_time_to_first_token_seconds_bucket{%s, tenant="t", le="0.5"}': "0+10x60 600x200",
    'galerne_time_to_first_token_seconds_bucket{%s, tenant="t", le="1.0"}': "0+20x60 1200x200",
    'galerne_time_to_first_token_seconds_bucket{%s, tenant="t", le="+Inf"}': "0+20x60 1200x200",
    'galerne_slo_ttft_requests_total{%s, tenant="t", met="true"}': "0+15x60 900x200",
    'galerne_slo_ttft_requests_total{%s, tenant="t", met="false"}': "0+5x60 300x200",
}

CASES = (
    Case(
        "two gateways and two replicas are added up",
        gateway("a", "1x200", "0+10x200", **{FINISHED: "0+10x200"})
        | gateway("b", "1x200", "0+5x200", **{FINISHED: "0+5x200"})
        | engine("x", "1x200", "3x200", **{"vllm:kv_cache_usage_perc{%s}": "0.2x200", COMPUTED: "0+1000x200", GENERATED: "0+300x200"})
        | engine("y", "1x200", "4x200", **{"vllm:kv_cache_usage_perc{%s}": "0.4x200", COMPUTED: "0+500x200", GENERATED: "0+300x200"}),
        {
            (ARRIVALS, 300): 3.0,
            (RUNNING, 300): 7.0,
            (KV, 300): 0.3,
            # 1500 computed and 600 generated tokens over 15 requests.
            (PROMPT, 300): 100.0,
            (OUTPUT, 300): 40.0,
            ("model:galerne_replicas_ready:max", 300): 1.0,
            (age("gateway"), 300): 0.0,
            (age("engine"), 300): 0.0,
        },
    ),
    Case(
        "a gateway whose scrape fails ages the sum, and does not shrink it",
        gateway("a", "1x200", "0+10x200") | gateway("b", "1x40 0x20 1x100", "0+10x40 stale _x18 610+10x100"),
        # The last complete samples are of 200 s.
        {(ARRIVALS, 200): 4.0, (ARRIVALS, 210): 4.0, (ARRIVALS, 290): 4.0, (age("gateway"), 290): 90.0, (age("gateway"), 400): 0.0, (ARRIVALS, 400): 4.0},
    ),
    Case(
        "a replica whose scrape fails does not shrink the sum either",
        gateway("a", "1x200", "0x200") | engine("x", "1x200", "3x200") | engine("y", "1x40 0x100", "4x40 stale _x100"),
        {(RUNNING, 300): 7.0, (age("engine"), 300): 100.0, (age("gateway"), 300): 0.0},
    ),
    Case(
        "a Prometheus that stops scraping shows as age",
        gateway("a", "1x40 _x100", "0+10x40 _x100"),
        {(ARRIVALS, 260): 2.0, (age("gateway"), 260): 60.0},
    ),
    Case(
        "a gateway that was restarted counts from 0 again",
        gateway("a", "1x200", "5000+10x40 10+10x160"),
        {(ARRIVALS, 215): 2.0, (ARRIVALS, 300): 2.0},
    ),
    Case(
        "a new gateway's past is no arrival",
        gateway("a", "1x200", "0+10x200") | gateway("b", "_x40 1x160", "_x40 9000x160"),
        {(ARRIVALS, 215): 2.0, (ARRIVALS, 240): 2.0},
    ),
    Case(
        "a new replica's warm-up is no request's tokens",
        gateway("a", "1x200", "0+10x200", **{FINISHED: "0+10x200"})
        | engine("x", "1x200", "1x200", **{COMPUTED: "0+1000x200"})
        | engine("y", "_x40 1x160", "_x40 0x160", **{COMPUTED: "_x40 77777x160"}),
        {(PROMPT, 230): 100.0},
    ),
    Case(
        "a replica that left is forgotten",
        gateway("a", "1x200", "0x200") | engine("x", "1x200", "3x200") | engine("y", "1x40 stale", "4x40 stale"),
        {(RUNNING, 200): 7.0, (RUNNING, 210): 3.0, (age("engine"), 210): 0.0},
    ),
    Case(
        "targets that left while Prometheus was down are not waited for",
        gateway("a", "1x200", "0x200") | gateway("b", "1x40 _x100", "0x40 _x100", **{'galerne_requests_held{%s, tenant="t"}': "5x40 _x100"})
        | engine("x", "1x200", "3x200") | engine("y", "1x40 _x100", "4x40 _x100"),
        {
            (RUNNING, 240): 3.0,
            (age("engine"), 240): 0.0,
            (age("gateway"), 240): 0.0,
            ("model:galerne_held:sum", 200): 5.0,
            ("model:galerne_held:sum", 240): None,
        },
    ),
    Case(
        "no traffic: no quantile and no share, and the last hour's mean",
        gateway("a", "1x300", "0+20x60 1200x240", **(BUCKETS | {FINISHED: "0+20x60 1200x240"}))
        | engine("x", "1x300", "0x300", **{COMPUTED: "0+1000x60 60000x240"}),
        {
            (TTFT, 290): 0.95,
            (TTFT_MISSED, 290): 0.25,
            (TTFT, 340): None,
            (TTFT_MISSED, 340): None,
            (ARRIVALS, 340): 0.0,
            (PROMPT, 290): 50.0,
            (PROMPT, 600): 50.0,
        },
    ),
    Case(
        "a model without a replica runs nothing",
        gateway("a", "1x200", "0x200", ready="0x200"),
        {(RUNNING, 100): 0.0, (KV, 100): None, (age("engine"), 100): 0.0},
    ),
    Case(
        "a replica that is ready and not scraped yet: nobody knows",
        gateway("a", "1x200", "0x200", ready="1x200"),
        {(RUNNING, 100): None, (age("engine"), 100): None},
    ),
    Case(
        "answers without tokens",
        gateway("a", "1x200", "0+10x200", **{FINISHED: "0+10x200"})
        | engine("x", "1x200", "1x200", **{COMPUTED: "0+1000x200", GENERATED: "0x200"}),
        {(OUTPUT, 300): 0.0},
    ),
)  # fmt: skip


OURS, OTHERS = "prod/galerne", "test/galerne"


def of_release(release: str, series: dict[str, str]) -> dict[str, str]:
    """The series as a release's targets have them."""
    return {name.replace("{", f'{{{LABEL}="{release}", '): values for name, values in series.items()}


def judged(series: dict[str, str], expected: dict[tuple[str, int], float | None]) -> dict[str, Any]:
    """One of promtool's tests; values are summed, so that nothing more than what is expected may be there."""
    return {
        "interval": "5s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round(sum({expr}), 0.01)",
                "eval_time": f"{at}s",
                "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
            }
            for (expr, at), value in expected.items()
        ],
    }


def run(tests: list[dict[str, Any]], tmp_path: Path, release: str | None = None) -> None:
    promtool = required("promtool")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": rules.groups(release)}))
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "5s", "tests": tests}
    test = tmp_path / "test.yaml"
    test.write_text(yaml.safe_dump(document))
    done = subprocess.run([promtool, "test", "rules", test], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_rules(case: Case, tmp_path: Path) -> None:
    # Alone, without a name; and beside another release that has the same model and troubles of its own.
    other = CASES[(CASES.index(case) + 1) % len(CASES)]
    mine = {(scoped(expr, matcher(OURS)), at): value for (expr, at), value in case.expected.items()}
    beside = of_release(OURS, case.series) | of_release(OTHERS, other.series)
    run([judged(case.series, case.expected), judged(beside, mine)], tmp_path)


HELD_50 = gateway("a", "1x200", "0+50x200", **{'galerne_requests_held{%s, tenant="t"}': "50x200"})
HELD_0 = gateway("b", "1x200", "0x200", **{'galerne_requests_held{%s, tenant="t"}': "0x200"})


def test_two_releases_with_a_model_of_the_same_name_stay_two(tmp_path: Path) -> None:
    held = "model:galerne_held:sum"
    expected: dict[tuple[str, int], float | None] = {
        (f"count({held})", 300): 2.0,
        (f"{held}{{{matcher('prod/galerne')}}}", 300): 50.0,
        (f"{held}{{{matcher('test/galerne')}}}", 300): 0.0,
        (f"{ARRIVALS}{{{matcher('prod/galerne')}}}", 300): 10.0,
        (f"{ARRIVALS}{{{matcher('test/galerne')}}}", 300): 0.0,
    }
    run([judged(of_release(OURS, HELD_50) | of_release(OTHERS, HELD_0), expected)], tmp_path)


def test_the_rules_of_one_release_leave_the_other_alone(tmp_path: Path) -> None:
    # Each chart installs its own: nothing is recorded twice.
    records = "|".join(rule.record for rule in (*rules.RULES, *rules.SLOW_RULES))
    expected: dict[tuple[str, int], float | None] = {
        (f'count({{__name__=~"{records}",{matcher(OTHERS)}}})', 300): None,
        (f"model:galerne_held:sum{{{matcher(OURS)}}}", 300): 50.0,
    }
    run([judged(of_release(OURS, HELD_50) | of_release(OTHERS, HELD_0), expected)], tmp_path, OURS)


def test_windows_hold_enough_samples() -> None:
    assert rules.RATE_WINDOW_S >= 4 * rules.SCRAPE_S
    assert all(f"rate{rules.RATE_WINDOW_S}s" in s.record for s in rules.SIGNALS if s.field == "arrivals_rps")
