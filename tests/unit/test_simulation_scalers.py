"""The peers' policies against what their documentation, or their own code, does."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from serving.simulation.scalers import Hpa, RayDefault, desired_by_ray

ray_policy = pytest.importorskip("ray.serve.autoscaling_policy")
ray_config = pytest.importorskip("ray.serve.config")


def test_rays_defaults_are_what_we_take() -> None:
    defaults = ray_config.AutoscalingConfig()
    assert defaults.target_ongoing_requests == RayDefault.TARGET_ONGOING
    assert defaults.look_back_period_s == RayDefault.LOOK_BACK_S
    assert defaults.upscale_delay_s == RayDefault.UP_DELAY_S
    assert defaults.downscale_delay_s == RayDefault.DOWN_DELAY_S
    assert defaults.get_upscaling_factor() == defaults.get_downscaling_factor() == 1


def test_our_copy_of_rays_delays_decides_as_ray_does() -> None:
    rng = random.Random(3)
    config = ray_config.AutoscalingConfig(min_replicas=1, max_replicas=50)
    mine, state = RayDefault(1, 50), {}
    ours = theirs = 5
    for step in range(2000):
        now_s = 5.0 * step
        # Wishes that last: up, down, and interrupted.
        wanted = 5 + (step // 140) % 3 * 6 if rng.random() < 0.97 else rng.randint(1, 20)
        ours = mine.delayed(wanted, ours, now_s)
        theirs, state = ray_policy._apply_delay_logic(wanted, theirs, config, state, _now=now_s)
        assert ours == theirs, step


@pytest.mark.parametrize("current", [1, 3, 20])
@pytest.mark.parametrize("ongoing", [0.0, 1.0, 7.3, 40.0, 500.0])
def test_our_copy_of_rays_formula_wishes_as_ray_does(current: int, ongoing: float) -> None:
    config = ray_config.AutoscalingConfig(min_replicas=1, max_replicas=50)
    # `replica_queue_length_autoscaling_policy`: requests over the target, then Ray's scaling factors and bounds.
    theirs = ray_policy._apply_scaling_factors(ongoing / config.get_target_ongoing_requests(), current, config)
    assert desired_by_ray(ongoing, current, 2.0, 1, 50) == min(max(theirs, 1), 50)


class _Cluster:
    """As much of a cluster as a scaler looks at."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.target = 1


class _Seen:
    def __init__(self, waiting: float) -> None:
        self.waiting = waiting


class _Meter:
    """Waiting requests as they are given."""

    def __init__(self) -> None:
        self.waiting = 0.0

    def before(self, _seconds: float, *, late: int = 1) -> tuple[_Seen, _Seen]:
        return _Seen(self.waiting), _Seen(self.waiting)


def played(waiting: Iterable[float], *, start: int = 1, most: int = 100) -> list[int]:
    cluster, meter, hpa, targets = _Cluster(), _Meter(), Hpa(1, most), []
    cluster.target = start
    for step, number in enumerate(waiting):
        cluster.now_s, meter.waiting = 5.0 * step, number
        cluster.target = hpa.target(cluster, meter)  # type: ignore[arg-type]
        targets.append(cluster.target)
    return targets


def test_hpa_goes_up_by_four_or_twofold_in_fifteen_seconds() -> None:
    assert played([500.0] * 13, start=1) == [5] * 3 + [10] * 3 + [20] * 3 + [40] * 3 + [80]


def test_hpa_goes_down_to_the_highest_wish_of_five_minutes() -> None:
    targets = played([50.0] * 3 + [0.0] * 70, start=10)
    assert targets[59] == 10
    assert targets[72] == 1


def test_hpa_tolerates_a_tenth() -> None:
    assert played([54.0] * 6, start=10) == [10] * 6
    assert played([56.0] * 6, start=10)[-1] == 12
