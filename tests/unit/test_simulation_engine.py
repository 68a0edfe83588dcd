"""The simulated replica against the fake engine's own scheduler, stepped in virtual time: two programs, one model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serving.autoscaling.capacity import of_fake
from serving.config import FakeEngineConfig
from serving.engine.fake.scheduler import Scheduler, Sequence
from serving.simulation import kernel
from serving.simulation.cluster import Cluster
from serving.simulation.engine import Engine, Targets
from serving.simulation.traces import Trace

FAKE = FakeEngineConfig(prefill_tokens_per_s=20000.0, decode_ms=10.0, decode_ms_per_sequence=0.05, kv_blocks=20000)
ENGINE = Engine(
    name="fake",
    rate=FAKE.prefill_tokens_per_s,
    overhead_s=0.0,
    attention_s=0.0,
    step_s=FAKE.decode_ms / 1000,
    step_s_per_sequence=FAKE.decode_ms_per_sequence / 1000,
    step_s_per_token=0.0,
    max_sequences=FAKE.batch_slots,
    kv_tokens=float(FAKE.kv_blocks * FAKE.block_tokens),
    chunk_tokens=FAKE.prefill_chunk_tokens,
)


def trace_of(at_s: list[float], prompt: list[int], output: list[int]) -> Trace:
    return Trace(
        "made",
        np.array(at_s, dtype=float),
        np.array(prompt, dtype=np.int32),
        np.array(output, dtype=np.int32),
        max(at_s) + 1.0,
    )


def random_trace(rps: float, seconds: float, seed: int = 5) -> Trace:
    rng = np.random.default_rng(seed)
    n = int(rps * seconds)
    at_s = np.sort(rng.uniform(0, seconds, n))
    prompts = np.clip(rng.lognormal(6.5, 0.8, n), 8, 6000).astype(int)
    outputs = np.clip(rng.lognormal(4.5, 0.8, n), 1, 800).astype(int)
    return trace_of(at_s.tolist(), prompts.tolist(), outputs.tolist())


def simulated(trace: Trace, *, replicas: int = 1, engine: Engine = ENGINE) -> Cluster:
    cluster = Cluster(trace, engine, Targets(), start_delay_s=5.0, most=replicas, initial=replicas)
    cluster.advance(math.inf)
    return cluster


def scheduled(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """First and last token times from the fake engine's scheduler."""
    scheduler = Scheduler(FAKE)
    sequences = [
        Sequence(prompt_tokens=int(p), output_tokens=int(o), finish_reason="length")
        for p, o in zip(trace.prompt_tokens, trace.output_tokens, strict=True)
    ]
    waiting = list(zip(trace.at_s, sequences, strict=True))
    while waiting or scheduler.due is not None:
        if waiting and (scheduler.due is None or waiting[0][0] <= scheduler.due):
            at_s, sequence = waiting.pop(0)
            scheduler.submit(sequence, at_s)
        else:
            assert scheduler.due is not None
            scheduler.step(scheduler.due)
    return np.array([s.first_token_at for s in sequences]), np.array([s.last_token_at for s in sequences])


def test_one_request_alone_takes_its_prefill_and_a_step_a_token() -> None:
    cluster = simulated(trace_of([1.0], [1000], [11]))
    step_s = ENGINE.step_s + ENGINE.step_s_per_sequence
    assert cluster.state.first_s[0] == pytest.approx(1.0 + ENGINE.step_s + 1000 / ENGINE.rate)
    assert cluster.state.last_s[0] - cluster.state.first_s[0] == pytest.approx(10 * step_s)


def test_a_long_prompt_goes_in_chunks() -> None:
    cluster = simulated(trace_of([0.0], [5000], [1]))
    assert cluster.state.first_s[0] == pytest.approx(3 * ENGINE.step_s + 5000 / ENGINE.rate)


