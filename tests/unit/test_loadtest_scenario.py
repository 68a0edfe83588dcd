"""Scenarios: refused with the place of the mistake, and planned the same every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.errors import LoadtestError
from loadtest.plan import PlannedRequest
from loadtest.scenario import Scenario, bundled, load, parse, plan
from loadtest.workloads import data_folder

GOOD = """\
name: test
warm_up_s: 10
duration_s: 50
seed: 3
slo: {ttft_p95_s: 1.0}
streams:
  - tenant: press
    key: $PRESS_KEY
    model: m
    workload: {kind: synthetic, prefix_tokens: 8, tail_tokens: 4, output_tokens: 5}
    arrivals: {kind: poisson, rate_rps: 2}
  - tenant: jobs
    key: sk-jobs
    model: m
    workload: {kind: synthetic, tail_tokens: 4, output_tokens: 5}
    arrivals:
      kind: profile
      steps:
        - {for_s: 30, rate_rps: 0}
        - {for_s: 30, rate_rps: 2.0}
"""
OUTPUT_TOKENS_S_OF_THE_DEMO = 60


def _requests(text: str, **options: Any) -> list[PlannedRequest]:
    return list(plan(parse(text, "s.yaml"), **options))


def test_streams_are_merged_by_time_up_to_the_end() -> None:
    requests = _requests(GOOD)
    times = [request.at_s for request in requests]
    assert times == sorted(times)
    assert 50 < times[-1] < 60
    assert {request.tenant for request in requests} == {"press", "jobs"}
    assert len(requests) == pytest.approx(180, abs=4 * 180**0.5)
    assert all(request.at_s >= 30 for request in requests if request.tenant == "jobs")
    assert {len(r.prompt.split()) for r in requests if r.tenant == "press"} == {12}


def test_the_seed_decides_everything_and_the_salt_only_words() -> None:
    requests = _requests(GOOD)
    assert _requests(GOOD) == requests
    salted = _requests(GOOD, salt="second run")
    assert [(r.at_s, r.tenant, len(r.prompt.split()), r.output_tokens) for r in salted] == [
        (r.at_s, r.tenant, len(r.prompt.split()), r.output_tokens) for r in requests
    ]
    assert not {r.prompt for r in salted} & {r.prompt for r in requests}
    other = _requests(GOOD.replace("seed: 3", "seed: 4"))
    assert [r.at_s for r in other] != [r.at_s for r in requests]


def test_a_stream_is_the_same_beside_any_other() -> None:
    both = _requests(GOOD)
    value = yaml.safe_load(GOOD)
    value["streams"] = value["streams"][1:]
    alone = list(plan(Scenario.model_validate(value)))
    assert alone == [request for request in both if request.tenant == "jobs"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seed: 3", "sed: 3", "s.yaml:4: sed: unknown field; allowed: name, duration_s, warm_up_s, seed"),
        ("rate_rps: 2}\n", "rate: 2}\n", r"s.yaml:11: streams\[0\].arrivals.rate: unknown field; allowed: kind, rate_rps"),
        ("rate_rps: 2}\n", "rate_rps: 0}\n", r"s.yaml:11: streams\[0\].arrivals.rate_rps: .*greater than 0"),
        ("rate_rps: 2}\n", "rate_rps: .nan}\n", r"s.yaml:11: streams\[0\].arrivals.rate_rps: .*finite"),
        ("rate_rps: 2}\n", "rate_rps: '2'}\n", r"s.yaml:11: streams\[0\].arrivals.rate_rps: .*valid number"),
        ("kind: poisson", "kind: posson", r"s.yaml:11: streams\[0\].arrivals: .*'posson'.*'poisson', 'gamma'"),
        ("rate_rps: 2.0", "rate_rps: -1", r"s.yaml:20: streams\[1\].arrivals.steps\[1\].rate_rps: .*greater than or equal"),
        ("for_s: 30, rate_rps: 2.0", "for_s: 29, rate_rps: 2", "s.yaml:1: the steps of stream jobs end at 59 s, the run at 60 s"),
        ("    model: m\n    workload: {kind: synthetic, prefix", "    workload: {kind: synthetic, prefix", r"s.yaml:7: streams\[0\].model: Field required"),
        ("kind: poisson, rate_rps: 2", "kind: trace", r"s.yaml:7: streams\[0\]: workload synthetic has no times of its own.*allowed: poisson"),
        ("tenant: jobs", "tenant: press", "s.yaml:1: streams press appear twice; give each a 'name'"),
        ("tenant: jobs", "name: second\n    tenant: press", "s.yaml:1: tenant press has two different keys"),
        ("tenant: jobs", "tenant: jo/bs", r"s.yaml:12: streams\[1\].tenant: String should match"),
        ("ttft_p95_s: 1.0", "ttft_p95: 1.0", "s.yaml:5: slo.ttft_p95: unknown field; allowed: ttft_p95_s, itl_p95_s"),
        ("name: test", "name: test\nname: again", "s.yaml:2: name stands twice"),
        ("seed: 3", "seed: !!python/name:os.system x", "s.yaml:4: not a plain value"),
        ("seed: 3", "5: 3", "s.yaml:4: a key must be text"),
        ("streams:", "streams: [", "s.yaml:[0-9]+: not valid YAML"),
        (GOOD, "- a list\n", "s.yaml:1: Input should be"),
        (GOOD, "", "s.yaml: the file is empty"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(old: str, new: str, problem: str) -> None:
    assert old in GOOD
    with pytest.raises(LoadtestError, match=f"^{problem}"):
        parse(GOOD.replace(old, new, 1), "s.yaml")


def test_an_error_shows_no_key() -> None:
    with pytest.raises(LoadtestError) as caught:
        parse(GOOD.replace("key: sk-jobs", "key: [sk-secret]"), "s.yaml")
    assert "streams[1].key" in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert "sk-jobs" not in repr(parse(GOOD, "s.yaml"))


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(LoadtestError) as caught:
        parse(GOOD.replace("kind: poisson", "kind: posson").replace("seed: 3", "seed: x"), "s.yaml")
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["s.yaml:4:", "s.yaml:11:"]


def test_keys_are_literal_or_of_the_environment() -> None:
    scenario = parse(GOOD + "keys: {other: sk-other}\n", "s.yaml")
    environ: Mapping[str, str] = {"PRESS_KEY": "sk-press"}
    assert scenario.key_of("press", environ) == "sk-press"
    assert scenario.key_of("press/42", environ) == "sk-press"
    assert scenario.key_of("jobs", environ) == "sk-jobs"
    assert scenario.key_of("other", environ) == "sk-other"
    assert scenario.key_of("nobody", environ) is None
    for empty in ({}, {"PRESS_KEY": ""}):
        with pytest.raises(LoadtestError, match=r"tenant press is to come from \$PRESS_KEY, which is not set"):
            scenario.key_of("press", empty)


def _own(folder: Path, arrivals: str, count: int = 10, workload: str = "") -> Scenario:
    lines = [{"at_s": n * 10, "prompt": f"prompt {n} of a user", "output_tokens": n + 1} for n in range(count)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "own.yaml").write_text(
        f"name: own\nduration_s: 60\nstreams:\n  - tenant: a\n    model: m\n"
        f"    workload: {{kind: jsonl, path: own.jsonl{workload}}}\n    arrivals: {arrivals}\n"
    )
    return load(folder / "own.yaml")


def test_a_trace_is_replayed_from_where_and_as_fast_as_asked(tmp_path: Path) -> None:
    planned = plan(_own(tmp_path, "{kind: trace, from_s: 20, speed: 0.5}"))
    assert [(r.at_s, r.prompt) for r in planned] == [(0.0, "prompt 2 of a user"), (20.0, "prompt 3 of a user"), (40.0, "prompt 4 of a user")]  # fmt: skip
    assert planned.notes() == ()


def test_a_source_that_ends_early_is_told(tmp_path: Path) -> None:
    planned = plan(_own(tmp_path, "{kind: trace}", count=3))
    assert len(list(planned)) == 3
    assert planned.notes() == ("a: its source ends at 20 s of 60 s",)
    nothing = plan(_own(tmp_path, "{kind: trace, from_s: 500}"))
    assert list(nothing) == []
    assert nothing.notes() == ("a: sends nothing in this run; check its rate, from_s and share",)


def test_other_times_go_round_a_short_source(tmp_path: Path) -> None:
    requests = list(plan(_own(tmp_path, "{kind: constant, rate_rps: 0.5}")))
    assert [r.at_s for r in requests] == [2.0 * n for n in range(30)]
    assert [r.output_tokens for r in requests] == [*range(1, 11)] * 3
    with pytest.raises(LoadtestError, match="a: its workload holds no request"):
        list(plan(_own(tmp_path, "{kind: constant, rate_rps: 0.5}", count=0)))


def test_caps_hold_and_are_told(tmp_path: Path) -> None:
    planned = plan(
        _own(tmp_path, "{kind: constant, rate_rps: 0.5}", workload=", max_prompt_tokens: 3, max_output_tokens: 4")
    )
    requests = list(planned)
    assert {r.prompt for r in requests} == {f"prompt {n} of" for n in range(10)}
    assert {r.output_tokens for r in requests} == {1, 2, 3, 4}
    assert planned.notes() == (
        "a: 30 of 30 prompts were cut to max_prompt_tokens (3)",
        "a: 18 of 30 outputs were cut to max_output_tokens (4)",
    )


def test_a_larger_share_holds_all_of_a_smaller_one(tmp_path: Path) -> None:
    smaller, larger = (
        {r.at_s for r in plan(_own(tmp_path, f"{{kind: trace, speed: 100, share: {share}}}", count=600))}
        for share in (0.2, 0.5)
    )
    assert smaller < larger
    assert len(smaller) == pytest.approx(120, abs=40)
    assert len(larger) == pytest.approx(300, abs=50)


def test_a_scenario_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(LoadtestError, match=r"No such file.*azure-replay, b2b-night, .*smoke"):
        load("smok")


_SETS = {"azure-replay", "b2b-night", "mixed-day"}
NAMES = ("azure-replay", "b2b-night", "employment-morning", "mixed-day", "press-burst", "smoke")


def test_the_bundled_scenarios_are_these() -> None:
    assert tuple(bundled()) == NAMES
    demo = yaml.safe_load((Path(__file__).parents[2] / "deployments/config/demo.yaml").read_text())
    for name in NAMES:
        scenario = load(name)
        assert scenario.name == name
        assert scenario.tenants <= {tenant["id"] for tenant in demo["tenants"]}
        assert {stream.model for stream in scenario.streams} <= {model["id"] for model in demo["models"]}
        assert all(scenario.key_of(tenant, {}) for tenant in scenario.tenants)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_scenario_fits_the_demo(name: str) -> None:
    if name in _SETS and not data_folder().is_dir():
        pytest.skip(f"no data sets in {data_folder()}")
    scenario = load(name)
    planned = plan(scenario)
    # The demo's context: 2048 tokens for prompt, template and output.
    assert all(len(r.prompt.split()) + r.output_tokens <= 2000 for r in planned)
    tallies = planned.tallies.values()
    assert all(tally.requests >= 10 for tally in tallies)
    assert not [note for note in planned.notes() if "cut" not in note]
    if name != "smoke":
        assert sum(tally.output_tokens for tally in tallies) / scenario.total_s < OUTPUT_TOKENS_S_OF_THE_DEMO
