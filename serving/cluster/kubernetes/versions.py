"""What of a RayService makes a version: its image and its configuration. Changes are values at paths, old and new.

The old values travel with the rollout and bring the old version back exactly, so that KubeRay's hash of the pods'
specification is that of the old cluster again, and it keeps that one instead of starting a third.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from serving.cluster.kubernetes.resources import Document, dig
from serving.cluster.kubernetes.rollout import Change, Path
from serving.errors import ClusterError

REVISION_CHARS: Final = 16
# First line of a configuration file in a pod; the application waits until it names its own revision.
MARK: Final = "# revision:"


@dataclass(frozen=True, slots=True)
class ConfigVolume:
    """Where pods have their configuration from: a Secret or ConfigMap, and its key."""

    kind: str
    name: str
    key: str
    volume: str


def revision_of(text: str) -> str:
    """Names a configuration by what it says; a letter first, for no YAML reader to take it for a number."""
    return f"r{hashlib.sha256(text.encode()).hexdigest()}"[:REVISION_CHARS]


def image_changes(service: Document, image: str, of_groups: Mapping[str, str] | None = None) -> tuple[Change, ...]:
    """Every container that runs its group's image: the head's everywhere but where a group has one of its own.

    `of_groups` names the new one of such a group. ClusterError without it: a cluster of two versions would not work.
    """
    wanted = dict(of_groups or {})
    head = dig(service, "spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "image")
    if not head:
        raise ClusterError("the RayService's head has no image to replace")
    changes: list[Change] = []
    for path, spec in _pods(service):
        group = str(dig(service, *path[:-2], "groupName", default=""))
        present = str(dig(spec, "containers", 0, "image", default=head))
        if present != head and group not in wanted:
            raise ClusterError(
                f"group {group} has an image of its own, {present}: name its new one with --group-image {group}=IMAGE"
            )
        new = wanted.pop(group, image)
        changes += [
            Change((*path, kind, index, "image"), present, new)
            for kind in ("initContainers", "containers")
            for index, container in enumerate(dig(spec, kind, default=[]))
            if dig(container, "image") == present and present != new
        ]
    if wanted:
        raise ClusterError(f"the RayService has no group {', '.join(sorted(wanted))}")
    return tuple(changes)


def config_volume(service: Document) -> ConfigVolume:
    """The volume that the application's `config_path` lies on; ClusterError where that is nothing to swap."""
    path = str(_argument(service, "config_path") or "")
    if not path:
        raise ClusterError("serveConfigV2 names no config_path: this is no application of deployments.app:build")
    spec = dig(service, "spec", "rayClusterConfig", "headGroupSpec", "template", "spec", default={})
    mounts = [
        mount
        for mount in dig(spec, "containers", 0, "volumeMounts", default=[])
        if PurePosixPath(path).is_relative_to(str(dig(mount, "mountPath", default="/")))
    ]
    if not mounts:
        raise ClusterError(f"no volume is mounted where {path} lies: the configuration is part of the image")
    mount = max(mounts, key=lambda m: len(str(dig(m, "mountPath"))))
    volume: Document = next((v for v in dig(spec, "volumes", default=[]) if dig(v, "name") == dig(mount, "name")), {})
    for kind, field in (("secret", "secretName"), ("configMap", "name")):
        source = dig(volume, kind)
        if isinstance(source, dict) and source.get(field):
            inside = str(PurePosixPath(path).relative_to(str(dig(mount, "mountPath"))))
            inside = str(dig(mount, "subPath", default=inside))
            items = dig(source, "items", default=[])
            key = next((str(i["key"]) for i in items if dig(i, "path") == inside), inside)
            return ConfigVolume(kind, str(source[field]), key, str(volume["name"]))
    raise ClusterError(f"the volume {dig(mount, 'name')!r} is neither a Secret nor a ConfigMap: it cannot be swapped")


def config_changes(service: Document, name: str, revision: str) -> tuple[Change, ...]:
    """Pods mount another Secret (or ConfigMap), and the application is told its revision."""
    present = config_volume(service)
    field = "secretName" if present.kind == "secret" else "name"
    changes = [
        Change((*path, "volumes", index, present.kind, field), present.name, name)
        for path, spec in _pods(service)
        for index, volume in enumerate(dig(spec, "volumes", default=[]))
        if dig(volume, present.kind, field) == present.name and present.name != name
    ]
    before = str(dig(service, "spec", "serveConfigV2", default=""))
    after = _with_argument(before, "revision", revision)
    if after != before:
        changes.append(Change(("spec", "serveConfigV2"), before, after))
    return tuple(changes)


def new_secret(present: ConfigVolume, name: str, namespace: str, text: str, labels: dict[str, str]) -> Document:
    """The object with a new configuration; it never changes again."""
    if present.kind != "secret":
        raise ClusterError(
            f"the configuration is in the ConfigMap {present.name}: make another one and name it with --config-from"
        )
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "immutable": True,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "stringData": {present.key: text},
    }


def applied(service: Document, changes: Sequence[Change], *, back: bool = False) -> Document:
    """The service with the new (or old) values in place; ClusterError where somebody else set another one."""
    for change in changes:
        wanted, expected = (change.old, change.new) if back else (change.new, change.old)
        found = dig(service, *change.path)
        if found not in {expected, wanted}:
            where = ".".join(str(step) for step in change.path)
            raise ClusterError(
                f"{where} is {str(found)[:80]!r}, which is neither the old version's nor the new one's: somebody else "
                "changed the RayService. Nothing was done; put it right, then resume or roll back."
            )
        parent = dig(service, *change.path[:-1])
        parent[change.path[-1]] = wanted
    return service


def in_place(service: Document, changes: Sequence[Change]) -> bool:
    """Whether the service has every new value."""
    return all(dig(service, *change.path) == change.new for change in changes)


def _pods(service: Document) -> Iterator[tuple[Path, Document]]:
    """Path and specification of the pods of the head and of every group."""
    base: Path = ("spec", "rayClusterConfig")
    head: Path = (*base, "headGroupSpec", "template", "spec")
    yield head, dig(service, *head, default={})
    for index in range(len(dig(service, *base, "workerGroupSpecs", default=[]))):
        path: Path = (*base, "workerGroupSpecs", index, "template", "spec")
        yield path, dig(service, *path, default={})


def _application(document: Any) -> Any:
    return dig(document, "applications", 0, "args")


def _argument(service: Document, name: str) -> Any:
    try:
        document = yaml.safe_load(str(dig(service, "spec", "serveConfigV2", default="")))
    except yaml.YAMLError as error:
        raise ClusterError(f"serveConfigV2 is no YAML: {error}") from error
    return dig(_application(document), name)


def _with_argument(text: str, name: str, value: str) -> str:
    document = yaml.safe_load(text)
    arguments = _application(document)
    if not isinstance(arguments, dict):
        raise ClusterError("serveConfigV2 has no application with arguments")
    if arguments.get(name) == value:
        return text
    arguments[name] = value
    return yaml.safe_dump(document, sort_keys=False)
