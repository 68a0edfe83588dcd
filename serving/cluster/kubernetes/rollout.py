"""The decisions of a rollout, as pure functions of what is planned, what was done and what is seen.

A rollout uses what KubeRay 1.7 really does. Pods of the new version form a second RayCluster; with the strategy
NewClusterWithIncrementalUpgrade KubeRay moves `stepSizePercent` of the traffic to it every `intervalSeconds`, never
beyond its share of the capacity. A step of 0 is a hold: that is how a share is kept until its figures are judged. The
interval is as long as a share is observed. A command that ends while a share is held leaves it held for good; one that
is interrupted on the way to a share holds first; only one that is killed in that moment leaves KubeRay to go on by
itself, one share an interval. Reverting the pods' specification makes KubeRay lead all traffic back to the old
cluster, which has kept its replicas. With the strategy NewCluster there are no shares: all traffic moves once the new
cluster is ready, it is judged afterwards, and the way back is a start of the old version.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from serving.errors import ClusterError

ANNOTATION: Final = "galerne/rollout"
ALL: Final = 100
# Standard normal quantile of a one-sided 97.5%: how sure one is before traffic is led back early.
_Z: Final = 1.96

Phase = Literal["starting", "shifting", "observing", "rolling-back"]
Action = Literal["wait", "shift", "hold", "roll-back", "done", "rolled-back"]
Path = tuple[str | int, ...]
FINAL: Final[frozenset[Action]] = frozenset({"done", "rolled-back"})


@dataclass(frozen=True, slots=True)
class Plan:
    """How careful a rollout is; shares in percent of the traffic."""

    # False: strategy NewCluster, no shares.
    incremental: bool = True
    # Traffic and capacity move by so much at a time, always the same: KubeRay takes as much capacity from the old
    # version as it may add to the new one, and with unequal steps the old one would have less than its traffic needs.
    share: int = 20
    # A share is observed for so long, and until so many requests of it were counted.
    observe_s: float = 600.0
    min_requests: int = 200
    # Shares of requests that may miss a latency target, or fail; or so many times the old version's share.
    most_missed: float = 0.05
    most_failed: float = 0.01
    most_worse: float = 1.5
    # The new version must be ready within it; a share must have enough requests within `give_up_s`.
    start_s: float = 3600.0
    give_up_s: float = 7200.0

    def shares(self) -> tuple[int, ...]:
        """Every share that is observed, and 100."""
        return (*range(self.share, ALL, self.share), ALL) if self.incremental else (ALL,)

    def next_share(self, share: int) -> int:
        """The share after this one."""
        return min(ALL, share + self.share)


@dataclass(frozen=True, slots=True)
class Change:
    """One value of the RayService that the new version has; `old` brings the old one back."""

    path: Path
    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class State:
    """What was done so far; kept on the RayService, so that any later command can go on or back."""

    revision: str
    plan: Plan
    phase: Phase
    # When the phase began, seconds since the epoch.
    since_s: float
    # The cluster that served when it began, and the new version's once it is known.
    origin: str
    candidate: str = ""
    # Traffic that the present phase aims at or observes, percent.
    share: int = 0
    reason: str = ""
    changes: tuple[Change, ...] = ()
    # spec.upgradeStrategy as it was.
    strategy: Any = None

    def dump(self) -> str:
        """As the annotation has it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> State:
        """Of the annotation; ClusterError where it is none of ours."""
        try:
            found = json.loads(text)
            found["plan"] = Plan(**found["plan"])
            found["changes"] = tuple(Change(tuple(c["path"]), c["old"], c["new"]) for c in found["changes"])
            return cls(**found)
        except (ValueError, TypeError, KeyError) as error:
            raise ClusterError(f"the annotation {ANNOTATION} is none that this version wrote: {error}") from error


@dataclass(frozen=True, slots=True)
class Objective:
    """Requests of one version that were counted for an objective, and those that missed it."""

    name: str
    requests: float
    missed: float

    @property
    def ratio(self) -> float:
        """Share that missed; 0 of none."""
        return self.missed / self.requests if self.requests > 0 else 0.0

    def at_least(self) -> float:
        """Lower end of Wilson's interval for the share that misses: chance alone hardly makes it look worse."""
        n = self.requests
        if n < 1:  # Prometheus extrapolates: a part of a request says nothing
            return 0.0
        p = min(1.0, self.ratio)
        centre = p + _Z * _Z / (2 * n)
        spread = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + _Z * _Z / n))


