"""Statistics over measured samples: exact, paired, refusing what does not exist."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.stats import Spread, pairwise, quantiles, spread


@pytest.mark.parametrize(
    ("values", "level", "expected"),
    [
        ([5.0], 0.0, 5.0),
        ([5.0], 0.99, 5.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 1001)], 0.99, 990.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_quantile_is_the_nearest_rank(values: list[float], level: float, expected: float) -> None:
    assert quantiles(values, level) == (expected,)


def test_several_levels_come_in_their_order() -> None:
    assert quantiles([1.0, 2.0, 3.0], 1.0, 0.5) == (3.0, 2.0)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.floats(0, 1))
def test_a_quantile_is_a_sample_with_enough_samples_at_or_below(values: list[float], level: float) -> None:
    (found,) = quantiles(values, level)
    assert found in values
    assert sum(value <= found for value in values) >= level * len(values)
    assert sum(value < found for value in values) <= level * len(values)


@pytest.mark.parametrize("level", [-0.1, 1.1])
def test_a_level_outside_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="outside 0"):
        quantiles([1.0], level)


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantiles([], 0.5)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_spread_tells_median_and_range() -> None:
    assert spread([3.0, 1.0, 10.0, 2.0]) == Spread(median=2.5, low=1.0, high=10.0, count=4)


def test_pairs_are_compared_before_the_median() -> None:
    # A drift that both targets share: the ratio of medians would be 1.5, the median ratio is 2.
    first, second = [1.0, 10.0, 2.0], [2.0, 3.0, 4.0]
    assert pairwise(first, second, ratio=True) == Spread(median=2.0, low=0.3, high=2.0, count=3)
    assert pairwise(first, second, ratio=False) == Spread(median=1.0, low=-7.0, high=2.0, count=3)


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pairwise([1.0, 2.0], [1.0], ratio=True)
