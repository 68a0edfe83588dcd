"""A removal that hangs: what waits for what, and the way out.

KubeRay keeps a RayCluster that is being deleted until a Job has emptied Ray's control store in Redis (a finalizer), and
a RayService until its RayClusters are gone (another). The Job cannot run where Redis, its password, the image or a node
is gone already; newer operators give up after five minutes, older ones never, and none does anything once it is
uninstalled itself. Then the finalizer has to be taken away by hand, and what it was for stays undone: that is said.

Nothing is taken away while the operator may still do it: not before `AFTER_S`, and not while a Ray pod of the cluster
is there, which would write to Redis again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.resources import (
    JOBS,
    LABEL_CLUSTER,
    LABEL_NODE_TYPE,
    LABEL_SERVICE,
    PODS,
    RAY_CLUSTERS,
    RAY_SERVICES,
    Document,
    Resource,
    dig,
    name_of,
)
from serving.cluster.kubernetes.status import waiting
from serving.errors import ApiMissing

EMPTIES_REDIS: Final = "ray.io/gcs-ft-redis-cleanup-finalizer"
WAITS_FOR_CLUSTERS: Final = "ray.io/rayservice-finalizer"
# The Job that empties Redis, and its pod.
CLEANUP: Final = "redis-cleanup"
# Where Ray keeps the control store of a cluster in Redis; else the cluster's uid.
STORAGE_NAMESPACE: Final = "ray.io/external-storage-namespace"
# KubeRay's own patience (300 s from 1.7 on), and a minute more.
AFTER_S: Final = 360.0
_REMOVABLE: Final = {"RayCluster": (RAY_CLUSTERS, EMPTIES_REDIS), "RayService": (RAY_SERVICES, WAITS_FOR_CLUSTERS)}


@dataclass(frozen=True, slots=True)
class Removal:
    """One object that is being deleted and is still there; `may_go`: whether its finalizer may be taken away now."""

    kind: str
    name: str
    finalizer: str
    since_s: float
    why: str
    may_go: bool
    # What is left undone when the finalizer goes.
    left: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def resource(self) -> Resource:
        """Its address."""
        return _REMOVABLE[self.kind][0]


def look(client: Client, namespace: str, now_s: float, after_s: float = AFTER_S) -> tuple[Removal, ...]:
    """Everything of the namespace that is being deleted and waits for a finalizer of KubeRay's."""
    clusters = client.list(RAY_CLUSTERS, namespace).items
    services = client.list(RAY_SERVICES, namespace).items
    pods = client.list(PODS, namespace, labels=LABEL_CLUSTER).items
    jobs = client.list(JOBS, namespace, labels=f"{LABEL_NODE_TYPE}={CLEANUP}").items
    return judge(services, clusters, pods, jobs, now_s, after_s)


def judge(
    services: Sequence[Document],
    clusters: Sequence[Document],
    pods: Sequence[Document],
    jobs: Sequence[Document],
    now_s: float,
    after_s: float = AFTER_S,
) -> tuple[Removal, ...]:
    """Pure: RayClusters first, because a RayService waits for them."""
    found = []
    for cluster in clusters:
        if (age_s := _deleted_for_s(cluster, EMPTIES_REDIS, now_s)) is None:
            continue
        name = name_of(cluster)
        own = [pod for pod in pods if _label(pod, LABEL_CLUSTER) == name]
        ray = [pod for pod in own if _label(pod, LABEL_NODE_TYPE) != CLEANUP]
        job = next((job for job in jobs if _label(job, LABEL_CLUSTER) == name), None)
        why = _pods(ray) or _job(job, [pod for pod in own if pod not in ray])
        may_go = not ray and age_s >= after_s
        found.append(Removal("RayCluster", name, EMPTIES_REDIS, age_s, why, may_go, _left(cluster)))
    for service in services:
        if (age_s := _deleted_for_s(service, WAITS_FOR_CLUSTERS, now_s)) is None:
            continue
        made = [name_of(cluster) for cluster in clusters if _label(cluster, LABEL_SERVICE) == name_of(service)]
        goes = {one.name for one in found if one.kind == "RayCluster" and one.may_go}
        why = (
            f"it waits for RayCluster {', '.join(made)}" if made else "its RayClusters are gone: does the operator run?"
        )
        may_go = goes.issuperset(made) and age_s >= after_s
        found.append(Removal("RayService", name_of(service), WAITS_FOR_CLUSTERS, age_s, why, may_go))
    return tuple(found)


def free(client: Client, namespace: str, one: Removal) -> bool:
    """Take the finalizer away; False where the object is gone by itself meanwhile."""

    def change(document: Document) -> Document | None:
        kept = [name for name in dig(document, "metadata", "finalizers", default=[]) if name != one.finalizer]
        if dig(document, "metadata", "deletionTimestamp") is None or len(kept) == len(_finalizers(document)):
            return None
        document["metadata"]["finalizers"] = kept
        return document

    try:
        client.modify(one.resource, namespace, one.name, change)
    except ApiMissing:
        return False
    return True


def _deleted_for_s(document: Document, finalizer: str, now_s: float) -> float | None:
    """How long ago it was asked to go; None where it was not, or waits for something else."""
    asked = dig(document, "metadata", "deletionTimestamp")
    if asked is None or finalizer not in _finalizers(document):
        return None
    return max(0.0, now_s - datetime.fromisoformat(str(asked)).timestamp())


def _finalizers(document: Document) -> list[str]:
    return list(dig(document, "metadata", "finalizers", default=[]))


def _label(document: Document, label: str) -> str:
    return str(dig(document, "metadata", "labels", label, default=""))


def _pods(pods: Sequence[Document]) -> str:
    if not pods:
        return ""
    names = ", ".join(sorted(name_of(pod) for pod in pods))
    return (
        f"its pods are still there, and have their drain to end in: {names}. On a node that is gone they never end: "
        "`kubectl delete pod --force` there, and only there"
    )


def _job(job: Document | None, pods: Sequence[Document]) -> str:
    """What became of the Job that empties Redis."""
    if job is None:
        return "there is no Job that empties Redis: does the operator run?"
    what = f"Job {name_of(job)}, which empties Redis, "
    for condition in dig(job, "status", "conditions", default=[]):
        if dig(condition, "status") == "True" and dig(condition, "type") in {"Failed", "Complete"}:
            ended = str(dig(condition, "type")).lower()
            reason = str(dig(condition, "message", default="")).strip()
            return f"{what}is {ended}{f' ({reason})' if reason else ''}: does the operator run?"
    reasons = sorted({f"{name_of(pod)}: {why}{_message(pod)}" for pod in pods if (why := waiting(pod))})
    if reasons:
        return f"{what}cannot run: {'; '.join(reasons)}"
    return f"{what}{'runs' if pods else 'has no pod (a quota, or its service account is gone?)'}"


def _message(pod: Document) -> str:
    """What the kubelet adds to a reason, such as the name of a Secret that is gone."""
    told = (
        dig(status, "state", "waiting", "message") for status in dig(pod, "status", "containerStatuses", default=[])
    )
    return next((f", {' '.join(str(message).split())[:200]}" for message in told if message), "")


def _left(cluster: Document) -> str:
    kept = (
        dig(cluster, "spec", "gcsFaultToleranceOptions", "externalStorageNamespace")
        or dig(cluster, "metadata", "annotations", STORAGE_NAMESPACE)
        or dig(cluster, "metadata", "uid", default="")
    )
    return f"keys in Redis that begin with RAY{kept}@ (they go with the volume of the chart's own Redis)"
