"""One table of what runs: RayService, Ray clusters, pods and Serve's state, joined with what Prometheus knows.

Each source may be missing, and then its columns are empty and a note says why; nothing is guessed. Which pod holds a
replica of which model is known from Prometheus alone (engines are scraped by their pods' addresses).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from serving.cluster.kubernetes import resources as kinds
from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.facts import unknown
from serving.cluster.kubernetes.prometheus import Prometheus, Sample
from serving.cluster.kubernetes.quantity import quantity
from serving.cluster.kubernetes.resources import (
    LABEL_CLUSTER,
    LABEL_GROUP,
    Document,
    Resource,
    dig,
    name_of,
    release_of,
)
from serving.cluster.names import APP, GATEWAY, deployment_name
from serving.errors import KubernetesError
from serving.metrics.release import matcher, scoped
from serving.metrics.rules import READY, burn_record

# Attainment is that of the last hour; the recording rule is of missed shares.
ATTAINMENT: Final = burn_record("1h")
TARGET: Final = "galerne_autoscaler_target_replicas"
LAST_DECISIONS: Final = "increase(galerne_autoscaler_decisions_total[2m])"
ENGINES: Final = "max by (model, instance) (vllm:num_requests_running)"
_ENGINE: Final = deployment_name("")
_GPU_MARKS: Final = ("nvidia.com/", "amd.com/gpu", "gpu.intel.com/")


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model, or the gateway, of one Ray cluster; None: not known."""

    model: str
    cluster: str
    state: str
    message: str = ""
    ready: int | None = None
    wanted: int | None = None
    pods: int | None = None
    restarts: int | None = None
    gpus: float | None = None
    images: tuple[str, ...] = ()
    # Shares of requests of the last hour that kept their target.
    ttft: float | None = None
    itl: float | None = None
    decision: str = ""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Pods of one group of one Ray cluster."""

    cluster: str
    group: str
    ready: int
    pods: int
    wanted: int | None
    most: int | None
    restarts: int
    gpus: float
    images: tuple[str, ...]
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """All of it; `notes` say what could not be seen."""

    service: str
    ready: bool
    summary: str
    models: tuple[ModelRow, ...] = ()
    groups: tuple[GroupRow, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def healthy(self) -> bool:
        """Whether the service is ready and every deployment of Serve healthy."""
        return self.ready and bool(self.models) and all(row.state == "HEALTHY" for row in self.models)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "healthy": self.healthy()}


def read(client: Client, namespace: str, service: Document, prometheus: Prometheus | None) -> Status:
    """Ask everyone and join; raises only what concerns everything."""
    notes: list[str] = []

    def listed(resource: Resource, labels: str = "") -> tuple[Document, ...]:
        try:
            return client.list(resource, namespace, labels=labels).items
        except KubernetesError as error:
            why = unknown(error)
            notes.append(f"{resource.plural}: {why.why}; {why.fix}")
            return ()

    pods = listed(kinds.PODS, LABEL_CLUSTER)
    clusters = listed(kinds.RAY_CLUSTERS)
    measured = _measured(prometheus, release_of(service), notes)
    return join(service, clusters, pods, measured, notes)


@dataclass(frozen=True, slots=True)
class Measured:
    """Answers of Prometheus; None: it has none."""

    ready: tuple[Sample, ...] | None = None
    wanted: tuple[Sample, ...] | None = None
    missed: tuple[Sample, ...] | None = None
    decisions: tuple[Sample, ...] | None = None
    engines: tuple[Sample, ...] | None = None


def _measured(prometheus: Prometheus | None, release: str, notes: list[str]) -> Measured:
    if prometheus is None:
        notes.append("Prometheus was not asked (--prometheus): replicas, attainment and decisions are not known")
        return Measured()
    answers = []
    for query in (READY, TARGET, ATTAINMENT, LAST_DECISIONS, ENGINES):
        found = prometheus.query(scoped(query, matcher(release)))
        if found is None:
            notes.append(f"{prometheus.problem}; replicas, attainment and decisions are not known")
            return Measured()
        answers.append(tuple(found))
    return Measured(*answers)


def join(
    service: Document,
    clusters: Sequence[Document],
    pods: Sequence[Document],
    measured: Measured,
    notes: Sequence[str] = (),
) -> Status:
    """Pure: rows of what was read."""
    rows: list[ModelRow] = []
    told = list(notes)
    names = []
    for key, role in (("activeServiceStatus", "active"), ("pendingServiceStatus", "pending")):
        status = dig(service, "status", key, default={})
        if name := str(dig(status, "rayClusterName", default="")):
            names.append(name)
            found = _models(status, f"{name} ({role})", pods_of(pods, name), measured)
            if not found:
                told.append(f"Serve on {name} reports no application (yet): its head is not ready, or not reachable")
            rows += found
    groups = [row for name in names for row in _groups(name, clusters, pods_of(pods, name))]
    conditions = {str(dig(c, "type")): dig(c, "status") for c in dig(service, "status", "conditions", default=[])}
    ready = conditions.get("Ready") == "True" or dig(service, "status", "serviceStatus") == "Running"
    return Status(name_of(service), ready, _summary(service, conditions), tuple(rows), tuple(groups), tuple(told))


def _summary(service: Document, conditions: dict[str, Any]) -> str:
    parts = ["ready" if conditions.get("Ready") == "True" else "not ready"]
    for condition in dig(service, "status", "conditions", default=[]):
        if dig(condition, "type") == "Ready" and dig(condition, "status") != "True":
            parts.append(str(dig(condition, "message", default="")))
    parts.append(f"{dig(service, 'status', 'numServeEndpoints', default=0)} endpoints")
    if conditions.get("UpgradeInProgress") == "True":
        share = dig(service, "status", "pendingServiceStatus", "trafficRoutedPercent")
        parts.append("upgrading" if share is None else f"upgrading, {share}% of the traffic on the new cluster")
    if conditions.get("RollbackInProgress") == "True":
        parts.append("rolling back")
    return ", ".join(part for part in parts if part)


def pods_of(pods: Sequence[Document], cluster: str) -> list[Document]:
    """The pods of one Ray cluster."""
    return [pod for pod in pods if dig(pod, "metadata", "labels", LABEL_CLUSTER) == cluster]


def _models(status: Document, cluster: str, pods: Sequence[Document], measured: Measured) -> list[ModelRow]:
    rows = []
    deployments = dig(status, "applicationStatuses", APP, "serveDeploymentStatuses", default={})
    models = _known_models(measured)
    for name in sorted(deployments, key=lambda d: (d == GATEWAY, d)):
        state = str(dig(deployments[name], "status", default="?"))
        message = " ".join(str(dig(deployments[name], "message", default="")).split())
        if name == GATEWAY:
            own = [pod for pod in pods if dig(pod, "metadata", "labels", LABEL_GROUP) == GATEWAY]
            rows.append(ModelRow(GATEWAY, cluster, state, message, **_pods(own or None)))
            continue
        model = models.get(name, name.removeprefix(_ENGINE))
        rows.append(
            ModelRow(
                model,
                cluster,
                state,
                message,
                **_pods(_holding(pods, model, measured.engines)),
                ready=_whole(_of(measured.ready, model)),
                wanted=_whole(_of(measured.wanted, model)),
                ttft=_kept(measured.missed, model, "ttft"),
                itl=_kept(measured.missed, model, "itl"),
                decision=_decision(measured.decisions, model),
            )
        )
    return rows


def _known_models(measured: Measured) -> dict[str, str]:
    """Model ids by their deployment's name, which cannot be read backwards."""
    samples = (*(measured.ready or ()), *(measured.wanted or ()))
    return {deployment_name(s.labels["model"]): s.labels["model"] for s in samples if "model" in s.labels}


