"""What a values file of the chart asks of a cluster; the only module that knows the chart's names.

Taken from plain dictionaries, and tolerant: what is absent has the chart's default where that matters, and what
is of another form than expected asks for nothing, because the chart's own schema refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from serving.cluster.kubernetes.quantity import quantity
from serving.cluster.kubernetes.resources import dig
from serving.errors import ConfigError

INCREMENTAL: Final = "NewClusterWithIncrementalUpgrade"
NEW_CLUSTER: Final = "NewCluster"
# The chart's defaults, where a check needs one.
_GROUP: Final[dict[str, Any]] = {"gpus": 1, "gpuResource": "nvidia.com/gpu", "cpu": 8, "memory": "64Gi"}
_HEAD: Final[dict[str, Any]] = {"cpu": 2, "memory": "8Gi"}
_GATEWAY: Final[dict[str, Any]] = {"cpu": 2, "memory": "4Gi"}
_GATEWAYS: Final = 2
_REDIS: Final[dict[str, Any]] = {"cpu": 0.5, "memory": "1Gi"}
_VERIFY: Final[dict[str, Any]] = {"cpu": 0.5, "memory": "512Mi"}
_PREPARE: Final[dict[str, Any]] = {"cpu": 4, "memory": "16Gi"}
_LOADTEST: Final[dict[str, Any]] = {"cpu": 2, "memory": "4Gi"}


@dataclass(frozen=True, slots=True)
class Group:
    """Pods of one kind: `requests` of one pod by resource, in base units (cores, bytes, pieces)."""

    name: str
    requests: Mapping[str, float]
    minimum: int
    maximum: int
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    gpu_resource: str = ""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume the release makes; `storage_class` "" is the cluster's default."""

    what: str
    storage_class: str
    mode: str = "ReadWriteOnce"


@dataclass(frozen=True, slots=True)
class Needs:
    """What is asked of a cluster. All defaults: a cluster for anything."""

    groups: tuple[Group, ...] = ()
    volumes: tuple[Volume, ...] = ()
    # Claims that must exist already, in the release's namespace.
    claims: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    pull_secrets: tuple[str, ...] = ()
    prometheus_operator: bool = False
    external_secrets: bool = False
    gateway_api: bool = False
    keda: bool = False
    ingress_class: str | None = None
    network_policies: bool = True
    # Ways out that network policies open by address, as CIDRs.
    api_server: tuple[str, ...] = ()
    dns_addresses: tuple[str, ...] = ()
    # Whether the API server is opened in Cilium's own terms.
    cilium_policy: bool = False
    upgrade: str = NEW_CLUSTER
    autoscaler: bool = True
    # Whether something of the release is meant to go out (fetching models).
    egress_expected: bool = False
    # Model sources that engines could only fetch from a hub.
    hub_sources: tuple[str, ...] = ()
    known: bool = False


def read(paths: Sequence[Path]) -> Needs:
    """The needs of values files, later ones over earlier ones as helm has it; ConfigError for what is no YAML map."""
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError((f"{path}: cannot be read as a values file: {' '.join(str(error).split())}",)) from error
        if document is not None and not isinstance(document, dict):
            raise ConfigError((f"{path}: a values file is a map of names to values",))
        merged = _over(merged, document or {})
    return needs(merged)


def needs(values: Mapping[str, Any]) -> Needs:
    """The needs of one document of values."""
    sources = tuple(str(dig(m, "source", default="")) for m in _list(dig(values, "config", "models")))
    prepare = bool(dig(values, "weights", "prepare", "enabled", default=False))
    upgrade = str(dig(values, "upgrade", "strategy", default=NEW_CLUSTER))
    return Needs(
        groups=tuple(_groups(values)),
        volumes=tuple(_volumes(values)),
        claims=tuple(
            str(claim)
            for claim in (
                dig(values, "weights", "volume", "persistentVolumeClaim", "claimName"),
                dig(values, "loadtest", "existingClaim") if dig(values, "loadtest", "enabled") else None,
            )
            if claim
        ),
        images=tuple(_images(values)),
        pull_secrets=tuple(str(name) for name in _list(dig(values, "image", "pullSecrets"))),
        prometheus_operator=bool(dig(values, "metrics", "enabled", default=False)),
        external_secrets=bool(dig(values, "tenants", "externalSecret", "enabled", default=False)),
        gateway_api=bool(dig(values, "httpRoute", "enabled", default=False)) or upgrade == INCREMENTAL,
        keda=bool(_map(dig(values, "keda", "models"))),
        ingress_class=str(dig(values, "ingress", "className", default=""))
        if dig(values, "ingress", "enabled", default=False)
        else None,
        network_policies=bool(dig(values, "networkPolicy", "enabled", default=True)),
        api_server=tuple(str(cidr) for cidr in _list(dig(values, "networkPolicy", "apiServer"))),
        dns_addresses=tuple(str(cidr) for cidr in _list(dig(values, "networkPolicy", "dns", "cidrs"))),
        cilium_policy=bool(dig(values, "networkPolicy", "cilium", default=False)),
        upgrade=upgrade,
        autoscaler=bool(dig(values, "autoscaler", "enabled", default=True)),
        egress_expected=prepare and bool(_list(dig(values, "networkPolicy", "prepareEgress"))),
        hub_sources=() if prepare else tuple(source for source in sources if source.startswith("hf:")),
        known=True,
    )


