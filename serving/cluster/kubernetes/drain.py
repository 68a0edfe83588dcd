"""Taking a node, or a group of workers, out of service without cutting an answer.

Stop placing first: a node is cordoned, a group's upper bound is lowered. Then pods go one at a time through the
eviction API, which asks disruption budgets; while one allows no eviction, it is asked again until the time is up. What
lets streams finish is in the pod: its preStop hook has Serve move replicas away, within the pod's
terminationGracePeriodSeconds. A pod without such a hook is named in the report. A group's evicted pod is taken from its
RayCluster's wish in the next write, before the pod is gone, so that KubeRay starts none in its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.resources import (
    LABEL_CLUSTER,
    LABEL_GROUP,
    LABEL_NODE_TYPE,
    NODES,
    PODS,
    RAY_CLUSTERS,
    Document,
    dig,
    name_of,
)
from serving.errors import ApiBusy, ApiConflict, ApiMissing, ApiUnreachable, ClusterError

# What a group's bounds were, for `--undo`.
ANNOTATION: Final = "galerne/drained"
POLL_S: Final = 5.0
# A budget that allows no eviction is asked again so often, unless the server says otherwise.
BUDGET_PAUSE_S: Final = 10.0
LONGEST_PAUSE_S: Final = 60.0
# Beyond its grace, until the kubelet has reported that a pod is gone.
MARGIN_S: Final = 30.0
DEFAULT_GRACE_S: Final = 30
HEAD: Final = "head"
_BOUNDS: Final = ("replicas", "minReplicas", "maxReplicas")

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PodReport:
    """What became of one pod."""

    pod: str
    outcome: str  # gone, refused (budget), still-there, skipped
    waited_s: float
    note: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Drain:
    """Drains within `limit_s` in all. `clock` is monotonic seconds, `pause` sleeps."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        limit_s: float,
        *,
        clock: Callable[[], float],
        pause: Callable[[float], None],
        tell: Tell,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._clock = clock
        self._pause = pause
        self._tell = tell
        self._deadline_s = clock() + limit_s

    def node(self, name: str, *, head_too: bool = False) -> tuple[PodReport, ...]:
        """Cordon a node and evict the Ray pods of this namespace on it; the head only where that is asked for."""
        node = self._client.get(NODES, None, name)
        if not dig(node, "spec", "unschedulable", default=False):
            self._client.patch(NODES, None, name, {"spec": {"unschedulable": True}})
        self._tell(f"node {name}: cordoned, nothing more is placed on it")
        pods = self._pods(fields=f"spec.nodeName={name}")
        return tuple(self._one(pod, head_too=head_too) for pod in _lightest_first(pods))

    def node_back(self, name: str) -> None:
        """Uncordon."""
        self._client.patch(NODES, None, name, {"spec": {"unschedulable": None}})
        self._tell(f"node {name}: uncordoned")

    def group(self, cluster: str, group: str) -> tuple[PodReport, ...]:
        """Evict every pod of a worker group and leave the group at none."""
        pods = self._pods(labels=f"{LABEL_CLUSTER}={cluster},{LABEL_GROUP}={group}")

        def stop_growing(found: Document) -> None:
            if (hosts := int(dig(found, "numOfHosts", default=1))) > 1:
                raise ClusterError(f"{group}: replicas of {hosts} pods come and go together: drain their nodes")
            found["maxReplicas"] = min(int(dig(found, "maxReplicas", default=len(pods))), len(pods))
            found["minReplicas"] = min(int(dig(found, "minReplicas", default=0)), len(pods))

        self._bounds(cluster, group, stop_growing, remember=True)
        self._tell(f"group {group} of {cluster}: no more than {len(pods)} pod(s) from now on")
        reports = []
        gone: list[str] = []
        for pod in pods:

            def one_less(found: Document, evicted: str = name_of(pod)) -> None:
                gone.append(evicted)
                left = len(pods) - len(set(gone))
                for bound in _BOUNDS:
                    found[bound] = min(int(dig(found, bound, default=left)), left)
                strategy = found.setdefault("scaleStrategy", {})
                strategy["workersToDelete"] = sorted({*dig(strategy, "workersToDelete", default=[]), evicted})

            reports.append(
                self._one(pod, after=lambda change=one_less: self._bounds(cluster, group, change))  # type: ignore[misc]
            )
        return tuple(reports)

    def group_back(self, cluster: str, group: str) -> None:
        """Give a drained group its bounds again."""

        def change(document: Document) -> Document | None:
            kept = _kept(document)
            if group not in kept:
                raise ClusterError(f"group {group} of {cluster} was not drained by this command")
            _group(document, group).update(kept.pop(group))
            _keep(document, kept)
            return document

        self._client.modify(RAY_CLUSTERS, self._namespace, cluster, change)
        self._tell(f"group {group} of {cluster}: bounds as they were")

    def _bounds(self, cluster: str, group: str, change: Callable[[Document], None], *, remember: bool = False) -> None:
        def changed(document: Document) -> Document | None:
            found = _group(document, group)
            before = json.dumps(found, sort_keys=True)
            kept = _kept(document)
            if remember and group not in kept:
                kept[group] = {bound: found[bound] for bound in _BOUNDS if bound in found}
                _keep(document, kept)
            change(found)
            return document if remember or json.dumps(found, sort_keys=True) != before else None

        self._client.modify(RAY_CLUSTERS, self._namespace, cluster, changed)

    def _pods(self, *, labels: str = LABEL_CLUSTER, fields: str = "") -> tuple[Document, ...]:
        found = self._client.list(PODS, self._namespace, labels=labels, fields=fields).items
        return tuple(pod for pod in found if dig(pod, "status", "phase") not in {"Succeeded", "Failed"})

    def _one(self, pod: Document, *, head_too: bool = False, after: Callable[[], None] | None = None) -> PodReport:
        name, began_s = name_of(pod), self._clock()
        if dig(pod, "metadata", "labels", LABEL_NODE_TYPE) == HEAD and not head_too:
            self._tell(f"pod {name}: the head stays (--with-head evicts it)")
            return PodReport(name, "skipped", 0.0, "the head of its cluster")
        note = "" if _has_hook(pod) else "no preStop hook: streams on it were cut when its grace ended"
        if not self._evicted(name, pod):
            self._tell(f"pod {name}: its disruption budget allowed no eviction in time")
            return PodReport(name, "refused", self._clock() - began_s, "disruption budget")
        if after is not None:
            after()
        grace_s = int(dig(pod, "spec", "terminationGracePeriodSeconds", default=DEFAULT_GRACE_S))
        self._tell(f"pod {name}: evicted, its streams have {grace_s} s to finish")
        gone = self._gone(pod, self._clock() + grace_s + MARGIN_S)
        self._tell(f"pod {name}: {'gone' if gone else 'still there'} after {self._clock() - began_s:.0f} s")
        return PodReport(name, "gone" if gone else "still-there", self._clock() - began_s, note)

    def _evicted(self, name: str, pod: Document) -> bool:
        uid = dig(pod, "metadata", "uid")
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self._namespace},
            "deleteOptions": {"preconditions": {"uid": uid}},
        }
        told = False
        while True:
            try:
                self._client.post(PODS, self._namespace, name, "eviction", body)
            except ApiBusy as error:
                wait_s = min(error.retry_after_s or BUDGET_PAUSE_S, LONGEST_PAUSE_S)
            except ApiUnreachable:
                wait_s = POLL_S  # the pod's uid makes a second eviction harmless
            except ApiMissing:
                return True  # gone meanwhile
            except ApiConflict as error:
                if error.status and "precondition" in str(error).lower():
                    return True  # another pod of this name
                wait_s = POLL_S
            else:
                return True
            if self._clock() + wait_s > self._deadline_s:
                return False
            if not told:
                self._tell(f"pod {name}: its disruption budget allows no eviction now, asking again")
                told = True
            self._pause(wait_s)

    def _gone(self, pod: Document, until_s: float) -> bool:
        until_s = min(until_s, self._deadline_s)
        uid = dig(pod, "metadata", "uid")
        while True:
            found = self._client.list(PODS, self._namespace, fields=f"metadata.name={name_of(pod)}").items
            if not any(dig(one, "metadata", "uid") == uid for one in found):
                return True
            if self._clock() >= until_s:
                return False
            self._pause(POLL_S)