def _holding(pods: Sequence[Document], model: str, engines: Sequence[Sample] | None) -> list[Document] | None:
    """Pods on which replicas of a model run, by the addresses that their engines are scraped at."""
    if engines is None:
        return None
    hosts = {
        sample.labels.get("instance", "").rpartition(":")[0].strip("[]")
        for sample in engines
        if sample.labels.get("model") == model
    }
    return [pod for pod in pods if dig(pod, "status", "podIP") in hosts]


def _pods(pods: list[Document] | None) -> dict[str, Any]:
    if pods is None:
        return {}
    return {
        "pods": len(pods),
        "restarts": sum(_restarts(pod) for pod in pods),
        "gpus": sum(_gpus(pod) for pod in pods),
        "images": _images(pods),
    }


def _groups(cluster: str, clusters: Sequence[Document], pods: Sequence[Document]) -> list[GroupRow]:
    found = next((c for c in clusters if name_of(c) == cluster), {})
    specs = {str(dig(g, "groupName")): g for g in dig(found, "spec", "workerGroupSpecs", default=[])}
    names = ["headgroup", *specs]
    names += sorted({_group_of(pod) for pod in pods} - set(names))
    rows = []
    for name in names:
        own = [pod for pod in pods if _group_of(pod) == name]
        spec = specs.get(name)
        rows.append(
            GroupRow(
                cluster,
                name,
                ready=sum(_ready(pod) for pod in own),
                pods=len(own),
                wanted=1 if name == "headgroup" else dig(spec, "replicas"),
                most=1 if name == "headgroup" else dig(spec, "maxReplicas"),
                restarts=sum(_restarts(pod) for pod in own),
                gpus=sum(_gpus(pod) for pod in own),
                images=_images(own),
                waiting=tuple(sorted({why for pod in own if (why := waiting(pod))})),
            )
        )
    return rows