def _groups(values: Mapping[str, Any]) -> Iterator[Group]:
    yield _group("head", {**_HEAD, **_map(dig(values, "head")), "gpus": 0, "min": 1, "max": 1})
    replicas = dig(values, "config", "gateway", "replicas", default=_GATEWAYS)
    least = dig(replicas, "min", default=1) if isinstance(replicas, dict) else replicas
    most = dig(replicas, "max", default=least) if isinstance(replicas, dict) else replicas
    yield _group("gateway", {**_GATEWAY, **_map(dig(values, "gateway")), "gpus": 0, "min": least, "max": most})
    if dig(values, "redis", "enabled", default=True):
        yield _group("redis", {**_map(dig(values, "redis")), **_REDIS, "gpus": 0, "min": 1, "max": 1})
    if dig(values, "verify", "enabled", default=True):
        yield _group("verify", {**_map(dig(values, "verify")), **_VERIFY, "gpus": 0, "min": 0, "max": 1})
    if dig(values, "loadtest", "enabled", default=False):
        yield _group("loadtest", {**_LOADTEST, **_map(dig(values, "loadtest")), "gpus": 0, "min": 0, "max": 1})
    if dig(values, "weights", "prepare", "enabled", default=False):
        prepare = {**_PREPARE, **_map(dig(values, "weights", "prepare"))}
        yield _group("prepare", {**prepare, "gpus": 0, "min": 1, "max": 1})
    defaults = {**_GROUP, **_map(dig(values, "workerGroupDefaults"))}
    for name, given in _map(dig(values, "workerGroups")).items():
        yield _group(str(name), {**defaults, **_map(given)})


def _group(name: str, spec: Mapping[str, Any]) -> Group:
    gpus = _number(spec.get("gpus"))
    resource = str(spec.get("gpuResource") or "")
    requests = {"cpu": _number(spec.get("cpu")), "memory": _number(spec.get("memory"))}
    if gpus:
        requests[resource] = gpus
    requests |= {str(key): _number(value) for key, value in _map(spec.get("extraResources")).items()}
    hosts = max(1, int(_number(spec.get("hosts", 1))))
    minimum = int(_number(spec.get("min", 0))) * hosts
    return Group(
        name,
        {key: value for key, value in requests.items() if value > 0},
        minimum,
        max(minimum, int(_number(spec.get("max", 1))) * hosts),
        {str(key): str(value) for key, value in _map(spec.get("nodeSelector")).items()},
        tuple(_map(toleration) for toleration in _list(spec.get("tolerations"))),
        resource if gpus else "",
    )


def _volumes(values: Mapping[str, Any]) -> Iterator[Volume]:
    if dig(values, "redis", "enabled", default=True):
        yield Volume("Redis", str(dig(values, "redis", "storageClass", default="")))
    if dig(values, "loadtest", "enabled", default=False) and not dig(values, "loadtest", "existingClaim"):
        yield Volume("the load test's report", str(dig(values, "loadtest", "storageClass", default="")))


def _images(values: Mapping[str, Any]) -> Iterator[str]:
    if repository := dig(values, "image", "repository"):
        yield str(repository)
    for group in _map(dig(values, "workerGroups")).values():
        if repository := dig(group, "image", "repository"):
            yield str(repository)
    if dig(values, "redis", "enabled", default=True) and (image := dig(values, "redis", "image")):
        yield str(image)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    try:
        return quantity(value)
    except ValueError:
        return 0.0
