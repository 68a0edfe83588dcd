"""A rollout's decisions by themselves: figures and time in, verdicts out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cluster.kubernetes.rollout import (
    FAILED,
    Change,
    Objective,
    Phase,
    Plan,
    Seen,
    State,
    decide,
    judge,
    options,
)
from serving.cluster.kubernetes.versions import applied, config_changes, config_volume, image_changes, in_place
from serving.errors import ClusterError
from tests.unit.kubernetes import kuberay

PLAN = Plan(share=20, observe_s=600, min_requests=200, start_s=3600, give_up_s=1800)
START = State("r", PLAN, "starting", 1000.0, "c-1")
OBSERVED = replace(START, phase="observing", candidate="c-2", share=20, reason="it was bad")
SEEN = Seen(now_s=1000.0, active="c-1", pending="c-2", traffic=20, capacity=40, upgrading=True, ready=True)


def figures(missed: float, requests: float = 1000, name: str = "ttft") -> tuple[Objective, ...]:
    return (Objective(name, requests, requests * missed),)


@pytest.mark.parametrize(
    ("new", "old", "bad", "good"),
    [
        (figures(0.01), figures(0.01), False, True),
        (figures(0.30), figures(0.01), True, False),
        # As bad as the old one already is.
        (figures(0.30), figures(0.30), False, True),
        (figures(0.50), figures(0.30), True, False),
        # The old one's figures are too few to excuse anything.
        (figures(0.30), figures(0.30, requests=20), True, False),
        (figures(0.30), None, True, False),
        # A little above the bound may be chance: neither bad nor good.
        (figures(0.06), figures(0.01), False, False),
        # Few requests: only what is beyond doubt is bad.
        (figures(0.10, requests=30), figures(0.01), False, False),
        (figures(0.90, requests=30), figures(0.01), True, False),
        (figures(0.00, requests=199), figures(0.01), False, False),
        (figures(0.00, requests=200), figures(0.01), False, True),
        # Failures have a bound of their own.
        (figures(0.04, name=FAILED), figures(0.0, name=FAILED), True, False),
        (figures(0.005, name=FAILED), figures(0.0, name=FAILED), False, True),
        # One objective is enough to be bad, and all must be good.
        (figures(0.01) + figures(0.3, name="itl"), None, True, False),
        (figures(0.01) + figures(0.0, requests=5, name="itl"), None, False, False),
        (None, figures(0.01), False, False),
        ((), figures(0.01), False, False),
    ],
)
def test_judgements(
    new: tuple[Objective, ...] | None, old: tuple[Objective, ...] | None, bad: bool, good: bool
) -> None:
    judgement = judge(PLAN, new, old)
    assert (judgement.bad, judgement.good) == (bad, good)
    assert judgement.reason


GOOD, BAD = figures(0.0), figures(0.9)


@pytest.mark.parametrize(
    ("state", "seen", "action", "phase"),
    [
        (START, replace(SEEN, traffic=0, capacity=0, ready=False), "wait", "starting"),
        (START, replace(SEEN, traffic=0, capacity=20, ready=False), "wait", "starting"),
        (START, replace(SEEN, traffic=0, capacity=0, ready=True), "wait", "starting"),
        (START, replace(SEEN, traffic=0, capacity=20), "shift", "shifting"),
        (START, replace(SEEN, traffic=0, ready=False, now_s=4601), "roll-back", "rolling-back"),
        (START, replace(SEEN, traffic=0, broken="DEPLOY_FAILED"), "roll-back", "rolling-back"),
        (START, replace(SEEN, traffic=0, rolling_back=True), "roll-back", "rolling-back"),
        (replace(OBSERVED, phase="shifting"), replace(SEEN, traffic=0), "wait", "shifting"),
        (replace(OBSERVED, phase="shifting"), replace(SEEN, traffic=20), "hold", "observing"),
        (replace(OBSERVED, phase="shifting"), replace(SEEN, traffic=0, new=BAD), "roll-back", "rolling-back"),
        (replace(OBSERVED, phase="shifting"), replace(SEEN, traffic=0, now_s=6401), "roll-back", "rolling-back"),
        (OBSERVED, replace(SEEN, new=GOOD, now_s=1599), "wait", "observing"),
        (OBSERVED, replace(SEEN, new=GOOD, now_s=1600), "shift", "shifting"),
        (OBSERVED, replace(SEEN, new=BAD, now_s=1001), "roll-back", "rolling-back"),
        (OBSERVED, replace(SEEN, new=None, now_s=1600), "wait", "observing"),
        (OBSERVED, replace(SEEN, new=None, now_s=3401), "roll-back", "rolling-back"),
        (OBSERVED, replace(SEEN, new=figures(0, requests=3), now_s=3401), "roll-back", "rolling-back"),
        (OBSERVED, replace(SEEN, new=GOOD, broken="DEPLOY_FAILED"), "roll-back", "rolling-back"),
        # All traffic moved, and KubeRay has made the new cluster the active one.
        (replace(OBSERVED, phase="shifting", share=100), replace(SEEN, active="c-2", pending="", upgrading=False), "done", "shifting"),
        (replace(OBSERVED, phase="rolling-back"), replace(SEEN, rolling_back=True), "wait", "rolling-back"),
        (replace(OBSERVED, phase="rolling-back"), replace(SEEN, pending="", upgrading=False), "rolled-back", "rolling-back"),
        # KubeRay had moved on before it heard: the old version comes back as a new cluster.
        (replace(OBSERVED, phase="rolling-back"), replace(SEEN, active="c-2", pending="c-3"), "wait", "rolling-back"),
        (replace(OBSERVED, phase="rolling-back"), replace(SEEN, active="c-3", pending="", upgrading=False), "rolled-back", "rolling-back"),
    ],
)  # fmt: skip
def test_verdicts(state: State, seen: Seen, action: str, phase: str) -> None:
    verdict = decide(state, seen)
    assert (verdict.action, verdict.state.phase) == (action, phase)
    assert verdict.reason


def test_shares_are_even_and_end_at_all() -> None:
    assert Plan(share=20).shares() == (20, 40, 60, 80, 100)
    assert Plan(share=30).shares() == (30, 60, 90, 100)
    assert Plan(share=100).shares() == (100,)
    assert Plan(incremental=False).shares() == (100,)


@pytest.mark.parametrize(("phase", "step"), [("starting", 0), ("observing", 0), ("shifting", 20), ("rolling-back", 20)])
def test_a_hold_is_a_step_of_zero_and_the_surge_never_changes(phase: Phase, step: int) -> None:
    told = options(replace(OBSERVED, phase=phase))
    assert told is not None
    assert (told["stepSizePercent"], told["maxSurgePercent"]) == (step, 20)
    assert told["intervalSeconds"] == (10 if phase == "rolling-back" else 600)
    assert options(replace(OBSERVED, phase=phase, plan=Plan(incremental=False))) is None


@given(
    requests=st.floats(0, 1e6),
    missed=st.floats(0, 1),
    other=st.floats(0, 1),
    passed=st.floats(0, 1e5),
    traffic=st.integers(0, 100),
)
def test_traffic_only_grows_on_good_figures(
    requests: float, missed: float, other: float, passed: float, traffic: int
) -> None:
    seen = replace(
        SEEN,
        now_s=1000 + passed,
        traffic=traffic,
        new=figures(missed, requests),
        old=figures(other, 1000),
    )
    verdict = decide(OBSERVED, seen)
    if verdict.action == "shift":
        assert passed >= PLAN.observe_s
        assert requests >= PLAN.min_requests
        assert missed <= max(PLAN.most_missed, PLAN.most_worse * other) + 1e-9
    if missed * requests == 0 and verdict.action == "roll-back":
        assert passed > PLAN.observe_s + PLAN.give_up_s


@given(requests=st.floats(1, 1e6), missed=st.floats(0, 1))
def test_the_lower_bound_is_one(requests: float, missed: float) -> None:
    objective = Objective("ttft", requests, requests * missed)
    assert 0 <= objective.at_least() <= objective.ratio + 1e-9


def test_a_state_survives_its_annotation() -> None:
    state = replace(
        OBSERVED, changes=(Change(("spec", "a", 0, "b"), {"x": [1]}, "y"),), strategy={"type": "NewCluster"}, reason="é"
    )
    assert State.load(state.dump()) == state
    for text in ("", "{}", "[]", "null", '{"plan": {}}', state.dump().replace("phase", "fase")):
        with pytest.raises(ClusterError, match="galerne/rollout"):
            State.load(text)


def test_changes_forth_and_back_are_exact() -> None:
    service = kuberay.service()
    changes = image_changes(service, "registry/galerne:2") + config_changes(service, "other", "after")
    assert len(changes) == 3 + 3 + 1
    new = applied(kuberay.service(), changes)
    assert in_place(new, changes)
    assert new["spec"] != kuberay.service()["spec"]
    assert applied(new, changes, back=True) == kuberay.service()
    assert not in_place(kuberay.service(), changes)


def test_only_containers_of_the_present_image_change() -> None:
    service = kuberay.service()
    spec = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    spec["containers"].append({"name": "side", "image": "other:1"})
    spec["initContainers"] = [{"name": "init", "image": "registry/galerne:1"}]
    paths = [change.path for change in image_changes(service, "registry/galerne:2")]
    assert len(paths) == 4
    assert not any("containers" in path and 1 in path[-2:-1] for path in paths[:2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(serveConfigV2="applications: []"), "no config_path"),
        (lambda s: s.update(serveConfigV2="a: ["), "no YAML"),
        (lambda s: _pod(s)["containers"][0].update(volumeMounts=[]), "part of the image"),
        (lambda s: _pod(s)["volumes"][0].update(secret=None, emptyDir={}), "neither a Secret nor a ConfigMap"),
    ],
)
def test_a_configuration_that_cannot_be_swapped(change: object, says: str) -> None:
    service = kuberay.service()
    change(service["spec"])  # type: ignore[operator]
    with pytest.raises(ClusterError, match=says):
        config_volume(service)


def _pod(spec: dict) -> dict:
    return spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
