"""Arrival times: their rate, their burstiness, and nothing before, after or out of order."""

from __future__ import annotations

import random
import statistics
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.arrivals import constant, gamma, poisson, profile, trace, until


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def _cv(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


def test_constant_is_a_clock_without_drift() -> None:
    assert list(until(constant(10.0), 0.35)) == [0.0, 0.1, 0.2, 0.3]
    assert list(islice(constant(3.0), 3_000_001))[-1] == 1_000_000.0


def test_poisson_has_its_rate_and_a_cv_of_one() -> None:
    times = list(islice(poisson(5.0, random.Random(1)), 20_000))
    # Four standard errors: of the mean 1/sqrt(n), of the CV of an exponential about 1/sqrt(n) too.
    assert len(times) / times[-1] == pytest.approx(5.0, rel=4 / 20_000**0.5)
    assert _cv(_gaps(times)) == pytest.approx(1.0, abs=4 / 20_000**0.5)


@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 2.5])
def test_gamma_has_its_rate_and_its_cv(cv: float) -> None:
    times = list(islice(gamma(5.0, cv, random.Random(2)), 40_000))
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.001 + 4 * cv / 40_000**0.5)
    assert _cv(_gaps(times)) == pytest.approx(cv, rel=0.06, abs=1e-6)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_a_short_window_holds_what_the_rate_promises(cv: float) -> None:
    # An ordinary renewal process of CV 4 would bring 7.5 more than 20 arrivals, one of CV 0 half of one less.
    counts = [sum(1 for _ in until(gamma(2.0, cv, random.Random(seed)), 10.0)) for seed in range(4000)]
    error = statistics.pstdev(counts) / len(counts) ** 0.5
    assert statistics.fmean(counts) == pytest.approx(20.0, abs=4 * error + 0.01)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 4)), min_size=1, max_size=6),
    st.floats(0, 3),
    st.integers(0, 1000),
)
def test_a_profile_ascends_stays_within_its_steps_and_rests_at_rate_zero(
    steps: list[tuple[float, float]], cv: float, seed: int
) -> None:
    times = list(profile(steps, random.Random(seed), cv=cv))
    assert times == sorted(times)
    start_s = 0.0
    for length_s, rate_rps in steps:
        if rate_rps == 0:
            assert not [at_s for at_s in times if start_s < at_s < start_s + length_s]
        start_s += length_s
    assert all(0 <= at_s <= start_s for at_s in times)


def test_each_step_of_a_profile_has_its_rate() -> None:
    steps = [(1000.0, 2.0), (500.0, 0.0), (1000.0, 8.0), (2000.0, 1.0)]
    times = list(profile(steps, random.Random(3)))
    begun = 0.0
    for length_s, rate_rps in steps:
        count = sum(begun <= at_s < begun + length_s for at_s in times)
        expected = length_s * rate_rps
        assert count == pytest.approx(expected, abs=4 * expected**0.5)
        begun += length_s


def test_the_steps_before_a_changed_one_keep_their_arrivals() -> None:
    one, other = (list(profile([(60.0, 2.0), (60.0, rate)], random.Random(4))) for rate in (1.0, 9.0))
    assert [at_s for at_s in one if at_s < 60] == [at_s for at_s in other if at_s < 60]
    assert len(one) < len(other)


def test_a_regular_profile_is_the_inverse_of_the_integrated_rate() -> None:
    # Half a request expected a second, then two: gaps of 2 s, of 0.5 s, and the one across carried over exactly.
    times = list(profile([(5.0, 0.5), (2.0, 2.0)], random.Random(5), cv=0))
    expected = [at_s * 0.5 if at_s <= 5 else 2.5 + (at_s - 5) * 2 for at_s in times]
    assert [after - before for before, after in pairwise(expected)] == pytest.approx([1.0] * (len(times) - 1))
    assert len(times) in {6, 7}


def test_a_trace_is_cut_and_hurried() -> None:
    recorded = [0.0, 5.0, 10.0, 12.0, 19.0, 30.0, 31.0]
    replayed = list(trace(recorded, time_s=float, from_s=10.0, speed=2.0, until_s=10.0))
    assert replayed == [(0.0, 10.0), (1.0, 12.0), (4.5, 19.0)]


def test_a_trace_is_read_no_further_than_needed() -> None:
    source = iter([0.0, 1.0, 2.0, 3.0])
    assert [at_s for at_s, _ in trace(source, time_s=float, until_s=1.5)] == [0.0, 1.0]
    assert next(source) == 3.0


@pytest.mark.parametrize("rate_rps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused_at_once(rate_rps: float) -> None:
    rng = random.Random(0)
    for make in (lambda: constant(rate_rps), lambda: poisson(rate_rps, rng), lambda: gamma(rate_rps, 1.0, rng)):
        with pytest.raises(ValueError, match="must be above 0"):
            make()


def test_other_impossible_processes_are_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="coefficient of variation of -1"):
        gamma(1.0, -1.0, rng)
    with pytest.raises(ValueError, match="neither may be below 0"):
        profile([(1.0, -1.0)], rng)
    with pytest.raises(ValueError, match="speed 0"):
        trace([0.0], time_s=float, speed=0.0, until_s=1.0)
