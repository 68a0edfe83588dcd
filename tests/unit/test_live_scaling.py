"""The policy in a controller: starts that are measured, wakes, paces, troubles; and what Ray Serve is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.autoscaling.live import ModelScaler, View
from serving.autoscaling.snapshot import Signal
from serving.autoscaling.starts import Starts
from serving.config import GatewayConfig, ModelConfig
from serving.metrics.autoscaler import AutoscalerMetrics


def ids(*names: str) -> frozenset[str]:
    return frozenset(names)


def test_a_start_lasts_from_being_asked_for_to_being_ready() -> None:
    starts = Starts(45.0)
    assert starts.observe(100.0, ids("a"), 1, None) == ()  # what ran before we looked started for nobody
    assert starts.start_s == 45.0
    starts.observe(110.0, ids("a"), 3, 110.0)
    assert starts.starting_s(114.0) == (4.0, 4.0)
    (first,) = starts.observe(122.0, ids("a", "b"), 3, 110.0)
    assert (first.replica, first.seconds) == ("b", 12.0)
    assert starts.starting_s(122.0) == (12.0,)
    assert starts.start_s == 12.0
    starts.observe(125.0, ids("a", "b"), 2, 110.0)  # the third is not wanted any more
    assert starts.starting_s(125.0) == ()


def test_a_start_that_began_while_nobody_looked_counts_from_when_the_target_grew() -> None:
    starts = Starts(45.0)
    starts.observe(100.0, ids(), 0, None)
    # Serve woke the model by itself at 101 and asked again only when it was there.
    (woken,) = starts.observe(109.0, ids("a"), 1, 101.0)
    assert woken.seconds == 8.0


def test_a_lost_replica_is_started_anew() -> None:
    starts = Starts(45.0)
    starts.observe(100.0, ids("a", "b"), 2, None)
    starts.observe(150.0, ids("a"), 2, None)
    (again,) = starts.observe(157.0, ids("a", "c"), 2, None)
    assert again.seconds == 7.0


@given(st.lists(st.tuples(st.sets(st.sampled_from("abcdef"), max_size=6), st.integers(0, 6)), max_size=40))
def test_never_more_starts_than_are_missing(steps: list[tuple[set[str], int]]) -> None:
    starts = Starts(45.0)
    for now_s, (ready, target) in enumerate(steps):
        done = starts.observe(float(now_s), frozenset(ready), target, None)
        assert len(starts.starting_s(now_s)) == max(0, target - len(ready))
        assert all(s.seconds >= 0 for s in done)


@dataclass
class Rig:
    """A scaler with signals and a clock in hand."""

    fields: dict[str, Any] = field(default_factory=dict)
    signals: dict[str, Signal] = field(default_factory=dict)
    now_s: float = 1000.0
    metrics: AutoscalerMetrics = field(default_factory=AutoscalerMetrics)
    reads: int = 0

    def __post_init__(self) -> None:
        model = ModelConfig.model_validate(
            {
                "id": "m",
                "source": "fake:m",
                "replicas": {"min": 0, "max": 4},
                "autoscaling": {"decision_interval_s": 5.0, "idle_s": 60.0},
                "fake": {"batch_slots": 4},
            }
            | self.fields
        )
        self.scaler = ModelScaler(model, self.read, self.metrics, clock=lambda: self.now_s)

    def read(self, model: str) -> dict[str, Signal]:
        assert model == "m"
        self.reads += 1
        return self.signals

    def tell(self, **values: float) -> None:
        """Fresh signals; of the others there are none."""
        self.signals = {name: Signal(value, 2.0) for name, value in values.items()}

    def ask(self, ready: int, target: int, **view: Any) -> int:
        names = frozenset(f"r{i}" for i in range(ready))
        return self.scaler(View(self.now_s, names, target, **view))

    def total(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def test_a_decision_is_made_at_its_interval_and_held_between() -> None:
    rig = Rig()
    rig.tell(arrivals_rps=0.0, running=0.0, waiting=0.0, held=0.0)
    for _ in range(100):
        assert rig.ask(1, 1) == 1
        rig.now_s += 0.1
    assert rig.reads == 2


def test_signals_that_are_missing_hold_and_are_told() -> None:
    rig = Rig()
    rig.signals = {"arrivals_rps": Signal(math.nan, 1.0)}
    assert rig.ask(2, 3) == 3
    assert rig.total("galerne_autoscaler_stale") == 1
    assert rig.total("galerne_autoscaler_decisions_total", reason="stale") == 1
    rig.now_s += 5
    rig.tell(arrivals_rps=0.0, running=2.0, waiting=0.0)
    assert rig.ask(3, 3) == 3
    assert rig.total("galerne_autoscaler_stale") == 0


def test_trouble_in_a_decision_leaves_the_target() -> None:
    rig = Rig()
    rig.signals = {"no_such_signal": Signal(1.0, 1.0)}
    assert rig.ask(2, 2) == 2
    assert rig.total("galerne_autoscaler_errors_total") == 1


def test_a_sleeping_model_sleeps_until_woken_and_is_then_not_sent_back_by_old_signals() -> None:
    rig = Rig()
    rig.tell(arrivals_rps=0.0, running=0.0, waiting=0.0, held=0.0)
    for _ in range(60):
        assert rig.ask(0, 0) == 0
        rig.now_s += 5
    # A gateway wakes it: Serve has set the target, and Prometheus has not heard of the request.
    woken_s = rig.now_s
    while rig.now_s < woken_s + 55:
        assert rig.ask(int(rig.now_s > woken_s + 10), 1, scaled_up_s=woken_s) == 1
        rig.now_s += 1
    while rig.now_s < woken_s + 90 and rig.ask(1, 1) == 1:
        rig.now_s += 1
    assert 60 <= rig.now_s - woken_s < 70  # idle_s after the wake it sleeps again


def test_a_stream_in_flight_keeps_a_model_awake() -> None:
    rig = Rig()
    rig.tell(arrivals_rps=0.0, running=1.0, waiting=0.0, held=0.0)
    for _ in range(60):
        assert rig.ask(1, 1) == 1
        rig.now_s += 5


def test_phases_of_a_start_are_exported_with_what_is_left_as_schedule() -> None:
    rig = Rig()
    rig.ask(0, 0)
    rig.now_s += 1
    rig.ask(0, 1, scaled_up_s=rig.now_s)
    rig.now_s += 12
    rig.ask(1, 1)
    assert rig.total("galerne_replica_start_seconds_count") == 0
    rig.now_s += 3
    rig.ask(1, 1, phases_s={"r0": {"load": 7.0, "compile": 2.0, "warm_up": 0.5}})
    rig.now_s += 3
    rig.ask(1, 1, phases_s={"r0": {"load": 7.0, "compile": 2.0, "warm_up": 0.5}})
    sums = {p: rig.total("galerne_replica_start_seconds_sum", phase=p) for p in ("schedule", "load", "compile")}
    assert sums == {"schedule": 2.5, "load": 7.0, "compile": 2.0}
    assert rig.total("galerne_replica_starts_total", outcome="ready") == 1


def test_failed_starts_are_counted_from_where_the_controller_began() -> None:
    rig = Rig()
    rig.ask(0, 1, failed_starts=3)  # counted by the controller before
    assert rig.total("galerne_replica_starts_total", outcome="failed") == 0
    rig.ask(0, 1, failed_starts=5)
    rig.ask(0, 1, failed_starts=5)
    assert rig.total("galerne_replica_starts_total", outcome="failed") == 2
    rig.ask(0, 1, failed_starts=0)  # a new cluster's count
    rig.ask(0, 1, failed_starts=1)
    assert rig.total("galerne_replica_starts_total", outcome="failed") == 3


# -- what Ray Serve is told


@dataclass(frozen=True)
class Replica:
    """Ray's ReplicaID, as far as it is read."""

    unique_id: str


