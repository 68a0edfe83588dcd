"""A rollout on a cluster: look, decide, write, wait. Every decision is `rollout`'s; every write is compare-and-swap.

Between two looks nothing is remembered here: what was done stands in an annotation of the RayService, so that a command
that was stopped goes on where it was, or back, from any machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.prometheus import Prometheus
from serving.cluster.kubernetes.resources import LABEL_CLUSTER, PODS, RAY_SERVICES, Document, dig, release_of
from serving.cluster.kubernetes.rollout import (
    ANNOTATION,
    FAILED,
    FINAL,
    Change,
    Objective,
    Plan,
    Seen,
    State,
    Verdict,
    decide,
    options,
    roll_back,
)
from serving.cluster.kubernetes.values import INCREMENTAL, NEW_CLUSTER
from serving.cluster.kubernetes.versions import applied, in_place
from serving.errors import ApiConflict, ApiUnreachable, ClusterError, KubernetesError
from serving.metrics.release import matcher, scoped
from serving.metrics.rules import ITL_MISSED, TTFT_MISSED

# Figures of a share look back over its own time, within these bounds.
SHORTEST_WINDOW_S: Final = 60
LONGEST_WINDOW_S: Final = 3600
REQUESTS: Final = "galerne_requests_total"
# Looks in a row that the API server did not answer, each tried several times, after which it is given up.
MOST_UNHEARD: Final = 60
_SERVER_ERRORS: Final = range(500, 600)
# A deployment that Serve gave up on.
_GIVEN_UP: Final = "DEPLOY_FAILED"
_HEALTHY: Final = frozenset({"HEALTHY", "RUNNING"})

Tell = Callable[[str, Verdict], None]


@dataclass(frozen=True, slots=True)
class Target:
    """The RayService of a release."""

    namespace: str
    name: str


def state_of(service: Document) -> State | None:
    """The rollout under way; None where there is none."""
    text = dig(service, "metadata", "annotations", ANNOTATION)
    return State.load(text) if isinstance(text, str) else None


def begin(service: Document, plan: Plan, changes: Sequence[Change], revision: str, now_s: float) -> Document:
    """The service with the new version asked for and nothing of it served yet; ClusterError where that cannot be."""
    if state_of(service) is not None:
        raise ClusterError("a rollout is under way: `rollout --resume` goes on, `rollout --back` takes it back")
    if not changes:
        raise ClusterError("the service has this version already: nothing to roll out")
    service = json.loads(json.dumps(service))
    active = str(dig(service, "status", "activeServiceStatus", "rayClusterName", default=""))
    if not active or _condition(service, "Ready") is not True:
        raise ClusterError("the service is not ready: see `galerne cluster status` before anything new")
    if dig(service, "status", "pendingServiceStatus", "rayClusterName"):
        raise ClusterError("KubeRay is upgrading this service already: wait until it is done")
    strategy = json.loads(json.dumps(dig(service, "spec", "upgradeStrategy")))
    state = State(revision, plan, "starting", now_s, active, changes=tuple(changes), strategy=strategy)
    return _marked(_told(applied(service, changes), state), state)


def strategy_of(service: Document) -> bool:
    """Whether there are shares (incremental); ClusterError where there is no second cluster at all."""
    kind = str(dig(service, "spec", "upgradeStrategy", "type", default=NEW_CLUSTER))
    if kind == INCREMENTAL:
        return True
    if kind == NEW_CLUSTER:
        return False
    raise ClusterError(
        f"upgradeStrategy.type is {kind}: replicas are replaced in place, and there is no second version to compare "
        "with. `helm upgrade` does that and `helm rollback` takes it back; for shares set upgrade.strategy."
    )


class Rollout:
    """Carries one rollout on. `clock` is seconds since the epoch; `wait` returns when it is worth looking again."""

    def __init__(
        self,
        client: Client,
        prometheus: Prometheus | None,
        target: Target,
        *,
        models: Sequence[str] = (),
        clock: Callable[[], float],
        wait: Callable[[], None],
        tell: Tell,
    ) -> None:
        """`models`: whose figures are judged; empty: of every model."""
        self._client = client
        self._prometheus = prometheus
        self._target = target
        self._models = tuple(models)
        self._clock = clock
        self._wait = wait
        self._tell = tell
        self._ending: Verdict | None = None

    def service(self) -> Document:
        """The RayService as it is."""
        return self._client.get(RAY_SERVICES, self._target.namespace, self._target.name)

    def start(self, plan: Plan, changes: Sequence[Change], revision: str) -> None:
        """Ask for the new version."""
        self._client.modify(
            RAY_SERVICES,
            self._target.namespace,
            self._target.name,
            lambda service: begin(service, plan, changes, revision, self._clock()),
        )

    def back(self, reason: str) -> None:
        """Ask for the old version, whatever the figures say."""

        def change(service: Document) -> Document | None:
            state = state_of(service)
            if state is None:
                raise ClusterError("no rollout is under way: `helm rollback` is the way back from an older one")
            if state.phase == "rolling-back":
                return None
            return carried_out(service, roll_back(state, self._clock(), reason))

        self._client.modify(RAY_SERVICES, self._target.namespace, self._target.name, change)

    def run(self) -> Verdict:
        """Look, decide and write until the new version has all traffic ("done") or none ("rolled-back")."""
        unheard = 0
        while True:
            try:
                verdict = self._look()
            except KubernetesError as error:
                # An API server that restarts must not end a rollout; traffic stays where it is meanwhile, or moves on
                # to the share that was asked for.
                unheard += 1
                if unheard > MOST_UNHEARD or not (isinstance(error, ApiUnreachable) or error.status in _SERVER_ERRORS):
                    raise
                self._wait()
                continue
            unheard = 0
            if verdict is None:
                continue
            self._tell(self._target.name, verdict)
            if verdict.action in FINAL:
                return verdict
            self._wait()

    def _look(self) -> Verdict | None:
        """Look, decide, write; None where somebody else wrote first and all of it is to be done anew."""
        service = self.service()
        state = state_of(service)
        if state is None:
            if self._ending is not None:
                return self._ending  # our last write was taken, and its answer lost
            raise ClusterError(f"the annotation {ANNOTATION} is gone: somebody else ended this rollout")
        if state.phase != "rolling-back" and not in_place(service, state.changes):
            raise ClusterError(
                "the RayService no longer asks for the new version: somebody else changed it (helm upgrade?). "
                "Nothing more is done; `rollout --back` brings the old version back"
            )
        verdict = decide(state, self.observe(service, state))
        if verdict.action != "wait" or verdict.state != state or not _is_told(service, state):
            self._ending = verdict if verdict.action in FINAL else None
            try:
                self._client.replace(RAY_SERVICES, self._target.namespace, carried_out(service, verdict))
            except ApiConflict:
                # KubeRay writes its status every few seconds. What is newer may ask for another decision.
                return None
        return verdict

    def resume(self) -> None:
        """Begin the phase that is under way anew: what was counted while nobody looked is no verdict."""

        def change(service: Document) -> Document:
            state = state_of(service)
            if state is None:
                raise ClusterError("no rollout is under way: nothing to resume")
            return _marked(service, replace(state, since_s=self._clock()))

        self._client.modify(RAY_SERVICES, self._target.namespace, self._target.name, change)

    def halt(self) -> None:
        """Hold the traffic where it is, for a command that ends before its rollout does."""

        def change(service: Document) -> Document | None:
            state = state_of(service)
            strategy = dig(service, "spec", "upgradeStrategy", "clusterUpgradeOptions")
            if state is None or state.phase != "shifting" or not isinstance(strategy, dict):
                return None
            strategy["stepSizePercent"] = 0
            return service

        self._client.modify(RAY_SERVICES, self._target.namespace, self._target.name, change)

    def observe(self, service: Document, state: State) -> Seen:
        """The service as KubeRay tells it, with the figures of both versions."""
        seen = seen_of(service, self._clock())
        candidate = state.candidate or seen.pending
        if self._prometheus is None or not candidate or state.phase in {"starting", "rolling-back"}:
            return seen
        window_s = int(min(max(seen.now_s - state.since_s, SHORTEST_WINDOW_S), LONGEST_WINDOW_S))
        release = release_of(service)
        new = self._objectives(candidate, window_s, release)
        old = self._objectives(state.origin, window_s, release) if state.origin != candidate else None
        return replace(seen, new=new, old=old, problem=self._prometheus.problem if new is None else "")

    def _objectives(self, cluster: str, window_s: int, release: str) -> tuple[Objective, ...] | None:
        """Counted by the gateways of one Ray cluster, which are told apart by their pods' addresses."""
        if self._prometheus is None:
            return None
        pods = self._client.list(PODS, self._target.namespace, labels=f"{LABEL_CLUSTER}={cluster}").items
        addresses = sorted(str(ip) for pod in pods if (ip := dig(pod, "status", "podIP")))
        if not addresses:
            return ()
        found = []
        for name, metric, bad in (
            ("ttft", TTFT_MISSED, 'met="false"'),
            ("itl", ITL_MISSED, 'met="false"'),
            (FAILED, REQUESTS, 'status=~"5..|cut"'),
        ):
            only = matcher(release)
            all_of = self._prometheus.query(scoped(increase(metric, "", addresses, self._models, window_s), only))
            missed = self._prometheus.query(scoped(increase(metric, bad, addresses, self._models, window_s), only))
            if all_of is None or missed is None:
                return None
            requests = sum(sample.value for sample in all_of)
            # A model without a target has no such counts; requests are always counted.
            if requests > 0 or name == FAILED:
                found.append(Objective(name, requests, sum(sample.value for sample in missed)))
        return tuple(found)


