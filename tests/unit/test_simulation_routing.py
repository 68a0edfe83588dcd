"""`galerne simulate routing`: what the live router does to caches, balance and waiting on traces of several shapes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from loadtest.profiles.model import load_profile
from serving.cli import app
from serving.errors import SimulationError
from serving.simulation.engine import Engine
from serving.simulation.routing.cache import BlockCache
from serving.simulation.routing.command import Asked, run
from serving.simulation.routing.replay import Cluster, Outcome, play
from serving.simulation.routing.replica import Replica, Request
from serving.simulation.routing.trace import PromptTrace, find

SHARED = Path(os.environ.get("GALERNE_SHARED", Path(__file__).parents[3] / "shared"))
MOONCAKE = SHARED / "data" / "mooncake_conversation.jsonl"
ENGINE = Engine.of(load_profile("a100-llama-3.1-8b-published"))


def outcomes(trace: PromptTrace, *policies: str, replicas: int = 8, blocks: int = 2500) -> dict[str, Outcome]:
    return {policy: play(trace, Cluster(ENGINE, replicas, blocks), policy) for policy in policies}


@pytest.mark.skipif(not MOONCAKE.is_file(), reason="the recorded trace is not here")
def test_the_recorded_conversations() -> None:
    # One pool of 20,000 blocks finds 0.293 of all tokens, round robin 0.087, a cache without end 0.374.
    found = outcomes(find(str(MOONCAKE)), "cost", "round-robin", "power-of-two")
    cost = found.pop("cost")
    assert cost.token_hit >= 0.288
    assert cost.imbalance <= 1.05
    assert found["round-robin"].token_hit == pytest.approx(0.087, abs=0.002)
    assert cost.ttft_mean_s < 0.5 * min(other.ttft_mean_s for other in found.values())


def test_conversations_stay_where_they_are() -> None:
    found = outcomes(find("conversations"), "cost", "power-of-two", "round-robin")
    assert found["cost"].token_hit > 2 * found["power-of-two"].token_hit
    assert found["cost"].imbalance < 1.1
    assert found["cost"].ttft_mean_s < found["round-robin"].ttft_mean_s / 2


def test_popular_prefixes_spread() -> None:
    found = outcomes(find("shared-prefixes"), "cost", "power-of-two", "affinity")
    assert found["cost"].token_hit > found["power-of-two"].token_hit
    assert found["cost"].ttft_mean_s < found["power-of-two"].ttft_mean_s / 1.5
    assert found["cost"].imbalance < 1.1 < found["affinity"].imbalance


def test_where_nothing_is_shared_it_waits_no_longer_than_power_of_two() -> None:
    trace = find("nothing-shared")
    for replicas, rate in ((2, 0.25), (8, 1.0)):
        asked = find("nothing-shared", rate) if rate != 1.0 else trace
        found = outcomes(asked, "cost", "power-of-two", replicas=replicas)
        assert found["cost"].ttft_mean_s <= found["power-of-two"].ttft_mean_s
        assert found["cost"].ttft_quantiles_s[-1] <= found["power-of-two"].ttft_quantiles_s[-1]


def test_several_gateways_do_nearly_as_well_as_one_where_they_learn_of_one_another() -> None:
    trace = find("conversations")

    def played(gateways: int, *, feedback: bool) -> Outcome:
        return play(trace, Cluster(ENGINE, 8, 2500, gateways=gateways, feedback=feedback), "cost")

    alone = played(1, feedback=True)
    assert played(1, feedback=False) == alone
    told, untold = played(4, feedback=True), played(4, feedback=False)
    assert told.token_hit > 0.97 * alone.token_hit
    assert untold.token_hit < 0.8 * alone.token_hit
    assert told.ttft_mean_s < 0.5 * untold.ttft_mean_s
    assert played(4, feedback=True) == told


def test_the_same_seed_gives_the_same_figures() -> None:
    trace, cluster = find("conversations"), Cluster(ENGINE, 4, 500, seed=3)
    assert play(trace, cluster, "cost") == play(trace, cluster, "cost")


def test_a_file_in_mooncakes_form_is_read_and_a_wrong_line_named(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 4000, "input_length": 1100, "output_length": 0, "hash_ids": [0, 1, 2]},
        {"timestamp": 5000, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    trace = find(str(file), rate_scale=2)
    assert [(p.at_s, p.tokens, p.output_tokens) for p in trace.prompts] == [(0, 600, 5), (1.5, 1100, 1), (2, 600, 7)]
    assert [p.session for p in trace.prompts] == [0, 0, 1], "a block that everybody sends makes no conversation"
    file.write_text(json.dumps(rows[0]) + "\n{}\n")
    with pytest.raises(SimulationError, match=r"mine\.jsonl:2"):
        run(_asked(str(file)))


def _asked(trace: str, *policies: str, blocks: int = 2500) -> Asked:
    return Asked(trace, policies, 2, blocks, "a100-llama-3.1-8b-published", 1.0, None, 0)


def test_arrivals_of_one_recorded_time_can_be_spread(tmp_path: Path) -> None:
    rows = [{"timestamp": at, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]} for at in (0, 0, 0, 3000)]
    file = tmp_path / "rounded.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert [p.at_s for p in find(str(file)).prompts] == [0, 0, 0, 3]
    assert [p.at_s for p in find(str(file), spread=True).prompts] == [0, 1, 2, 3]


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(SimulationError, match="allowed: cost"):
        run(_asked("conversations", "best"))
    with pytest.raises(SimulationError, match="known traces"):
        run(_asked("nowhere"))
    with pytest.raises(SimulationError, match="longest request"):
        run(_asked("conversations", blocks=3))


def test_the_command_prints_one_object() -> None:
    answer = CliRunner().invoke(
        app, ["simulate", "routing", "--trace", "conversations", "--policy", "cost", "--replicas", "3", "--json"]
    )
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["simulated"] is True
    assert document["rows"][0]["token_hit"] == document["token_hit"] > 0.5
    assert set(document["ttft_s"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert document["imbalance"] >= 1
    assert (document["gateways"], document["feedback"]) == (1, True)


def test_the_command_takes_several_gateways() -> None:
    told = ["simulate", "routing", "--trace", "conversations", "--policy", "cost", "--replicas", "3", "--gateways", "2"]
    answer = CliRunner().invoke(app, told)
    assert answer.exit_code == 0, answer.output
    assert "2 gateways with feedback before 3 replicas" in answer.stdout
    without = CliRunner().invoke(app, [*told, "--no-feedback", "--json"])
    assert json.loads(without.stdout)["feedback"] is False


def test_one_prompt_takes_what_the_profile_says() -> None:
    told: list[tuple[str, float]] = []
    replica = Replica(
        ENGINE, 100, 512, lambda _, at_s: told.append(("first", at_s)), lambda _, at_s: told.append(("end", at_s))
    )
    first = Request(0.0, 2048, 11, (1, 2, 3, 4))
    replica.put(first, 0.0)
    replica.advance(100.0)
    prefill_s = ENGINE.own_s(2048)
    assert told[0] == ("first", pytest.approx(float(prefill_s)))
    step_s = ENGINE.step_s + ENGINE.step_s_per_sequence + ENGINE.step_s_per_token * 2053
    assert told[1] == ("end", pytest.approx(float(prefill_s) + 10 * step_s))
    again = Request(100.0, 2048, 1, (1, 2, 3, 4))
    replica.put(again, 100.0)
    replica.advance(200.0)
    assert again.cached_tokens == 2047, "the last token is always computed"
    assert told[3][1] - 100.0 == pytest.approx(max(ENGINE.step_s, ENGINE.overhead_s), rel=0.05)


def test_the_cache_never_holds_more_than_it_has() -> None:
    rng, cache, running = Random(5), BlockCache(40), []
    for _ in range(3000):
        names = (*rng.choice(((1, 2, 3), (1, 2, 4, 5), (6, 7))), rng.randint(10, 60))
        hold = cache.admit(names, cache.match(names), len(names) + 1)
        if hold is None:
            assert running, "an idle cache takes what fits"
            cache.release(running.pop(0))
            continue
        if rng.random() < 0.8:
            cache.computed(hold, names)
            assert cache.match(names) >= len(hold.named)
        running.append(hold)
        if len(running) > 5:
            cache.release(running.pop(rng.randrange(len(running))))
        assert cache.held <= 40
    for hold in running:
        cache.release(hold)
    assert cache.pinned == 0