def serve_config(**fields: Any) -> Any:
    from deployments.scaling import of_model

    model = ModelConfig.model_validate({"id": "m", "source": "fake:m"} | fields)
    return of_model(model, None, loopback=True)


def test_without_a_section_replicas_are_fixed() -> None:
    assert serve_config() is None


@pytest.mark.parametrize("desired", range(5))
@pytest.mark.parametrize("target", range(5))
def test_serve_leaves_the_policys_word_as_it_is(desired: int, target: int) -> None:
    from ray.serve.autoscaling_policy import _apply_autoscaling_config

    config = serve_config(replicas={"min": 0, "max": 4}, autoscaling={})
    context = SimpleNamespace(
        config=config,
        current_num_replicas=target,
        target_num_replicas=target,
        total_num_requests=0.0,
        policy_state={},
    )
    said, _ = _apply_autoscaling_config(lambda _: (desired, {}))(context)
    # From several to none by way of one.
    assert said == (1 if desired == 0 and target > 1 else desired)
    assert (config.min_replicas, config.max_replicas) == (0, 4)


def test_serve_wakes_a_model_from_a_queued_request_alone() -> None:
    from ray.serve.autoscaling_policy import _apply_autoscaling_config

    def never(_: Any) -> Any:
        raise AssertionError("the policy is not asked")

    context = SimpleNamespace(
        config=serve_config(replicas={"min": 0, "max": 4}, autoscaling={}),
        current_num_replicas=0,
        target_num_replicas=0,
        total_num_requests=1.0,
        policy_state={},
    )
    assert _apply_autoscaling_config(never)(context)[0] == 1


def test_the_policy_class_survives_its_way_to_the_controller() -> None:
    from ray.serve.config import AutoscalingContext

    config = serve_config(replicas={"min": 1, "max": 4}, autoscaling={})
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    # Ray's own class: what the policy reads of it is there.
    context = AutoscalingContext(
        deployment_id=None,
        deployment_name="engine-m",
        app_name="galerne",
        current_num_replicas=1,
        target_num_replicas=2,
        running_replicas=[Replica("a")],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=lambda: {"load_start_s": {Replica("a"): [SimpleNamespace(value=3.0)]}, "running_requests": {}},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=1000.0,
        config=config,
    )
    assert policy(context) == (2, {})


def test_gateways_follow_their_requests_only_where_they_may() -> None:
    from deployments.scaling import of_gateway

    assert of_gateway(GatewayConfig(replicas=3)) is None
    config = of_gateway(GatewayConfig.model_validate({"replicas": {"min": 2, "max": 5, "in_flight": 100}}))
    assert config is not None
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 100)