def _group_of(pod: Document) -> str:
    return str(dig(pod, "metadata", "labels", LABEL_GROUP, default="?"))


def _ready(pod: Document) -> bool:
    conditions = dig(pod, "status", "conditions", default=[])
    return any(dig(c, "type") == "Ready" and dig(c, "status") == "True" for c in conditions)


def _restarts(pod: Document) -> int:
    return sum(int(dig(c, "restartCount", default=0)) for c in dig(pod, "status", "containerStatuses", default=[]))


def _gpus(pod: Document) -> float:
    return sum(
        quantity(amount)
        for container in dig(pod, "spec", "containers", default=[])
        for resource, amount in dig(container, "resources", "limits", default={}).items()
        if resource.startswith(_GPU_MARKS)
    )


def _images(pods: Sequence[Document]) -> tuple[str, ...]:
    """Short names of what the first containers run."""
    images = {str(dig(pod, "spec", "containers", 0, "image", default="")) for pod in pods}
    return tuple(sorted(image.rpartition("/")[2] for image in images if image))


def waiting(pod: Document) -> str:
    """Why a pod does not run: what its containers or the scheduler say."""
    if dig(pod, "metadata", "deletionTimestamp"):
        return "Terminating"
    for status in dig(pod, "status", "containerStatuses", default=[]):
        if reason := dig(status, "state", "waiting", "reason"):
            return str(reason)
    for condition in dig(pod, "status", "conditions", default=[]):
        if dig(condition, "type") == "PodScheduled" and dig(condition, "status") == "False":
            return f"{dig(condition, 'reason', default='')}: {dig(condition, 'message', default='')}"[:120]
    return ""


def _of(samples: Sequence[Sample] | None, model: str) -> float | None:
    return next((s.value for s in samples or () if s.labels.get("model") == model), None)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _kept(missed: Sequence[Sample] | None, model: str, objective: str) -> float | None:
    for sample in missed or ():
        if sample.labels.get("model") == model and sample.labels.get("objective") == objective:
            return 1 - sample.value
    return None


def _decision(decisions: Sequence[Sample] | None, model: str) -> str:
    """The reason that was given most in the last two minutes: a decision is made every few seconds."""
    own = [s for s in decisions or () if s.labels.get("model") == model and s.value > 0]
    return max(own, key=lambda s: s.value).labels.get("reason", "") if own else ""
