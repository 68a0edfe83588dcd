"""What each command may do, and no more: the RBAC rules of `galerne cluster`, and what a refusal lacks.

`cluster` rules go into a ClusterRole, `namespace` rules into a Role of the release's namespace, `monitoring` rules into
one of Prometheus' namespace. A test runs every command against a server that grants exactly these, and another holds
that each rule is needed. Secrets are never read: a rollout creates one, and nothing else touches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from serving.cluster.kubernetes import resources as kinds
from serving.cluster.kubernetes.resources import Resource
from serving.errors import ApiDenied

Scope = Literal["cluster", "namespace", "monitoring"]
RBAC_API: Final = "rbac.authorization.k8s.io"


@dataclass(frozen=True, slots=True)
class Rule:
    """Verbs on one resource (with its subresource, as RBAC writes it)."""

    group: str
    resource: str
    verbs: tuple[str, ...]
    scope: Scope
    why: str


def _of(resource: Resource, verbs: str, why: str, scope: Scope = "namespace", sub: str = "") -> Rule:
    return Rule(resource.group, resource.plural + (f"/{sub}" if sub else ""), tuple(verbs.split()), scope, why)


_PROMETHEUS: Final = _of(
    # Of one namespace: behind the API server's proxy a Service asks nobody who he is.
    kinds.SERVICES,
    "get",
    "Prometheus through the API server's proxy (--prometheus service:…)",
    "monitoring",
    "proxy",
)

PREFLIGHT: Final = (
    _of(kinds.NODES, "list", "GPUs, labels, taints, sizes", "cluster"),
    _of(kinds.NAMESPACES, "get", "its Pod Security level"),
    _of(kinds.STORAGE_CLASSES, "list", "classes that the values name", "cluster"),
    _of(kinds.INGRESS_CLASSES, "list", "the class that the values name", "cluster"),
    _of(kinds.DEPLOYMENTS, "list", "the KubeRay operator and cluster DNS", "cluster"),
    _of(kinds.DAEMON_SETS, "list", "the network plug-in and the GPU device plug-in", "cluster"),
    _of(kinds.QUOTAS, "list", "room for the release"),
    _of(kinds.LIMIT_RANGES, "list", "limits on single containers"),
    _of(kinds.CLAIMS, "list", "the claim that weights lie on"),
    _of(kinds.NETWORK_POLICIES, "list", "policies of others in the namespace"),
)
STATUS: Final = (
    _of(kinds.RAY_SERVICES, "list watch", "the service, its clusters and Serve's state"),
    _of(kinds.RAY_CLUSTERS, "list", "groups and their bounds"),
    _of(kinds.PODS, "list", "readiness, restarts, images, GPUs"),
    _PROMETHEUS,
)
ROLLOUT: Final = (
    _of(kinds.RAY_SERVICES, "get list watch update", "the new version, its share, the way back"),
    _of(kinds.PODS, "list", "which instances belong to which version"),
    Rule("", "secrets", ("create",), "namespace", "the new configuration, under a name of its own"),
    _PROMETHEUS,
)
DRAIN: Final = (
    _of(kinds.NODES, "get patch", "cordon and uncordon", "cluster"),
    _of(kinds.PODS, "list", "pods on the node or of the group"),
    _of(kinds.PODS, "create", "eviction, which keeps to disruption budgets", sub="eviction"),
    _of(kinds.RAY_CLUSTERS, "get list update", "bounds of a worker group"),
)
FREE: Final = (
    _of(kinds.RAY_CLUSTERS, "get list update", "those that are being deleted, and their finalizer"),
    _of(kinds.RAY_SERVICES, "get list update", "the same of the service"),
    _of(kinds.PODS, "list", "pods that have not ended, and why the Job that empties Redis does not run"),
    _of(kinds.JOBS, "list", "that Job"),
)
BUNDLE: Final = (
    *(_of(kind, "list", "the object, masked") for kind in kinds.BUNDLED),
    _of(kinds.NODES, "list", "the object, masked", "cluster"),
    _of(kinds.PODS, "get", "the last lines, masked", sub="log"),
    _PROMETHEUS,
)

COMMANDS: Final[dict[str, tuple[Rule, ...]]] = {
    "preflight": PREFLIGHT,
    "status": STATUS,
    "rollout": ROLLOUT,
    "drain": DRAIN,
    "free": FREE,
    "support-bundle": BUNDLE,
}


def roles(commands: Sequence[str], name: str, namespace: str, monitoring: str) -> list[dict[str, Any]]:
    """A ClusterRole and a Role a namespace that grant what these commands need; bind them to whoever runs them."""
    where: dict[Scope, str | None] = {"cluster": None, "namespace": namespace, "monitoring": monitoring}
    granted: dict[str | None, list[Rule]] = {place: [] for place in where.values()}
    for command in commands:
        for rule in COMMANDS[command]:
            granted[where[rule.scope]].append(rule)
    return [
        {
            "apiVersion": f"{RBAC_API}/v1",
            "kind": "ClusterRole" if place is None else "Role",
            "metadata": {"name": name} | ({} if place is None else {"namespace": place}),
            "rules": _merged(rules),
        }
        for place, rules in granted.items()
        if rules
    ]


def _merged(rules: Sequence[Rule]) -> list[dict[str, Any]]:
    verbs: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        known = verbs.setdefault((rule.group, rule.resource), [])
        known += [verb for verb in rule.verbs if verb not in known]
    return [{"apiGroups": [group], "resources": [name], "verbs": words} for (group, name), words in verbs.items()]


def lacking(error: ApiDenied) -> str:
    """The rule that would have let a refused request through, as one reads it in a Role."""
    where = f"a Role in namespace {error.namespace}" if error.namespace else "a ClusterRole"
    return f'{where} with {{apiGroups: ["{error.group}"], resources: ["{error.resource}"], verbs: ["{error.verb}"]}}'
