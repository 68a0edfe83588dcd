"""What the scaling policy promises whatever it is given: bounds, calm, belief only in fresh numbers."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.autoscaling.policy import REASONS, Memory, decide
from serving.autoscaling.settings import Settings
from serving.autoscaling.snapshot import Decision, Signal, Snapshot
from serving.config import ModelConfig

DAY_S = 86400.0


def model(**more: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "id": "m",
            "source": "fake:m",
            "replicas": {"min": 1, "max": 20},
            "slo": {"ttft_p95_s": 2.0, "itl_p95_s": 0.1},
            "autoscaling": {},
        }
        | more
    )


def fresh(value: float) -> Signal:
    return Signal(value, 5.0)


def snapshot(at_s: float, rps: float, *, target: int, **more: object) -> Snapshot:
    values: dict[str, object] = {
        "at_s": at_s,
        "ready": target,
        "target": target,
        "arrivals_rps": fresh(rps),
        "prompt_tokens": fresh(1000.0),
        "output_tokens": fresh(200.0),
        "held": fresh(0.0),
        "running": fresh(rps * 3),
        "waiting": fresh(0.0),
    }
    return Snapshot(**(values | more))  # type: ignore[arg-type]


def run(rates: list[float], *, start: int = 1, of: ModelConfig | None = None, at_s: float = DAY_S) -> list[Decision]:
    """A decision every five seconds, replicas ready at once."""
    told, memory, target, configured = [], Memory(), start, Settings.of(of or model())
    for i, rps in enumerate(rates):
        decision, memory = decide(snapshot(at_s + 5.0 * i, rps, target=target), memory, configured)
        target = decision.target
        told.append(decision)
    return told


numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1e6))
signals = st.builds(Signal, numbers, st.one_of(st.floats(0, 100), st.just(math.inf), st.floats(allow_nan=True)))
snapshots = st.builds(
    Snapshot,
    at_s=st.floats(0, 1e6),
    ready=st.integers(0, 30),
    target=st.integers(0, 30),
    starting_s=st.lists(st.floats(0, 300), max_size=4).map(tuple),
    start_s=st.floats(0.1, 1000),
    **{name: signals for name, kind in Snapshot.__annotations__.items() if kind == "Signal"},
)


@given(st.lists(snapshots, min_size=1, max_size=8), st.integers(0, 3), st.integers(3, 25))
@settings(max_examples=200)
def test_bounds_hold_whatever_is_measured(seen: list[Snapshot], least: int, most: int) -> None:
    configured = Settings.of(model(replicas={"min": least, "max": most}))
    memory = Memory()
    for one in sorted(seen, key=lambda s: s.at_s):
        decision, memory = decide(one, memory, configured)
        assert least <= decision.target <= most
        assert decision.reason in REASONS
        assert decision.explanation
        assert all(math.isfinite(value) for _, value in decision.terms)
    assert len(pickle.dumps(memory)) < 64 * 1024


@given(
    st.sampled_from(["arrivals_rps", "running", "waiting"]), st.sampled_from([None, math.nan, math.inf]), st.booleans()
)
def test_what_is_missing_stale_or_no_number_holds(name: str, value: float | None, old: bool) -> None:
    signal = Signal(10.0, 31.0) if old else Signal(value, 1.0)
    seen = replace(snapshot(DAY_S, 500.0, target=3), **{name: signal})
    decision, memory = decide(seen, Memory(), Settings.of(model()))
    assert (decision.target, decision.reason) == (3, "stale")
    assert memory == Memory()


@given(st.floats(0, 500), st.floats(0, 500), st.integers(1, 20))
def test_more_demand_never_means_fewer(one: float, other: float, target: int) -> None:
    low, high = sorted((one, other))
    few, _ = decide(snapshot(DAY_S, low, target=target), Memory(), Settings.of(model()))
    many, _ = decide(snapshot(DAY_S, high, target=target), Memory(), Settings.of(model()))
    assert few.target <= many.target


@given(st.floats(0.1, 300))
@settings(max_examples=30)
def test_a_constant_load_settles(rps: float) -> None:
    # The first margins are cautious and given up within an hour; then nothing moves.
    targets = [decision.target for decision in run([rps] * 1200)]
    assert len(set(targets[900:])) == 1
    changes = sum(a != b for a, b in itertools.pairwise(targets))
    assert changes <= 6


def test_it_sleeps_after_idle_s_and_wakes_at_once() -> None:
    lazy = model(replicas={"min": 0, "max": 3}, autoscaling={"idle_s": 60.0})
    told = run([1.0] * 10 + [0.0] * 60, of=lazy)
    assert [d.target for d in told[:21]] == [1] * 21
    assert told[-1].target == 0
    assert "idle" in {d.reason for d in told}
    asleep = replace(snapshot(DAY_S, 0.0, target=0), ready=0, held=fresh(1.0), running=Signal(), waiting=Signal())
    decision, _ = decide(replace(asleep, arrivals_rps=Signal()), Memory(), Settings.of(lazy))
    assert (decision.target, decision.reason) == (1, "wake")


@pytest.mark.parametrize("factor", [2, 5, 50])
def test_a_step_up_is_limited(factor: int) -> None:
    told = run([50.0] * 100 + [50.0 * factor] * 10, of=model(replicas={"min": 1, "max": 1000}))
    before, after = told[99].target, told[100].target
    assert before < after <= max(2 * before, before + 4)


def after(told_for: list[float], snapshots: list[Snapshot], of: ModelConfig) -> list[Decision]:
    """Decisions on snapshots that follow a quiet history at the first snapshot's target."""
    memory, configured, told = Memory(), Settings.of(of), []
    first = snapshots[0]
    for i, rps in enumerate(told_for):
        at_s = first.at_s - 5.0 * (len(told_for) - i)
        _, memory = decide(snapshot(at_s, rps, target=first.target), memory, configured)
    for one in snapshots:
        decision, memory = decide(one, memory, configured)
        told.append(decision)
    return told


