"""How work becomes replicas: what is known of lengths, what stays, what is seen under strain, and how demand moves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from serving.autoscaling.capacity import Capacity
from serving.autoscaling.demand import WATCHED_S, Mix, Work, under_strain, work
from serving.autoscaling.forecast import Moves, Sample, kept
from serving.config import CapacityConfig

CAPACITY = Capacity.measured(
    CapacityConfig(
        prefill_tokens_per_s=10000,
        decode_ms=10,
        decode_ms_per_sequence=0.1,
        decode_ms_per_1k_context_tokens=0.08,
        max_sequences=256,
        kv_tokens=390000,
    ),
    itl_s=0.1,
)
LONG = Mix(prompt_tokens=1400.0, output_tokens=1500.0)


def demand_of(mix: Mix, rates: list[float], *, ahead_s: float = 10.0, kv: float | None = None) -> tuple[Work, Mix]:
    for rate in rates:
        found, mix = work(CAPACITY, mix, arrivals_rps=rate, kv_in_use=kv, ahead_s=ahead_s, passed_s=5.0)
    return found, mix


def test_lengths_that_vary_take_more_replicas_than_their_mean_says() -> None:
    # Half of the answers 100 tokens, half 2,900: what runs is nearly always a long one.
    alike, _ = demand_of(LONG, [10.0])
    seen = LONG
    for _ in range(2000):
        seen = seen.seen(running=100.0, in_cache=100 * (1400.0 + 2900 / 2), passed_s=5.0)
    varied, _ = demand_of(seen, [10.0])
    assert seen.context == pytest.approx(2850.0, rel=0.01)
    assert varied.demand > 1.2 * alike.demand


def test_a_swell_shorter_than_an_answer_counts_less_and_a_lasting_one_whole() -> None:
    steady, mix = demand_of(LONG, [10.0] * 100)
    assert steady.answer_s > 30
    short, _ = demand_of(mix, [20.0])
    lasting, _ = demand_of(mix, [20.0] * 200)
    assert steady.demand < short.demand < 1.5 * steady.demand
    assert lasting.demand == pytest.approx(2 * steady.demand, rel=0.01)


def test_a_swell_of_prompts_counts_at_once() -> None:
    prompts = Mix(prompt_tokens=8000.0, output_tokens=10.0)
    steady, mix = demand_of(prompts, [1.0] * 100)
    short, _ = demand_of(mix, [2.0])
    assert short.demand == pytest.approx(2 * steady.demand, rel=0.1)


def test_full_caches_are_demand_whatever_the_rate_says() -> None:
    reckoned, mix = demand_of(LONG, [5.0] * 200, kv=0.0)
    full, mix = demand_of(mix, [5.0] * 200, kv=8.0)
    assert full.demand > 2 * reckoned.demand
    # What was learned from it applies to what comes next, too.
    assert mix.underrated > 2
    assert full.rate_rps < reckoned.rate_rps


def queued(waiting: list[float], ready: int = 10) -> list[tuple[float, float, int]]:
    return [(i * WATCHED_S / (len(waiting) - 1), number, ready) for i, number in enumerate(waiting)]


@pytest.mark.parametrize(
    ("waiting", "demand"),
    [
        ([200.0] * 5, 10.0),  # As many came as were taken: ten replicas are just full.
        ([200.0, 260.0, 320.0, 380.0, 440.0], 10.0 / (1 - 4 / 20)),  # Four of twenty a second were left over.
        ([900.0, 700.0, 500.0, 300.0, 100.0], 20 / 2.7),  # It shrinks fast: the reckoning stands.
        ([200.0, 0.0, 200.0, 200.0, 200.0], 20 / 2.7),  # Between, nobody waited.
    ],
)
def test_a_queue_that_stays_tells_what_replicas_take(waiting: list[float], demand: float) -> None:
    found = Work(20 / 2.7, 2.7, 10.0)
    seen = under_strain(found, queued(waiting), arrivals_rps=20.0, breathing=1.0)
    assert seen.demand == pytest.approx(demand, rel=0.01)


def test_a_queue_that_was_not_watched_for_long_enough_tells_nothing() -> None:
    found = Work(2.0, 2.7, 10.0)
    assert under_strain(found, [(0.0, 500.0, 1), (30.0, 900.0, 1)], arrivals_rps=20.0, breathing=1.0) == found
    assert under_strain(found, [(0.0, 500.0, 1)], arrivals_rps=20.0, breathing=1.0) == found


def moved(values: list[float], ahead_s: float = 60.0) -> tuple[Moves, float]:
    moves, history, expected = Moves(), (), 0.0
    history: tuple[Sample, ...]
    for i, value in enumerate(values):
        history = kept(history, (5.0 * i, value), window_s=600.0, most=360)
        moves, expected = moves.seen(history, ahead_s)
    return moves, expected


def test_ramps_that_go_on_are_learned_and_carried_on() -> None:
    ramps = [5.0 + 5.0 * math.sin(2 * math.pi * i / 720) for i in range(2880)]
    moves, _ = moved(ramps)
    assert moves.damping > 0.6
    # At the steepest moment of a ramp: more is to come than is there.
    steep, expected = moved(ramps[:2160])
    assert expected > ramps[2159] + 0.5 * 60 / 5 * (ramps[2159] - ramps[2158])
    assert steep.missed(5.0) < 1.0


def test_noise_is_not_carried_on_but_allowed_for() -> None:
    noise = np.random.default_rng(5).normal(10.0, 1.0, 2000).tolist()
    moves, expected = moved(noise)
    assert moves.damping < 0.1
    assert expected == pytest.approx(noise[-1], abs=0.3)
    # Rises only, from one sample to another: half of the squares of a spread of 1.4.
    assert 0.7 < moves.missed(10.0) < 1.3
    quiet, _ = moved([10.0] * 2000)
    assert quiet.missed(10.0) == 0.0


def test_what_is_remembered_of_moves_is_bounded() -> None:
    moves, _ = moved([1.0] * 3000, ahead_s=3600.0)
    assert len(moves.said) <= 256
    assert replace(moves, said=()).missed(1.0) >= 0
