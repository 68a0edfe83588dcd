"""What the benchmark of a step of load makes of a run's records and counts."""

from __future__ import annotations

from loadtest.autoscale import Phases, config, figures, needed, reached_s, scenario, settled
from loadtest.client import FailureKind
from loadtest.records import Outcome, Record
from loadtest.reports.model import ReplicaCount
from serving.config import GalerneConfig

PHASES = Phases(before_s=30, high_s=60, after_s=90, rate_rps=1.0)


def counts(*steps: tuple[float, int]) -> list[ReplicaCount]:
    """A sample a second, each step's count from its time on."""
    found, upcoming, now = [], list(steps), 0
    for t_s in range(180):
        while upcoming and t_s >= upcoming[0][0]:
            now = upcoming.pop(0)[1]
        found.append(ReplicaCount(float(t_s), "chat", now))
    return found


def record(at_s: float, ttft_s: float | None, outcome: Outcome = Outcome.COMPLETED) -> Record:
    chunks = () if ttft_s is None else (at_s + ttft_s, at_s + ttft_s + 1)
    failure = FailureKind.BROKEN_STREAM if outcome is Outcome.FAILED else None
    return Record(0, "bench", "chat", at_s, at_s, chunks, at_s + 3, 200, outcome, 10, 10, failure)


def test_times_and_overshoot_are_against_what_the_load_needs() -> None:
    # 8 x 200 and 0.05 x 2000 tokens a second, of 400 that one decodes.
    assert (needed(1.0), needed(8.0)) == (1, 5)
    ready = counts((0, 1), (50, 3), (58, 6), (65, 5), (120, 3), (140, 1))
    targets = counts((0, 1), (36, 5), (100, 1))
    found = figures(PHASES, [], ready, targets)
    assert (found["replicas_before"], found["replicas_high"], found["replicas_after"]) == (1, 5, 1)
    assert found["first_decision_s"] == 6
    assert found["time_to_target_s"] == 28
    assert found["overshoot_replicas"] == 1
    assert found["time_to_release_s"] == 50


def test_a_run_that_never_scales_has_no_time() -> None:
    ready = counts((0, 1))
    assert settled(ready, 30, 90) == 1
    assert reached_s(ready, 30, 2, up=True) is None
    assert settled([], 0, 30) is None
    assert figures(PHASES, [], [], [])["time_to_target_s"] is None


def test_attainment_and_losses() -> None:
    records = [
        record(10, 0.5),
        record(40, 0.5),
        record(50, 2.5),
        record(60, 0.1, Outcome.FAILED),
        record(61, None, Outcome.REJECTED),
        record(100, 1.9),
    ]
    found = figures(PHASES, records, counts((0, 1)), counts((0, 1)))
    assert found["slo_attainment_before"] == 1
    assert found["slo_attainment_high"] == 0.25
    assert found["slo_attainment_all"] == 0.5
    assert (found["streams_cut"], found["failed"], found["rejected"], found["completed"]) == (1, 1, 1, 4)


def test_the_cluster_and_the_scenario_are_what_they_should_be() -> None:
    made = scenario(PHASES, "k")
    assert made.total_s == 180
    steps = made.streams[0].arrivals.steps  # type: ignore[union-attr]
    assert [step.rate_rps for step in steps] == [1, 8, 1]
    tenants = [{"id": "bench", "keys": [{"id": "a", "sha256": "0" * 64}]}]
    checked = GalerneConfig.model_validate(config(6) | {"tenants": tenants})
    # Scaling down waits for the longest stream.
    assert checked.models[0].drain_timeout_s > 2000 * 0.02