def test_recovery_from_a_gap_is_no_jump() -> None:
    configured = Settings.of(model(replicas={"min": 1, "max": 100}))
    memory, target = Memory(), 10
    for i in range(60):
        decision, memory = decide(snapshot(DAY_S + 5 * i, 150.0, target=target), memory, configured)
        target = decision.target
    before = target
    for i in range(60, 120):
        lost = replace(snapshot(DAY_S + 5 * i, 150.0, target=target), arrivals_rps=Signal(150.0, 5.0 * (i - 59) + 30))
        decision, memory = decide(lost, memory, configured)
        assert (decision.target, decision.reason) == (before, "stale")
    # Demand fell meanwhile: what was low is not known to have been low all the time.
    low, memory = decide(snapshot(DAY_S + 600, 1.0, target=target), memory, configured)
    assert (low.target, low.reason) == (before, "cooldown")
    high, _ = decide(snapshot(DAY_S + 605, 3000.0, target=target), memory, configured)
    assert high.target <= max(2 * before, before + 4)


def test_replicas_go_only_after_less_did_for_long_enough_and_not_all_at_once() -> None:
    told = run([300.0] * 400 + [10.0] * 120, of=model(replicas={"min": 1, "max": 100}))
    targets = [decision.target for decision in told[399:]]
    # A start of 45 s and an answer; one less may be the end of the cautious margins.
    assert min(targets[: round(60 / 5) - 3]) >= targets[0] - 1
    assert all(after >= min(before * 0.9, before - 1) - 1 for before, after in itertools.pairwise(targets))
    assert targets[-1] < targets[0] / 2


def test_a_queue_asks_for_more_and_what_starts_is_credited() -> None:
    of = model(replicas={"min": 1, "max": 100})
    calm = replace(snapshot(DAY_S, 60.0, target=4), waiting=fresh(0.0))
    queued = replace(calm, waiting=fresh(2000.0))
    nearly = replace(queued, ready=4, target=8, starting_s=(44.0,) * 4)
    quiet, pressed, credited = (after([60.0] * 30, [one], of)[0] for one in (calm, queued, nearly))
    assert pressed.target > quiet.target
    assert pressed.reason in {"queue", "rate"}
    assert dict(credited.terms)["queue"] < dict(pressed.terms)["queue"]


def test_missed_targets_raise_the_error_term_and_kept_ones_lower_it() -> None:
    of = model(replicas={"min": 1, "max": 100})
    bad = [replace(snapshot(DAY_S + 5 * i, 20.0, target=4), ttft_missed=fresh(0.5)) for i in range(60)]
    good = [replace(snapshot(DAY_S + 5 * i, 20.0, target=4), ttft_missed=fresh(0.0)) for i in range(60)]
    worse, better = after([20.0] * 30, bad, of), after([20.0] * 30, good, of)
    assert dict(worse[-1].terms)["feedback"] > dict(worse[0].terms)["feedback"] > dict(better[-1].terms)["feedback"]
    assert worse[-1].target > better[-1].target


