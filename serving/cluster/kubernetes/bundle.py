"""A support bundle: what somebody who cannot reach the cluster needs to see, without what nobody outside may see.

Promised: Secrets are not asked for at all; everything written has gone through `masking`, logs included; the size is
bounded, newest log lines first; `manifest.json` names each file, and each thing that is not there with the reason.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from serving.cluster.kubernetes import resources as kinds
from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.facts import unknown
from serving.cluster.kubernetes.masking import MASK, Masker
from serving.cluster.kubernetes.prometheus import Prometheus
from serving.cluster.kubernetes.resources import PODS, RAY_SERVICES, Document, dig, name_of, release_of
from serving.cluster.kubernetes.status import ATTAINMENT, LAST_DECISIONS, TARGET
from serving.errors import ClusterError, KubernetesError
from serving.metrics.release import matcher_of, scoped
from serving.metrics.rules import COMPLETE, SAMPLED, SIGNALS

# Of one container's log, and of all logs together.
LOG_BYTES: Final = 512 * 1024
ALL_LOGS_BYTES: Final = 32 * 1024 * 1024
LOG_LINES: Final = 5000
# The API server cuts at the end of what it is asked for; asking for the last lines keeps the newest.
_LEFT_OUT: Final = "Secrets: never asked for; names stand where objects refer to them"

QUERIES: Final = {
    "signals": '{__name__=~"' + "|".join([*(s.record for s in SIGNALS), SAMPLED, COMPLETE]) + '"}',
    "attainment": ATTAINMENT,
    "targets": TARGET,
    "decisions": LAST_DECISIONS,
    "alerts": 'ALERTS{alertstate="firing"}',
    "scrapes": "up",
    "build": "galerne_build_info",
}


@dataclass(slots=True)
class Bundle:
    """What is written: files by their path, and what was left out."""

    files: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=lambda: [_LEFT_OUT])

    def manifest(self, facts: dict[str, Any], cut: int) -> bytes:
        """The manifest as JSON."""
        listed = [{"path": path, "bytes": len(content)} for path, content in sorted(self.files.items())]
        document = {**facts, "masked_places": cut, "mask": MASK, "files": listed, "left_out": self.left_out}
        return json.dumps(document, indent=1, ensure_ascii=False).encode()


def collect(
    client: Client,
    namespace: str,
    prometheus: Prometheus | None,
    *,
    facts: dict[str, Any],
    reports: Sequence[tuple[str, Callable[[], Any]]] = (),
    log_bytes: int = LOG_BYTES,
    all_logs_bytes: int = ALL_LOGS_BYTES,
) -> dict[str, bytes]:
    """Files of the bundle. `facts` go into the manifest; `reports` are further documents by name, each may fail."""
    bundle, masker = Bundle(), Masker()
    objects = list(_objects(client, namespace, bundle))
    # First every value that is cut by structure is known, then anything is written: logs repeat them.
    for _, documents in objects:
        masker.learn(list(documents))
    for name, documents in objects:
        bundle.files[f"objects/{name}.json"] = _json(masker.document(list(documents)))
    for name, report in reports:
        try:
            bundle.files[f"{name}.json"] = _json(masker.document(report()))
        except (KubernetesError, ClusterError) as error:
            bundle.left_out.append(f"{name}: {masker.text(str(error))}")
    pods = next((documents for name, documents in objects if name == PODS.plural), ())
    _logs(client, namespace, pods, bundle, masker, log_bytes, all_logs_bytes)
    services = next((documents for name, documents in objects if name == RAY_SERVICES.plural), ())
    _metrics(prometheus, matcher_of(release_of(service) for service in services), bundle, masker)
    bundle.files["manifest.json"] = bundle.manifest(facts, masker.cut)
    return bundle.files


def write(files: dict[str, bytes], path: Path, modified_s: float) -> None:
    """The files as tar.gz, readable by their owner alone; ClusterError where it cannot be written."""
    prefix = path.name.removesuffix(".gz").removesuffix(".tar")
    try:
        path.touch(mode=0o600)
        with tarfile.open(path, "w:gz") as archive:
            for name, content in sorted(files.items()):
                entry = tarfile.TarInfo(f"{prefix}/{name}")
                entry.size, entry.mode, entry.mtime = len(content), 0o600, int(modified_s)
                archive.addfile(entry, io.BytesIO(content))
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written: {error}") from error


def _objects(client: Client, namespace: str, bundle: Bundle) -> Iterator[tuple[str, tuple[Document, ...]]]:
    for resource in (*kinds.BUNDLED, kinds.NODES):
        try:
            yield resource.plural, client.list(resource, namespace if resource.namespaced else None).items
        except KubernetesError as error:
            why = unknown(error)
            bundle.left_out.append(f"objects/{resource.plural}: {why.why}; {why.fix}")


def _logs(
    client: Client,
    namespace: str,
    pods: Sequence[Document],
    bundle: Bundle,
    masker: Masker,
    log_bytes: int,
    all_logs_bytes: int,
) -> None:
    left = all_logs_bytes
    for pod in pods:
        for container, restarts in _containers(pod):
            for previous in (False, True) if restarts else (False,):
                path = f"logs/{name_of(pod)}/{container}{'.previous' if previous else ''}.log"
                if left <= 0:
                    bundle.left_out.append(f"{path}: all logs together are bounded to {all_logs_bytes} bytes")
                    continue
                query: dict[str, str | int] = {"container": container, "tailLines": LOG_LINES, "timestamps": "true"}
                query |= {"previous": "true"} if previous else {}
                try:
                    text = client.logs(namespace, name_of(pod), query, PODS)
                except KubernetesError as error:
                    bundle.left_out.append(f"{path}: {masker.text(unknown(error).why)}")
                    continue
                bound = min(log_bytes, left)
                if len(text) > bound:
                    why = "" if bound == log_bytes else f"all logs together are bounded to {all_logs_bytes} bytes: "
                    bundle.left_out.append(f"{path}: {why}all but its last {bound} bytes")
                    # From a whole line on, so that no secret is cut in two and no longer known for one.
                    text = text[-bound:].partition(b"\n")[2]
                masked = masker.text(text.decode(errors="replace")).encode()
                bundle.files[path] = masked
                left -= len(masked)


def _containers(pod: Document) -> Iterator[tuple[str, int]]:
    """Names of a pod's containers with their restarts."""
    restarts = {
        str(dig(c, "name")): int(dig(c, "restartCount", default=0))
        for kind in ("containerStatuses", "initContainerStatuses")
        for c in dig(pod, "status", kind, default=[])
    }
    for kind in ("initContainers", "containers"):
        for container in dig(pod, "spec", kind, default=[]):
            name = str(dig(container, "name"))
            yield name, restarts.get(name, 0)


def _metrics(prometheus: Prometheus | None, only: str, bundle: Bundle, masker: Masker) -> None:
    if prometheus is None:
        bundle.left_out.append("metrics: Prometheus was not named (--prometheus)")
        return
    for name, query in QUERIES.items():
        body = prometheus.raw(scoped(query, only))
        if body is None:
            bundle.left_out.append(f"metrics/{name}: {masker.text(prometheus.problem)}")
        else:
            bundle.files[f"metrics/{name}.json"] = masker.text(body.decode(errors="replace")).encode()


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False).encode()