@pytest.mark.parametrize(("rps", "within"), [(3.0, 0.01), (15.0, 0.02), (30.0, 0.05)])
def test_times_are_those_of_the_fake_engines_scheduler(rps: float, within: float) -> None:
    trace = random_trace(rps, 60.0)
    first_s, last_s = scheduled(trace)
    state = simulated(trace).state
    assert (state.first_s - state.at_s).mean() == pytest.approx((first_s - trace.at_s).mean(), rel=within, abs=0.002)
    assert (state.last_s - state.at_s).mean() == pytest.approx((last_s - trace.at_s).mean(), rel=within)
    for level in (0.5, 0.95):
        mine, theirs = np.quantile(state.last_s - state.at_s, level), np.quantile(last_s - trace.at_s, level)
        assert mine == pytest.approx(theirs, rel=2 * within)


def test_context_costs_what_its_sum_says() -> None:
    engine = Engine("c", 1e9, 0.0, 0.0, 0.01, 0.0, 1e-5, 8, math.inf, 2048)
    cluster = simulated(trace_of([0.0], [100], [101]), engine=engine)
    # Contexts of 101 to 200 tokens, each read once.
    assert cluster.state.last_s[0] - cluster.state.first_s[0] == pytest.approx(100 * 0.01 + 1e-5 * sum(range(101, 201)))


@pytest.mark.parametrize("replicas", [1, 3, 8])
def test_every_request_ends_once_and_nothing_is_left(replicas: int) -> None:
    trace = random_trace(40.0, 60.0)
    state = simulated(trace, replicas=replicas).state
    assert np.isfinite(state.last_s).all()
    assert (state.last_s >= state.first_s).all()
    assert (state.first_s > state.at_s).all()
    assert state.counters[kernel.ENDED] == len(trace)
    assert not state.counts[:, kernel.IN_FLIGHT].any()
    assert not state.counts[:, kernel.QUEUED].any()
    assert not state.numbers[:, kernel.RESERVED].any()


def test_a_full_cache_makes_requests_wait() -> None:
    small = Engine("s", 20000.0, 0.0, 0.0, 0.01, 0.0, 0.0, 256, 1000.0, 2048)
    state = simulated(trace_of([0.0, 0.0, 0.0], [400, 400, 400], [50, 50, 50]), engine=small).state
    assert state.first_s[2] >= state.last_s[0]


def test_without_replicas_requests_are_held_and_then_routed_in_order() -> None:
    trace = trace_of([1.0, 2.0, 3.0], [100, 100, 100], [1, 1, 1])
    cluster = Cluster(trace, ENGINE, Targets(), start_delay_s=10.0, most=2, initial=0)
    cluster.advance(5.0)
    assert cluster.gauges()[2] == 3
    cluster.scale(1)
    cluster.advance(14.0)
    assert cluster.ready == 0
    assert cluster.starting_s() == (9.0,)
    cluster.advance(math.inf)
    assert cluster.state.first_s[0] >= 15.0
    assert (np.diff(cluster.state.first_s) >= 0).all()


def test_replicas_are_billed_from_the_ask_until_their_last_stream_ended() -> None:
    trace = trace_of([0.0], [100], [1001])
    cluster = Cluster(trace, ENGINE, Targets(), start_delay_s=100.0, most=4, initial=1)
    cluster.advance(1.0)
    cluster.scale(2)
    cluster.advance(2.0)
    # The one that starts goes first, and goes at once; the other drains.
    cluster.scale(0)
    assert cluster.billed_s() == pytest.approx(2.0 + 1.0)
    cluster.advance(1000.0)
    assert cluster.billed_s() == pytest.approx(1.0 + cluster.state.last_s[0])


def test_the_same_trace_gives_the_same_times() -> None:
    trace = random_trace(40.0, 30.0)
    one, other = simulated(trace, replicas=4).state, simulated(trace, replicas=4).state
    assert (one.last_s == other.last_s).all()


def test_capacity_in_the_policys_words_is_the_engines() -> None:
    measured = ENGINE.capacity
    assert measured.model_dump() == of_fake(FAKE).model_dump()