def increase(metric: str, condition: str, addresses: Sequence[str], models: Sequence[str], window_s: int) -> str:
    """PromQL: how much a counter grew on pods of these addresses."""
    hosts = "|".join(_literal(f"[{a}]" if ":" in a else a) for a in addresses)
    terms = [f'instance=~"({hosts}):[0-9]+"']
    if models:
        terms.append(f'model=~"{"|".join(_literal(model) for model in models)}"')
    if condition:
        terms.append(condition)
    return f"sum(increase({metric}{{{','.join(terms)}}}[{window_s}s]))"


def _literal(text: str) -> str:
    """As part of a regular expression within a quoted PromQL string."""
    return "".join(c if c.isalnum() or c in "-_/" else f"\\\\{c}" for c in text)


def seen_of(service: Document, now_s: float) -> Seen:
    """What KubeRay's status says."""
    active = dig(service, "status", "activeServiceStatus", default={})
    pending = dig(service, "status", "pendingServiceStatus", default={})
    name = str(dig(pending, "rayClusterName", default=""))
    newest = pending if name else active
    ready, broken = _health(newest)
    return Seen(
        now_s=now_s,
        active=str(dig(active, "rayClusterName", default="")),
        pending=name,
        traffic=dig(pending, "trafficRoutedPercent"),
        capacity=dig(pending, "targetCapacity"),
        upgrading=_condition(service, "UpgradeInProgress") is True or bool(name),
        rolling_back=_condition(service, "RollbackInProgress") is True,
        ready=ready,
        broken=broken,
    )


