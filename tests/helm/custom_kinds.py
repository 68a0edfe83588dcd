"""Kinds of operators whose CRDs are nowhere at hand: the documented fields that the chart and the guides use, and no others.

Written down from each project's reference, strict and closed: a misspelt or mistyped field fails, and a field that is new to us has
to be looked up first. What is left out here may well exist.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]+(h|m|s|ms))+$")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Closed):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Object(_Closed):
    metadata: _Metadata


# Prometheus operator, monitoring.coreos.com/v1alpha1.
class _HttpDiscovery(_Closed):
    url: Annotated[str, StringConstraints(pattern=r"^https?://.+$")]
    refreshInterval: Duration | None = None


class _Relabeling(_Closed):
    targetLabel: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]
    replacement: str
    action: Literal["replace"]


class _ScrapeSpec(_Closed):
    scrapeInterval: Duration
    scrapeTimeout: Duration
    relabelings: list[_Relabeling] = Field(min_length=1)
    httpSDConfigs: list[_HttpDiscovery] = Field(min_length=1)


class ScrapeConfig(_Object):
    """Targets that Prometheus asks an HTTP endpoint for."""

    apiVersion: Literal["monitoring.coreos.com/v1alpha1"]
    kind: Literal["ScrapeConfig"]
    spec: _ScrapeSpec


# External Secrets Operator, external-secrets.io/v1.
class _StoreRef(_Closed):
    name: Name
    kind: Literal["SecretStore", "ClusterSecretStore"]


class _SecretTemplate(_Closed):
    engineVersion: Literal["v2"]
    data: dict[str, str]


class _SecretTarget(_Closed):
    name: Name
    creationPolicy: Literal["Owner", "Orphan", "Merge", "None"]
    template: _SecretTemplate


class _RemoteRef(_Closed):
    key: str
    property: str | None = None


class _SecretData(_Closed):
    secretKey: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]{1,253}$")]
    remoteRef: _RemoteRef


class _ExternalSecretSpec(_Closed):
    refreshInterval: Duration
    secretStoreRef: _StoreRef
    target: _SecretTarget
    data: list[_SecretData] = Field(min_length=1)


class ExternalSecret(_Object):
    """A Secret made from a store."""

    apiVersion: Literal["external-secrets.io/v1"]
    kind: Literal["ExternalSecret"]
    spec: _ExternalSecretSpec


class _AccountRef(_Closed):
    name: Name
    namespace: Name


class _AzureVault(_Closed):
    authType: Literal["ServicePrincipal", "ManagedIdentity", "WorkloadIdentity"]
    vaultUrl: Annotated[str, StringConstraints(pattern=r"^https://.+$")]
    serviceAccountRef: _AccountRef


class _Provider(_Closed):
    azurekv: _AzureVault


class _StoreCondition(_Closed):
    namespaces: list[Name]


class _StoreSpec(_Closed):
    provider: _Provider
    conditions: list[_StoreCondition] = []


class ClusterSecretStore(_Object):
    """A store for the whole cluster."""

    apiVersion: Literal["external-secrets.io/v1"]
    kind: Literal["ClusterSecretStore"]
    spec: _StoreSpec


# Gateway API, gateway.networking.k8s.io/v1.
class _ParentRef(_Closed):
    name: Name
    namespace: Name | None = None
    sectionName: Name | None = None
    port: int | None = Field(default=None, ge=1, le=65535)


class _PathMatch(_Closed):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: Annotated[str, StringConstraints(pattern=r"^/", max_length=1024)]


class _RouteMatch(_Closed):
    path: _PathMatch


class _BackendRef(_Closed):
    name: Name
    port: int = Field(ge=1, le=65535)


class _RouteTimeouts(_Closed):
    request: Annotated[str, StringConstraints(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]


class _RouteRule(_Closed):
    matches: list[_RouteMatch] = Field(min_length=1, max_length=64)
    backendRefs: list[_BackendRef] = Field(min_length=1, max_length=16)
    timeouts: _RouteTimeouts | None = None


class _RouteSpec(_Closed):
    parentRefs: list[_ParentRef] = Field(min_length=1, max_length=32)
    hostnames: list[str] = Field(default=[], max_length=16)
    rules: list[_RouteRule] = Field(min_length=1, max_length=16)


class HTTPRoute(_Object):
    """Paths that a Gateway leads to a Service."""

    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    spec: _RouteSpec


# Cilium, cilium.io/v2.
class _Selector(_Closed):
    matchLabels: dict[str, str] = Field(min_length=1)


class _CiliumPort(_Closed):
    # Text, as Cilium wants it.
    port: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}$")]
    protocol: Literal["TCP", "UDP", "SCTP", "ANY"]


class _CiliumPorts(_Closed):
    ports: list[_CiliumPort] = Field(min_length=1, max_length=40)


class _CiliumEgress(_Closed):
    toEntities: list[Literal["kube-apiserver"]] = Field(min_length=1)
    toPorts: list[_CiliumPorts] = Field(min_length=1)


class _CiliumSpec(_Closed):
    endpointSelector: _Selector
    egress: list[_CiliumEgress] = Field(min_length=1)


class CiliumNetworkPolicy(_Object):
    """A policy in Cilium's own terms."""

    apiVersion: Literal["cilium.io/v2"]
    kind: Literal["CiliumNetworkPolicy"]
    spec: _CiliumSpec


DESCRIBED: dict[str, type[_Object]] = {
    model.__name__: model
    for model in (ScrapeConfig, ExternalSecret, ClusterSecretStore, HTTPRoute, CiliumNetworkPolicy)
}


def described(thing: dict[str, Any]) -> bool:
    """Whether its kind is one of these."""
    return thing["kind"] in DESCRIBED