FAILED: Final = "errors"


@dataclass(frozen=True, slots=True)
class Seen:
    """The service as KubeRay and Prometheus tell it. Objectives are None where Prometheus has no answer."""

    now_s: float
    active: str
    pending: str = ""
    # Percent; None where KubeRay does not say.
    traffic: int | None = None
    capacity: int | None = None
    upgrading: bool = False
    rolling_back: bool = False
    # Every deployment of the new version is healthy.
    ready: bool = False
    # Why the new version will not come up by itself.
    broken: str = ""
    new: tuple[Objective, ...] | None = None
    old: tuple[Objective, ...] | None = None
    # Why there are no figures.
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do now, and why; `state` is what holds afterwards."""

    action: Action
    reason: str
    state: State


@dataclass(frozen=True, slots=True)
class Judgement:
    """How the new version does: bad, good, or not known yet."""

    bad: bool
    good: bool
    reason: str


def judge(plan: Plan, new: tuple[Objective, ...] | None, old: tuple[Objective, ...] | None) -> Judgement:
    """Compare the new version with its bounds and with the old one."""
    if new is None:
        return Judgement(False, False, "Prometheus has no figures of the new version")
    before = {objective.name: objective for objective in old or ()}
    waiting = ""
    for objective in new:
        allowed = plan.most_failed if objective.name == FAILED else plan.most_missed
        other = before.get(objective.name)
        if other is not None and other.requests >= plan.min_requests:
            allowed = max(allowed, plan.most_worse * other.ratio)
        told = f"{objective.name}: {objective.ratio:.1%} of {objective.requests:.0f} missed, {allowed:.1%} allowed"
        if objective.at_least() > allowed:
            return Judgement(True, False, told)
        if objective.requests < plan.min_requests:
            waiting = waiting or f"{objective.name}: {objective.requests:.0f} of {plan.min_requests} requests counted"
        elif objective.ratio > allowed:
            waiting = waiting or told
    if not new:
        return Judgement(False, False, "no requests of the new version are counted yet")
    worst = max(new, key=lambda o: o.ratio)
    return Judgement(False, not waiting, waiting or f"{worst.name}: {worst.ratio:.1%} of {worst.requests:.0f} missed")


def _judged(plan: Plan, seen: Seen, old: tuple[Objective, ...] | None) -> Judgement:
    found = judge(plan, seen.new, old)
    return replace(found, reason=f"{found.reason} ({seen.problem})") if seen.new is None and seen.problem else found


def decide(state: State, seen: Seen) -> Verdict:  # one line a case, in the order that counts
    """The next move of a rollout that is under way."""
    if seen.pending and seen.pending != state.origin and not state.candidate:
        state = replace(state, candidate=seen.pending)
    if state.phase == "rolling-back":
        return _back(state, seen)
    if state.candidate and seen.active == state.candidate and not seen.upgrading:
        return _switched(state, seen)
    if seen.rolling_back:
        return _roll_back(state, seen, "KubeRay is leading traffic back: the pods' specification was changed")
    if seen.broken:
        return _roll_back(state, seen, seen.broken)
    if state.phase == "observing":
        return _observed(state, seen)
    return _under_way(state, seen)


def _under_way(state: State, seen: Seen) -> Verdict:  # noqa: PLR0911  # as in `decide`
    """Starting, or shifting to the next share."""
    plan, passed_s = state.plan, seen.now_s - state.since_s
    if not plan.incremental:
        if passed_s > plan.start_s:
            return _roll_back(state, seen, f"not ready after {passed_s:.0f} s")
        return Verdict("wait", "the new cluster starts; all traffic moves when it is ready", state)
    traffic = seen.traffic or 0
    if state.phase == "starting":
        if seen.ready and (seen.capacity or 0) >= plan.share:
            shifting = replace(state, phase="shifting", share=plan.share, since_s=seen.now_s)
            return Verdict("shift", f"ready: {plan.share}% of the traffic", shifting)
        if passed_s > plan.start_s:
            return _roll_back(state, seen, f"not ready after {passed_s:.0f} s")
        return Verdict("wait", "the new cluster starts, without traffic", state)
    if traffic >= state.share and state.share < ALL:
        observing = replace(state, phase="observing", share=traffic, since_s=seen.now_s)
        return Verdict("hold", f"{traffic}% of the traffic: held, observed for {plan.observe_s:.0f} s", observing)
    # A share needs replicas first, and the old ones go one share at a time: it takes as long as engines start.
    judgement = _judged(plan, seen, seen.old)
    if judgement.bad:
        return _roll_back(state, seen, judgement.reason)
    if passed_s > plan.start_s + plan.give_up_s:
        return _roll_back(state, seen, f"still {traffic}% of the traffic after {passed_s:.0f} s")
    return Verdict("wait", f"{traffic}% of the traffic, on the way to {state.share}%", state)


def _observed(state: State, seen: Seen) -> Verdict:
    """A share is held."""
    plan, passed_s = state.plan, seen.now_s - state.since_s
    judgement = _judged(plan, seen, seen.old)
    if judgement.bad:
        return _roll_back(state, seen, judgement.reason)
    if judgement.good and passed_s >= plan.observe_s:
        target = plan.next_share(state.share)
        shifting = replace(state, phase="shifting", share=target, since_s=seen.now_s)
        return Verdict("shift", f"{judgement.reason}: on to {target}%", shifting)
    if passed_s > plan.observe_s + plan.give_up_s:
        return _roll_back(state, seen, f"no verdict after {passed_s:.0f} s ({judgement.reason})")
    left_s = max(0.0, plan.observe_s - passed_s)
    return Verdict("wait", f"{state.share}% held, {left_s:.0f} s to go; {judgement.reason}", state)


def _switched(state: State, seen: Seen) -> Verdict:
    """The new cluster has all traffic. With shares it was judged on the way; without, it is judged now."""
    plan = state.plan
    if plan.incremental:
        return Verdict("done", "the new version has all traffic", state)
    if state.phase != "observing":
        observing = replace(state, phase="observing", share=ALL, since_s=seen.now_s)
        return Verdict("hold", f"all traffic has moved; observed for {plan.observe_s:.0f} s", observing)
    judgement = _judged(plan, seen, None)
    passed_s = seen.now_s - state.since_s
    if seen.broken or judgement.bad:
        return _roll_back(state, seen, seen.broken or judgement.reason)
    if judgement.good and passed_s >= plan.observe_s:
        return Verdict("done", judgement.reason, state)
    if passed_s > plan.observe_s + plan.give_up_s:
        # It serves, and nothing is known against it; the old version would have to start first.
        return Verdict("done", f"no verdict after {passed_s:.0f} s ({judgement.reason}); left as it is", state)
    return Verdict("wait", f"observed for {passed_s:.0f} s; {judgement.reason}", state)


def _back(state: State, seen: Seen) -> Verdict:
    """On the way back: over once the old version serves alone."""
    returned = seen.active == state.origin or (bool(seen.active) and seen.active != state.candidate)
    if returned and not seen.pending and not seen.rolling_back and not seen.upgrading:
        return Verdict("rolled-back", state.reason, state)
    traffic = f"{seen.traffic}% of the traffic is left" if seen.traffic is not None else "traffic moves"
    return Verdict("wait", f"rolling back ({state.reason}): {traffic}", state)


def _roll_back(state: State, seen: Seen, reason: str) -> Verdict:
    back = replace(state, phase="rolling-back", since_s=seen.now_s, reason=reason)
    return Verdict("roll-back", reason, back)


def roll_back(state: State, now_s: float, reason: str) -> Verdict:
    """The verdict of an operator who wants the old version back."""
    return Verdict("roll-back", reason, replace(state, phase="rolling-back", since_s=now_s, reason=reason))


BACK_INTERVAL_S: Final = 10


def options(state: State) -> dict[str, int] | None:
    """What KubeRay is told of shares in a phase (clusterUpgradeOptions); None without shares."""
    plan = state.plan
    if not plan.incremental:
        return None
    back = state.phase == "rolling-back"
    return {
        "stepSizePercent": plan.share if back or state.phase == "shifting" else 0,
        "maxSurgePercent": plan.share,
        "intervalSeconds": BACK_INTERVAL_S if back else max(1, math.ceil(plan.observe_s)),
    }
