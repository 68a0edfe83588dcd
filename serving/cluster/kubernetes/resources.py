"""Kinds of Kubernetes objects that are asked for, and their addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from serving.config import ENV_RELEASE

# One object, as JSON.
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind: `group` is "" for the core API."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, sub: str = "") -> str:
        """Its address below the API server; without a namespace, of every namespace."""
        parts = ["/api", self.version] if not self.group else ["/apis", self.group, self.version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        if sub:
            parts.append(sub)
        return "/".join(parts)


NODES: Final = Resource("", "v1", "nodes", namespaced=False)
NAMESPACES: Final = Resource("", "v1", "namespaces", namespaced=False)
PODS: Final = Resource("", "v1", "pods")
EVENTS: Final = Resource("", "v1", "events")
SERVICES: Final = Resource("", "v1", "services")
CONFIG_MAPS: Final = Resource("", "v1", "configmaps")
CLAIMS: Final = Resource("", "v1", "persistentvolumeclaims")
QUOTAS: Final = Resource("", "v1", "resourcequotas")
LIMIT_RANGES: Final = Resource("", "v1", "limitranges")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments")
DAEMON_SETS: Final = Resource("apps", "v1", "daemonsets")
STORAGE_CLASSES: Final = Resource("storage.k8s.io", "v1", "storageclasses", namespaced=False)
NETWORK_POLICIES: Final = Resource("networking.k8s.io", "v1", "networkpolicies")
INGRESS_CLASSES: Final = Resource("networking.k8s.io", "v1", "ingressclasses", namespaced=False)
JOBS: Final = Resource("batch", "v1", "jobs")
BUDGETS: Final = Resource("policy", "v1", "poddisruptionbudgets")
ENDPOINT_SLICES: Final = Resource("discovery.k8s.io", "v1", "endpointslices")
RAY_SERVICES: Final = Resource("ray.io", "v1", "rayservices")
RAY_CLUSTERS: Final = Resource("ray.io", "v1", "rayclusters")

# Labels that KubeRay puts on what it makes.
LABEL_CLUSTER: Final = "ray.io/cluster"
LABEL_GROUP: Final = "ray.io/group"
LABEL_NODE_TYPE: Final = "ray.io/node-type"
LABEL_SERVICE: Final = "ray.io/originated-from-cr-name"


def dig(document: Any, *path: str | int, default: Any = None) -> Any:
    """What stands at a path of keys and indices; `default` where something on the way is absent or null."""
    for step in path:
        if isinstance(step, int):
            if not isinstance(document, list) or not -len(document) <= step < len(document):
                return default
            document = document[step]
        else:
            if not isinstance(document, dict) or document.get(step) is None:
                return default
            document = document[step]
    return default if document is None else document


def name_of(document: Document) -> str:
    """metadata.name."""
    return str(dig(document, "metadata", "name", default=""))


def release_of(service: Document) -> str:
    """The release's name among those that a Prometheus watches, as the pods of a RayService are told it; "": none."""
    head = dig(service, "spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", default=[])
    told = (variable for container in head for variable in dig(container, "env", default=[]))
    return next((str(dig(v, "value", default="")) for v in told if dig(v, "name") == ENV_RELEASE), "")


def version_of(document: Document) -> str:
    """metadata.resourceVersion."""
    return str(dig(document, "metadata", "resourceVersion", default=""))


# What a support bundle holds of the release's namespace.
BUNDLED: Final[tuple[Resource, ...]] = (
    RAY_SERVICES,
    RAY_CLUSTERS,
    PODS,
    EVENTS,
    SERVICES,
    ENDPOINT_SLICES,
    CONFIG_MAPS,
    CLAIMS,
    QUOTAS,
    LIMIT_RANGES,
    NETWORK_POLICIES,
    BUDGETS,
    DEPLOYMENTS,
)