def test_at_first_nothing_goes_before_long_answers_can_have_ended() -> None:
    # A hundred times what is needed, answers of 20 s: the first are gone after ten of them, not before.
    long = {"output_tokens": fresh(2000.0), "prompt_tokens": fresh(100.0)}
    memory, target, configured, seen = Memory(), 20, Settings.of(model()), []
    for i in range(120):
        decision, memory = decide(snapshot(DAY_S + 5 * i, 0.1, target=target, **long), memory, configured)
        target = decision.target
        seen.append(target)
    assert seen[: round(150 / 5)] == [20] * round(150 / 5)
    assert seen[-1] < 20


def test_a_queue_that_does_not_shrink_says_that_replicas_are_full() -> None:
    of = model(replicas={"min": 1, "max": 100})
    # By the reckoning four replicas have room; all the same a hundred requests wait, and go on waiting.
    stuck = [replace(snapshot(DAY_S + 5 * i, 40.0, target=4), waiting=fresh(100.0)) for i in range(20)]
    shrinking = [replace(one, waiting=fresh(max(100.0 - 8 * i, 0.0))) for i, one in enumerate(stuck)]
    stays, shrinks = after([40.0] * 30, stuck, of), after([40.0] * 30, shrinking, of)
    assert dict(stays[0].terms)["demand"] < 3.0
    assert dict(stays[-1].terms)["demand"] == pytest.approx(4.0)
    assert dict(shrinks[-1].terms)["demand"] < 3.0
    assert stays[-1].target > shrinks[-1].target


def test_the_schedule_is_a_floor_within_the_maximum() -> None:
    # The second of January 1970 was a Friday; midday in Paris is 11:00 UTC in winter.
    entry = {"days": ["fri"], "from": "11:30", "to": "12:30", "min": 50}
    of = model(autoscaling={"schedule": [entry], "timezone": "Europe/Paris"})
    at_noon, _ = decide(snapshot(DAY_S + 11 * 3600, 0.1, target=1), Memory(), Settings.of(of))
    assert (at_noon.target, at_noon.reason) == (20, "schedule")
    later, _ = decide(snapshot(DAY_S + 12 * 3600, 0.1, target=1), Memory(), Settings.of(of))
    assert later.target == 1


@pytest.mark.parametrize(
    ("start", "to", "hour", "holds"),
    [
        ("22:00", "02:00", 23, True),
        ("22:00", "02:00", 25, True),
        ("22:00", "02:00", 3, False),
        ("00:00", "24:00", 3, True),
    ],
)
def test_a_floor_over_midnight_belongs_to_the_day_it_begins_on(start: str, to: str, hour: int, holds: bool) -> None:
    of = model(autoscaling={"schedule": [{"days": ["fri"], "from": start, "to": to, "min": 7}]})
    decision, _ = decide(snapshot(DAY_S + hour * 3600, 0.1, target=1), Memory(), Settings.of(of))
    assert (decision.target == 7) is holds


def test_an_unmeasured_engine_is_scaled_by_the_signs_of_strain() -> None:
    of = model(source="hf:some/model", replicas={"min": 1, "max": 50})
    strained = [replace(snapshot(DAY_S + 5 * i, 20.0, target=4), waiting=fresh(40.0)) for i in range(3)]
    assert after([20.0] * 10, strained, of)[-1].target == 5
    # What was asked for has not come yet: no more of it.
    warming = [replace(one, target=5, starting_s=(5.0,)) for one in strained]
    assert after([20.0] * 10, warming, of)[-1].target == 5
    # The same work at a quarter of its rate: replicas that proved to do four times as much are too many.
    lighter = [replace(snapshot(DAY_S + 5 * i, 5.0, target=4), kv_use=fresh(0.5)) for i in range(60)]
    assert after([20.0] * 30, lighter, of)[-1].target < 4


def test_yesterdays_rush_is_met_ahead() -> None:
    of = model(replicas={"min": 1, "max": 100})
    day = [20.0] * 4320 + [200.0] * 720 + [20.0] * 12240

    def target_before_the_rush(days: int, *, forecast: bool) -> int:
        configured = Settings.of(
            model(replicas={"min": 1, "max": 100}, autoscaling={"forecast": forecast, "start_s": 300.0})
        )
        memory, target, i = Memory(), 1, 0
        for rps in (day * days)[: 17280 * (days - 1) + 4318]:
            one = replace(snapshot(DAY_S + 5.0 * i, rps, target=target), start_s=300.0)
            decision, memory = decide(one, memory, configured)
            target, i = decision.target, i + 1
        assert len(pickle.dumps(memory)) < 64 * 1024
        return target

    assert of.autoscaling is not None
    assert target_before_the_rush(2, forecast=True) > target_before_the_rush(2, forecast=False)