def cluster_with(client: Client, namespace: str, group: str) -> str:
    """The only RayCluster with such a group; ClusterError where there are others or none."""
    found = [
        name_of(cluster)
        for cluster in client.list(RAY_CLUSTERS, namespace).items
        if any(dig(g, "groupName") == group for g in dig(cluster, "spec", "workerGroupSpecs", default=[]))
    ]
    if len(found) != 1:
        raise ClusterError(
            f"{len(found)} RayClusters have a group {group} ({', '.join(found)}): name one with --cluster"
        )
    return found[0]


def complete(reports: Sequence[PodReport]) -> bool:
    """Whether every pod that was to go is gone."""
    return all(report.outcome in {"gone", "skipped"} for report in reports)


def _lightest_first(pods: Sequence[Document]) -> list[Document]:
    """The head last: while it goes, nothing is moved."""
    return sorted(pods, key=lambda pod: dig(pod, "metadata", "labels", LABEL_NODE_TYPE) == HEAD)


def _has_hook(pod: Document) -> bool:
    return any(dig(c, "lifecycle", "preStop") for c in dig(pod, "spec", "containers", default=[]))


def _group(document: Document, group: str) -> Document:
    groups = dig(document, "spec", "workerGroupSpecs", default=[])
    for found in groups:
        if dig(found, "groupName") == group:
            return dict_of(found)
    names = ", ".join(str(dig(g, "groupName")) for g in groups)
    raise ClusterError(f"{name_of(document)} has no worker group {group}; groups: {names}")


def dict_of(found: Any) -> Document:
    """A JSON object as such; ClusterError for anything else."""
    if not isinstance(found, dict):
        raise ClusterError("the RayCluster's worker groups are not as its definition has them")
    return found


def _kept(document: Document) -> dict[str, Any]:
    try:
        found = json.loads(dig(document, "metadata", "annotations", ANNOTATION, default="{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _keep(document: Document, kept: dict[str, Any]) -> None:
    annotations = document["metadata"].setdefault("annotations", {})
    if kept:
        annotations[ANNOTATION] = json.dumps(kept, sort_keys=True)
    else:
        annotations.pop(ANNOTATION, None)
