"""Checks of nodes: GPUs as the device plug-in offers them, and places for every group of pods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from serving.cluster.kubernetes.facts import Read, Unknown
from serving.cluster.kubernetes.findings import Finding, fail, ok, warn
from serving.cluster.kubernetes.quantity import quantity, written
from serving.cluster.kubernetes.resources import Document, dig, name_of
from serving.cluster.kubernetes.values import Group, Needs

GPU: Final = "nvidia.com/gpu"
MIG: Final = "nvidia.com/mig-"
# Labels that say a machine has GPUs, by the GPU operator's feature discovery and by clouds.
PRESENT: Final = (
    ("nvidia.com/gpu.present", "true"),
    ("feature.node.kubernetes.io/pci-10de.present", "true"),
    ("kubernetes.azure.com/accelerator", "nvidia"),
)
BLOCKING: Final = frozenset({"NoSchedule", "NoExecute"})
# Taints that come and go with a node's state; cordoned nodes are counted apart.
_PASSING: Final = "node.kubernetes.io/"


def gpus(nodes: Sequence[Document], daemon_sets: Read, needs: Needs) -> Iterator[Finding]:
    """Whether the device plug-in offers what groups ask for."""
    offered: dict[str, float] = {}
    idle = []
    for node in nodes:
        allocatable = dig(node, "status", "allocatable", default={})
        mine = {r: quantity(v) for r, v in allocatable.items() if r == GPU or r.startswith(MIG)}
        for resource, amount in mine.items():
            offered[resource] = offered.get(resource, 0.0) + amount
        labels = dig(node, "metadata", "labels", default={})
        if not any(mine.values()) and any(labels.get(key) == value for key, value in PRESENT):
            idle.append(name_of(node))
    if idle:
        why = "they have GPUs, and the device plug-in offers none of them: driver or plug-in are not ready there"
        fix = "kubectl -n gpu-operator get pods -o wide; look for the driver, toolkit and device-plugin pods"
        yield warn("gpu nodes", ", ".join(idle), why, fix)
    wanted = sorted({group.gpu_resource for group in needs.groups if group.gpu_resource})
    for resource in wanted:
        if offered.get(resource):
            yield ok(f"gpus {resource}", f"{offered[resource]:g} on {len(nodes)} nodes")
            continue
        least = sum(group.minimum for group in needs.groups if group.gpu_resource == resource)
        why = "no node offers this resource"
        fix = "install the GPU operator (or the device plug-in)"
        if resource.startswith(MIG):
            there = ", ".join(sorted(r for r, n in offered.items() if n)) or "none"
            fix = f"set the nodes' nvidia.com/mig.config, with strategy mixed; offered here: {there}"
        if least:
            yield fail(f"gpus {resource}", "none", why, f"{fix}, or wait for the node pool to grow")
        else:
            yield warn(f"gpus {resource}", "none now", f"{why}; fine if a node pool grows from zero", fix)
    if not needs.known:
        there = ", ".join(f"{amount:g} × {resource}" for resource, amount in sorted(offered.items()) if amount)
        yield (
            ok("gpus", there)
            if there
            else warn(
                "gpus", "none", "no node offers GPUs", "fine for engines on processors; else install the GPU operator"
            )
        )
    if wanted and not isinstance(daemon_sets, Unknown) and not any(_is_plugin(d) for d in daemon_sets):
        why = "no DaemonSet looks like NVIDIA's device plug-in; a cloud may run it out of sight"
        yield warn("device plugin", "not seen", why, "see that nodes offer nvidia.com/gpu")


def groups(nodes: Sequence[Document], needs: Needs) -> Iterator[Finding]:
    """Whether each group has nodes by label, taint and size, and for its least number of pods."""
    for group in needs.groups:
        yield _place(group, nodes)


def _place(group: Group, nodes: Sequence[Document]) -> Finding:
    what = f"group {group.name}"
    grows = "fine if the cluster's autoscaler makes such nodes" if not group.minimum else "its least pods would wait"
    report = warn if not group.minimum else fail
    selected = [n for n in nodes if group.node_selector.items() <= dig(n, "metadata", "labels", default={}).items()]
    if not selected:
        labels = ",".join(f"{k}={v}" for k, v in sorted(group.node_selector.items()))
        return report(
            what, f"no node has {labels or 'any label'}", grows, "label the pool's nodes, or mend nodeSelector"
        )
    borne = [(n, _refused(n, group)) for n in selected]
    free = [n for n, taint in borne if taint is None]
    if not free:
        taints = sorted({str(taint) for _, taint in borne})
        return report(what, f"its {len(selected)} node(s) have taints: {', '.join(taints)}", grows, "add tolerations")
    fits = {name_of(n): _fits(n, group.requests) for n in free}
    if not any(fits.values()):
        ask = ", ".join(f"{written(v, r)} {r}" for r, v in group.requests.items())
        largest = max(free, key=lambda n: _amount(n, "cpu"))
        have = ", ".join(f"{written(_amount(largest, r), r)} {r}" for r in group.requests)
        why = f"a pod asks for {ask}; the largest node offers {have}"
        return report(what, "no node is large enough", why, "lower the group's resources, or use larger nodes")
    places = sum(fits.values())
    if places < group.minimum:
        why = f"{group.minimum} pods are the least, and empty nodes would take {places}"
        return warn(what, f"{places} place(s)", why, "fine if the pool grows; else add nodes or lower min")
    return ok(what, f"{places} place(s) on {sum(1 for f in fits.values() if f)} node(s), other pods not counted")


def _fits(node: Document, requests: Mapping[str, float]) -> int:
    """Pods of this size on the node if it were empty."""
    if dig(node, "spec", "unschedulable", default=False) or not _ready(node):
        return 0
    counts = [math.floor(_amount(node, resource) / amount) for resource, amount in requests.items() if amount > 0]
    return min(counts, default=int(_amount(node, "pods")))


def _amount(node: Document, resource: str) -> float:
    return quantity(dig(node, "status", "allocatable", resource, default="0"))


def _ready(node: Document) -> bool:
    conditions = dig(node, "status", "conditions", default=[])
    return not any(dig(c, "type") == "Ready" and dig(c, "status") != "True" for c in conditions)


def _refused(node: Document, group: Group) -> str | None:
    """A taint that keeps the group's pods away."""
    for taint in dig(node, "spec", "taints", default=[]):
        key = str(dig(taint, "key", default=""))
        if dig(taint, "effect") not in BLOCKING or key.startswith(_PASSING):
            continue
        if not any(_tolerates(toleration, taint) for toleration in group.tolerations):
            return f"{key}={dig(taint, 'value', default='')}:{dig(taint, 'effect')}"
    return None


def _tolerates(toleration: Mapping[str, Any], taint: Any) -> bool:
    effect = toleration.get("effect")
    if effect and effect != dig(taint, "effect"):
        return False
    if toleration.get("operator") == "Exists":
        return not toleration.get("key") or toleration.get("key") == dig(taint, "key")
    same_value = str(toleration.get("value") or "") == str(dig(taint, "value", default=""))
    return toleration.get("key") == dig(taint, "key") and same_value


def _is_plugin(daemon_set: Document) -> bool:
    return "device-plugin" in name_of(daemon_set) and "nvidia" in name_of(daemon_set)
