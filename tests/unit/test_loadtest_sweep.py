"""The search for capacity: close to the truth, bounded, and honest where it cannot tell."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.cli.sweep import summary
from loadtest.sweep import Decision, SearchSettings, decide, search, told, wilson


def test_the_interval_is_wilsons() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_few_requests_decide_nothing() -> None:
    assert decide(10, 10, 0.95) is Decision.UNDECIDED
    assert decide(1000, 1000, 0.95) is Decision.PASSED
    assert decide(900, 1000, 0.95) is Decision.FAILED


@settings(max_examples=100)
@given(st.floats(0.02, 500), st.floats(0.05, 20), st.floats(0.02, 0.5))
def test_a_sharp_limit_is_enclosed_as_closely_as_was_asked(limit: float, start: float, precision: float) -> None:
    found = search(
        SearchSettings(start=start, precision=precision), lambda factor: (1000 if factor <= limit else 500, 1000)
    )
    assert found.passed is not None
    assert found.failed is not None
    assert found.passed <= limit < found.failed <= found.passed * (1 + precision)
    assert len(found.steps) <= 30
    assert not list(told(found.steps))


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_a_noisy_limit_is_found_within_a_factor(seed: int) -> None:
    rng = random.Random(seed)

    def measure(factor: float) -> tuple[int, int]:
        # Good shares of 0.99 far below ten, 0.5 far above.
        share = 0.99 if factor < 9 else 0.5 if factor > 11 else 0.95
        return sum(rng.random() < share for _ in range(200)), 200

    found = search(SearchSettings(), measure)
    assert found.passed is not None
    assert 4 < found.passed < 12
    assert len(found.steps) <= 30


def test_what_passes_nowhere_and_what_passes_everywhere_end() -> None:
    nowhere = search(SearchSettings(), lambda _factor: (0, 100))
    assert nowhere.passed is None
    assert nowhere.failed is not None
    assert nowhere.failed >= 0.01
    everywhere = search(SearchSettings(), lambda _factor: (1000, 1000))
    assert (everywhere.passed, everywhere.failed) == (512.0, None)
    assert summary(everywhere, [])["passed_factor"] == 512.0


def test_an_undecided_step_is_repeated_and_then_called_close() -> None:
    asked: list[float] = []

    def measure(factor: float) -> tuple[int, int]:
        asked.append(factor)
        return (0, 100) if factor > 1 else (19, 20)

    found = search(SearchSettings(precision=0.9), measure)
    assert asked[:3] == [1.0, 1.0, 1.0]
    assert found.steps[0].close
    assert found.steps[0].decision is Decision.PASSED
    assert found.steps[0].requests == 60
    assert "57 of 60 good" in next(iter(told(found.steps)))
