"""What a preflight knows of a cluster: read once, each kind for itself, so that one refusal hides nothing else."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from serving.cluster.kubernetes import resources as kinds
from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.permissions import lacking
from serving.cluster.kubernetes.resources import Document, Resource, dig
from serving.errors import ApiDenied, ApiMissing, ApiUnreachable, KubernetesError

# API groups of operators that checks ask about, with the version used.
GROUPS: Final = (
    "ray.io/v1",
    "monitoring.coreos.com/v1",
    "monitoring.coreos.com/v1alpha1",
    "external-secrets.io/v1",
    "gateway.networking.k8s.io/v1",
    "keda.sh/v1alpha1",
    "cilium.io/v2",
)
API_NAME: Final = "kubernetes.default.svc"


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something that could not be read: why, and what would let it be."""

    why: str
    fix: str


Read = tuple[Document, ...] | Unknown


@dataclass(frozen=True, slots=True)
class Facts:
    """A cluster as it was found. `served`: by group/version, the kinds that the API server serves."""

    namespace: str
    version: str = ""
    served: Mapping[str, frozenset[str]] | Unknown = field(default_factory=dict)
    # None: there is no such namespace yet.
    namespace_labels: Mapping[str, str] | Unknown | None = None
    nodes: Read = ()
    storage_classes: Read = ()
    ingress_classes: Read = ()
    deployments: Read = ()
    daemon_sets: Read = ()
    quotas: Read = ()
    limit_ranges: Read = ()
    claims: Read = ()
    network_policies: Read = ()
    # HOST:PORT where the API server that answered says it is, which the Service `kubernetes` leads to; empty: nothing.
    api_server: str = ""
    # Whether a name of the cluster resolves here; None: this is no pod, so nobody can say.
    resolves: bool | None = None


def gather(client: Client, namespace: str, *, in_pod: bool, resolve: Callable[[str], bool] | None = None) -> Facts:
    """Read everything; raises ApiUnreachable, and ApiDenied where the server does not know who asks (401)."""
    version = str(client.raw("/version").get("gitVersion") or "")

    def listed(resource: Resource, where: str | None = None) -> Read:
        try:
            return client.list(resource, where).items
        except ApiMissing:
            return ()
        except KubernetesError as error:
            return unknown(error)

    return Facts(
        namespace=namespace,
        version=version,
        served=_served(client),
        namespace_labels=_labels(client, namespace),
        nodes=listed(kinds.NODES),
        storage_classes=listed(kinds.STORAGE_CLASSES),
        ingress_classes=listed(kinds.INGRESS_CLASSES),
        deployments=listed(kinds.DEPLOYMENTS),
        daemon_sets=listed(kinds.DAEMON_SETS),
        quotas=listed(kinds.QUOTAS, namespace),
        limit_ranges=listed(kinds.LIMIT_RANGES, namespace),
        claims=listed(kinds.CLAIMS, namespace),
        network_policies=listed(kinds.NETWORK_POLICIES, namespace),
        api_server=_api_server(client),
        resolves=(resolve or _resolves)(API_NAME) if in_pod else None,
    )


def unknown(error: KubernetesError) -> Unknown:
    """What a refusal or failure means for what was asked; raises what concerns everything."""
    if isinstance(error, ApiUnreachable) or error.status == 401:  # noqa: PLR2004  # HTTP: not authenticated
        raise error
    if isinstance(error, ApiDenied):
        return Unknown(f"may not {error.verb} {error.resource}", f"grant {lacking(error)}")
    return Unknown(str(error), "run it again; if it stays, the API server's log says more")


def _served(client: Client) -> Mapping[str, frozenset[str]] | Unknown:
    served = {}
    for group in GROUPS:
        try:
            listed = client.raw(f"/apis/{group}")
        except ApiMissing:
            continue
        except KubernetesError as error:
            return unknown(error)
        served[group] = frozenset(str(dig(r, "name")) for r in listed.get("resources") or [])
    return served


def _api_server(client: Client) -> str:
    """Discovery tells it to everybody who may ask at all; the endpoints themselves would take a right of their own."""
    try:
        told = client.raw("/api").get("serverAddressByClientCIDRs") or []
    except KubernetesError as error:
        unknown(error)
        return ""
    # Others are for clients in some networks, such as those of Services.
    everywhere = [entry for entry in told if str(dig(entry, "clientCIDR", default="")).endswith("/0")]
    return str(dig(everywhere, 0, "serverAddress", default=""))


def _labels(client: Client, namespace: str) -> Mapping[str, str] | Unknown | None:
    try:
        found = client.get(kinds.NAMESPACES, None, namespace)
    except ApiMissing:
        return None
    except KubernetesError as error:
        return unknown(error)
    labels: Mapping[str, str] = dig(found, "metadata", "labels", default={})
    return labels


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, 443)
    except OSError:
        return False
    return True