def _health(status: Document) -> tuple[bool, str]:
    """Whether all of Serve is healthy, and what it gave up on."""
    applications = dig(status, "applicationStatuses", default={})
    ready = bool(applications)
    for name, application in applications.items():
        states = {f"application {name}": (dig(application, "status"), dig(application, "message", default=""))}
        for deployment, one in dig(application, "serveDeploymentStatuses", default={}).items():
            states[f"deployment {deployment}"] = (dig(one, "status"), dig(one, "message", default=""))
        for what, (state, message) in states.items():
            ready = ready and state in _HEALTHY
            if state == _GIVEN_UP and what.startswith("application"):
                brief = " ".join(str(message).split())[:200]
                return False, f"{what} of the new version is {state}: {brief}".rstrip(": ")
    return ready, ""


def carried_out(service: Document, verdict: Verdict) -> Document:
    """The service as a verdict wants it."""
    state = verdict.state
    if verdict.action in FINAL:
        service["spec"]["upgradeStrategy"] = state.strategy
        if state.strategy is None:
            del service["spec"]["upgradeStrategy"]
        del service["metadata"]["annotations"][ANNOTATION]
        return service
    if verdict.action == "roll-back":
        applied(service, state.changes, back=True)
    return _marked(_told(service, state), state)


def _is_told(service: Document, state: State) -> bool:
    chosen = options(state) or {}
    present = dig(service, "spec", "upgradeStrategy", "clusterUpgradeOptions", default={})
    return all(present.get(name) == value for name, value in chosen.items())


def _told(service: Document, state: State) -> Document:
    if (chosen := options(state)) is not None:
        strategy = service["spec"].setdefault("upgradeStrategy", {})
        strategy["clusterUpgradeOptions"] = {**(strategy.get("clusterUpgradeOptions") or {}), **chosen}
    return service


def _marked(service: Document, state: State) -> Document:
    annotations = service["metadata"].setdefault("annotations", {})
    annotations[ANNOTATION] = state.dump()
    return service


def _condition(service: Document, kind: str) -> bool | None:
    for condition in dig(service, "status", "conditions", default=[]):
        if dig(condition, "type") == kind:
            return bool(dig(condition, "status") == "True")
    return None


def summary(plan: Plan, changes: Sequence[Change], created: Sequence[str]) -> list[str]:
    """The plan in words, before anything is done."""
    lines = [f"create {what}" for what in created]
    for change in changes:
        where = ".".join(str(step) for step in change.path)
        old, new = (_told_in_short(value) for value in (change.old, change.new))
        lines.append(f"{where}: {old} -> {new}")
    if plan.incremental:
        shares = ", ".join(f"{share}%" for share in plan.shares())
        lines.append(f"traffic: {shares}; each held for {plan.observe_s:.0f} s and {plan.min_requests} requests")
    else:
        lines.append(
            "traffic: all at once when the new cluster is ready (strategy NewCluster), then observed for "
            f"{plan.observe_s:.0f} s; it needs every GPU twice, and the way back is a start of the old version"
        )
    lines.append(
        f"back: more than {plan.most_missed:.0%} of requests miss a latency target or {plan.most_failed:.0%} fail, and "
        f"{plan.most_worse:g} times as many as of the old version; not ready within {plan.start_s:.0f} s; no verdict "
        f"{plan.give_up_s:.0f} s after a share's time"
    )
    return lines


def _told_in_short(value: Any) -> str:
    """A value on one line; of Serve's configuration the line that differs."""
    lines = str(value).splitlines()
    return next((line.strip() for line in lines if "revision:" in line), " ".join(lines)[:80])
