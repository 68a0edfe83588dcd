"""The fake engine's latency model in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import FakeEngineConfig
from serving.engine.fake.scheduler import Scheduler, Sequence, State

BLOCK = 4


def engine(**fields: object) -> Scheduler:
    defaults = {
        "prefill_tokens_per_s": 1000.0,
        "decode_ms": 10.0,
        "decode_ms_per_sequence": 1.0,
        "batch_slots": 4,
        "kv_blocks": 64,
        "block_tokens": BLOCK,
    }
    return Scheduler(FakeEngineConfig.model_validate({**defaults, **fields}))


def hashed(prompt_tokens: int, output_tokens: int, family: int = 0) -> Sequence:
    """A sequence whose blocks equal those of every other one of its family."""
    blocks = (prompt_tokens + output_tokens) // BLOCK
    return Sequence(prompt_tokens, output_tokens, tuple(hash((family, i)) for i in range(blocks)))


def unique(prompt_tokens: int, output_tokens: int) -> Sequence:
    return Sequence(prompt_tokens, output_tokens)


def run(scheduler: Scheduler, *, until: float = 1e9) -> float:
    """Steps in virtual time until nothing is left; the time of the last step."""
    now = 0.0
    while (due := scheduler.due) is not None and due <= until:
        now = due
        scheduler.step(now)
    return now


def test_a_lone_request_takes_prefill_and_one_pass_a_token() -> None:
    scheduler = engine()
    sequence = unique(100, 3)
    scheduler.submit(sequence, 5.0)
    run(scheduler)
    # 11 ms a pass, and 100 tokens at 1000/s in the first one.
    assert sequence.first_token_at == pytest.approx(5.111)
    assert sequence.last_token_at == pytest.approx(5.133)
    assert (sequence.state, sequence.produced) == (State.FINISHED, 3)


def test_each_sequence_in_the_batch_slows_every_pass() -> None:
    scheduler = engine(prefill_tokens_per_s=1e9)
    batch = [unique(1, 11) for _ in range(4)]
    for sequence in batch:
        scheduler.submit(sequence, 0.0)
    run(scheduler)
    assert [s.last_token_at for s in batch] == pytest.approx([11 * 0.014] * 4, abs=1e-6)


def test_requests_beyond_the_slots_wait_for_one_to_end() -> None:
    scheduler = engine(batch_slots=1, prefill_tokens_per_s=1e9)
    first, second = unique(1, 5), unique(1, 5)
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    scheduler.step(0.0)
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 1)
    run(scheduler)
    assert second.scheduled_at == first.last_token_at


def test_requests_wait_while_their_prompt_does_not_fit_the_kv_cache() -> None:
    scheduler = engine(kv_blocks=10)
    large, other = unique(28, 2), unique(16, 1)  # 8 and 4 blocks
    scheduler.submit(large, 0.0)
    scheduler.submit(other, 0.0)
    scheduler.step(0.0)
    assert list(scheduler.running) == [large]
    assert scheduler.pool.usage == pytest.approx(0.7)
    run(scheduler)
    assert other.scheduled_at == large.last_token_at
    assert scheduler.pool.usage == 0


def test_a_repeated_prompt_is_prefilled_from_the_cache_but_for_its_last_block() -> None:
    scheduler = engine()
    first, second, other = hashed(40, 1), hashed(40, 1), hashed(40, 1, family=1)
    for sequence in (first, second, other):
        scheduler.submit(sequence, (scheduler.due or 0) + 100)
        run(scheduler)
    # The tenth block is full, but its last token must be computed: vLLM then computes all of it.
    assert [s.cached_tokens for s in (first, second, other)] == [0, 36, 0]
    ttft = [(s.first_token_at or 0) - s.queued_at for s in (first, second)]
    assert ttft == [pytest.approx(0.051), pytest.approx(0.015)]
    assert (scheduler.prefix_hits_tokens, scheduler.prefix_queries_tokens) == (36, 120)


def test_an_answer_is_found_again_when_it_comes_back_in_a_prompt() -> None:
    scheduler = engine()
    scheduler.submit(hashed(8, 16), 0.0)
    run(scheduler)
    follow_up = hashed(32, 1)
    scheduler.submit(follow_up, 10.0)
    run(scheduler)
    # All but the answer's last token, which no pass has computed keys for: five full blocks.
    assert follow_up.cached_tokens == 20


def test_the_cache_forgets_the_least_recently_used_prefix_first() -> None:
    scheduler = engine(kv_blocks=8)
    for family in (1, 2, 1, 3):  # 3 takes what 2 left, not what 1 used after it
        scheduler.submit(hashed(16, 0, family), 0.0)
        run(scheduler)
    again = [hashed(16, 0, family) for family in (1, 2)]
    for sequence in again:
        scheduler.submit(sequence, 0.0)
        run(scheduler)
    assert [s.cached_tokens for s in again] == [12, 0]


def test_long_prompts_are_prefilled_in_chunks_between_which_others_decode() -> None:
    scheduler = engine(kv_blocks=4096, prefill_chunk_tokens=2000)
    short, long = unique(1, 20), unique(6000, 1)
    scheduler.submit(short, 0.0)
    scheduler.step(0.0)
    scheduler.submit(long, 0.0)
    run(scheduler)
    assert long.first_token_at == pytest.approx(0.011 + 3 * (0.012 + 2.0) + 0.001)


def test_the_youngest_is_preempted_when_answers_fill_the_cache_and_still_finishes() -> None:
    scheduler = engine(kv_blocks=6)
    old, young = unique(8, 16), unique(8, 16)  # 6 blocks each in the end
    scheduler.submit(old, 0.0)
    scheduler.submit(young, 0.0)
    run(scheduler)
    assert scheduler.preemptions > 0
    assert (old.produced, young.produced) == (16, 16)
    assert (old.last_token_at or 0) < (young.last_token_at or 0)
    assert scheduler.pool.free == 6


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_an_abort_frees_slot_and_blocks_at_once(passes: int) -> None:
    scheduler = engine(batch_slots=1)
    sequence, waiting = hashed(20, 50), unique(1, 1)
    scheduler.submit(sequence, 0.0)
    scheduler.submit(waiting, 0.0)
    for _ in range(passes):
        scheduler.step(scheduler.due or 0.0)
    assert scheduler.abort(sequence)
    assert not scheduler.abort(sequence)
    assert (len(scheduler.running), scheduler.pool.free) == (0, 64)
    run(scheduler)
    assert (waiting.state, sequence.state) == (State.FINISHED, State.ABORTED)
    assert sequence.produced == max(0, passes - 1)


def test_pooling_finishes_with_its_prefill_and_yields_no_token() -> None:
    scheduler = engine()
    sequence = unique(89, 0)
    scheduler.submit(sequence, 0.0)
    scheduler.step(0.0)
    step = scheduler.step(scheduler.due or 0.0)
    assert (step.yielded, step.finished) == ([], [sequence])
    assert sequence.first_token_at == pytest.approx(0.1)


def test_a_caller_that_is_late_by_less_than_a_pass_causes_no_drift() -> None:
    scheduler = engine(prefill_tokens_per_s=1e9)
    sequence = unique(1, 100)
    scheduler.submit(sequence, 0.0)
    scheduler.step(0.0)
    while (due := scheduler.due) is not None:
        scheduler.step(due + 0.005)
    assert sequence.last_token_at == pytest.approx(100 * 0.011 + 0.005, abs=1e-6)


def test_a_caller_that_is_very_late_loses_time_instead_of_bursting() -> None:
    scheduler = engine(prefill_tokens_per_s=1e9)
    sequence = unique(1, 100)
    scheduler.submit(sequence, 0.0)
    scheduler.step(0.0)
    scheduler.step(60.0)
    assert sequence.produced == 1
    assert scheduler.due == pytest.approx(60.011)


def test_before_a_pass_ends_nothing_happens() -> None:
    scheduler = engine()
    scheduler.submit(unique(1, 2), 0.0)
    scheduler.step(0.0)
    due = scheduler.due
    assert scheduler.step(0.001).yielded == []
    assert scheduler.due == due


@settings(max_examples=150)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 24), st.integers(0, 2), st.booleans(), st.floats(0, 0.5)),
        max_size=20,
    ),
    slots=st.integers(1, 5),
    blocks=st.integers(16, 40),
)
def test_every_request_ends_and_no_block_is_lost(
    requests: list[tuple[int, int, int, bool, float]], slots: int, blocks: int
) -> None:
    scheduler = engine(batch_slots=slots, kv_blocks=blocks)
    arrivals = sorted(
        ((at, aborted, hashed(prompt, output, family)) for prompt, output, family, aborted, at in requests),
        key=lambda arrival: arrival[0],
    )
    for at, aborted, sequence in arrivals:
        run(scheduler, until=at)
        scheduler.submit(sequence, at)
        if aborted:
            scheduler.step(at)
            scheduler.abort(sequence)
        assert 0 <= scheduler.pool.usage <= 1
        assert len(scheduler.running) <= slots
    run(scheduler)
    for _, aborted, sequence in arrivals:
        assert sequence.state is (State.ABORTED if aborted else State.FINISHED) or (
            aborted and sequence.state is State.FINISHED
        )
        if sequence.state is State.FINISHED:
            assert sequence.produced == sequence.output_tokens
    assert (scheduler.pool.free, scheduler.due) == (blocks, None)
    assert not scheduler.running
    assert not scheduler.waiting
