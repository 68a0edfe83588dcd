"""Preflight: facts of a cluster and needs of a release in, findings out. Nothing here reads anything.

A check that lacks its facts is a warning that says which permission is missing, never an "ok".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from serving.cluster.kubernetes.checks_network import api_server, enforced, node_dns
from serving.cluster.kubernetes.checks_nodes import gpus, groups
from serving.cluster.kubernetes.facts import Facts, Read, Unknown
from serving.cluster.kubernetes.findings import Finding, fail, not_seen, ok, warn
from serving.cluster.kubernetes.quantity import quantity, written
from serving.cluster.kubernetes.resources import Document, dig, name_of
from serving.cluster.kubernetes.values import INCREMENTAL, Needs

OLDEST: Final = (1, 32)
NEWEST: Final = (1, 36)
KUBERAY: Final = (1, 7)
# Label selectors of what others install; each is what its own chart or manifest sets.
OPERATOR: Final = ("app.kubernetes.io/name", "kuberay-operator")
DNS: Final = ("k8s-app", ("kube-dns", "coredns"))
DEFAULT_CLASS: Final = "storageclass.kubernetes.io/is-default-class"
ENFORCE: Final = "pod-security.kubernetes.io/enforce"
# Provisioners of file systems that several nodes can mount for writing; others' classes are taken to be disks.
SHARED: Final = re.compile(r"file\.csi|nfs|cephfs|efs\.csi|blob\.csi|lustre|weka|juicefs|netapp|glusterfs|smb")

Check = Callable[[Facts, Needs], Iterator[Finding]]


def check(facts: Facts, needs: Needs) -> tuple[Finding, ...]:
    """Every finding, in the order in which one would mend them."""
    return tuple(finding for one in CHECKS for finding in one(facts, needs))


def version(facts: Facts, _: Needs) -> Iterator[Finding]:
    """The release of Kubernetes."""
    match = re.match(r"v?(\d+)\.(\d+)", facts.version)
    tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if match is None:
        yield warn("version", facts.version or "none", "the API server does not say its version", f"tested: {tested}")
        return
    found = (int(match[1]), int(match[2]))
    if found < OLDEST:
        yield fail("version", facts.version, f"older than what is tested ({tested})", "upgrade Kubernetes first")
    elif found > NEWEST:
        yield warn("version", facts.version, f"newer than what is tested ({tested})", "try it beside production first")
    else:
        yield ok("version", f"{facts.version}, tested")


def definitions(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """Kinds of operators that the release makes objects of."""
    if isinstance(facts.served, Unknown):
        yield not_seen("crds", facts.served)
        return
    wanted: list[tuple[str, tuple[str, ...], str]] = [
        ("ray.io/v1", ("rayservices", "rayclusters"), "KubeRay 1.7: helm install kuberay-operator")
    ]
    if needs.prometheus_operator:
        operator = "the Prometheus operator, or set metrics.enabled to false"
        wanted.append(("monitoring.coreos.com/v1", ("podmonitors", "prometheusrules"), operator))
        wanted.append(("monitoring.coreos.com/v1alpha1", ("scrapeconfigs",), operator))
    if needs.external_secrets:
        fix = "the External Secrets Operator, or use tenants.existingSecret"
        wanted.append(("external-secrets.io/v1", ("externalsecrets",), fix))
    if needs.gateway_api:
        fix = "Gateway API's CRDs and a controller for them"
        wanted.append(("gateway.networking.k8s.io/v1", ("gateways", "httproutes"), fix))
    if needs.keda:
        wanted.append(("keda.sh/v1alpha1", ("scaledobjects",), "KEDA, or leave keda.models empty"))
    if needs.cilium_policy:
        wanted.append(("cilium.io/v2", ("ciliumnetworkpolicies",), "Cilium, or set networkPolicy.cilium to false"))
    for group, plurals, fix in wanted:
        missing = [name for name in plurals if name not in facts.served.get(group, frozenset())]
        what = f"crds {group}"
        if missing:
            why = "the release makes objects of these kinds"
            yield fail(what, f"{', '.join(missing)} not served", why, f"install {fix}")
        else:
            yield ok(what, f"{', '.join(plurals)} served")


def operator(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """The KubeRay operator: running, and of a release that knows our fields."""
    if isinstance(facts.deployments, Unknown):
        yield not_seen("kuberay", facts.deployments)
        return
    found = [d for d in facts.deployments if dig(d, "metadata", "labels", OPERATOR[0]) == OPERATOR[1]]
    if not found:
        yield fail("kuberay", "no operator", "nothing would act on the RayService", "helm install kuberay-operator")
        return
    one = found[0]
    image = str(dig(one, "spec", "template", "spec", "containers", 0, "image", default=""))
    match = re.search(r":v?(\d+)\.(\d+)", image)
    if not dig(one, "status", "availableReplicas", default=0):
        fix = f"kubectl -n {dig(one, 'metadata', 'namespace')} describe deployment {name_of(one)}"
        yield fail("kuberay", f"{image} is not available", "nothing acts on the RayService", fix)
    elif match and (int(match[1]), int(match[2])) < KUBERAY:
        yield warn(
            "kuberay", image, "older than 1.7: it drops fields of the chart, and cannot roll back", "upgrade it to 1.7"
        )
    else:
        yield ok("kuberay", image)
    if needs.upgrade == INCREMENTAL:
        arguments = " ".join(
            str(a)
            for key in ("args", "command")
            for a in dig(one, "spec", "template", "spec", "containers", 0, key, default=[])
        )
        if "RayServiceIncrementalUpgrade=true" not in arguments:
            fix = "set the operator's feature gate RayServiceIncrementalUpgrade to true"
            yield fail("kuberay gate", "RayServiceIncrementalUpgrade is off", f"upgrade.strategy is {INCREMENTAL}", fix)
        if not needs.autoscaler:
            yield fail("autoscaler", "off", f"{INCREMENTAL} needs Ray's autoscaler", "set autoscaler.enabled to true")


def storage(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """Classes of the volumes that the release makes, and claims that must be there."""
    classes = facts.storage_classes
    if isinstance(classes, Unknown):
        yield not_seen("storage", classes)
    else:
        by_name = {name_of(c): c for c in classes}
        default = [n for n, c in by_name.items() if dig(c, "metadata", "annotations", DEFAULT_CLASS) == "true"]
        for volume in needs.volumes:
            yield _volume(volume.what, volume.storage_class, volume.mode, by_name, default)
    yield from _claims(facts.claims, needs)


def _volume(what: str, wanted: str, mode: str, classes: dict[str, Document], default: list[str]) -> Finding:
    name = f"storage for {what}"
    if not wanted and not default:
        why = "the volume would wait for ever"
        return fail(name, "no default storage class", why, "name one in the values, or mark one as default")
    chosen = wanted or default[0]
    if chosen not in classes:
        there = ", ".join(sorted(classes)) or "none"
        return fail(name, f"no class {chosen}", "the volume would wait for ever", f"classes here: {there}")
    provisioner = str(dig(classes[chosen], "provisioner", default=""))
    if mode == "ReadWriteMany" and not SHARED.search(provisioner):
        why = f"{provisioner} provides disks, which one node mounts at a time"
        return warn(name, f"class {chosen}", why, "name a class of a shared file system")
    return ok(name, f"class {chosen} ({provisioner}), {mode}")


def _claims(claims: Read, needs: Needs) -> Iterator[Finding]:
    if not needs.claims:
        return
    if isinstance(claims, Unknown):
        yield not_seen("claims", claims)
        return
    phases = {name_of(c): str(dig(c, "status", "phase", default="")) for c in claims}
    for name in needs.claims:
        if name not in phases:
            yield fail(f"claim {name}", "not there", "pods that mount it cannot start", "create it before installing")
        elif phases[name] == "Lost":
            yield fail(f"claim {name}", "Lost", "its volume is gone", "bind it to a volume again")
        else:
            yield ok(f"claim {name}", phases[name])


def dns(facts: Facts, _: Needs) -> Iterator[Finding]:
    """Cluster DNS, by which pods find Ray's head."""
    if facts.resolves is False:
        why = "pods find Ray's head by a name of the cluster"
        yield fail("dns", "names of the cluster do not resolve in this pod", why, "mend cluster DNS, or its policies")
    elif isinstance(facts.deployments, Unknown):
        yield not_seen("dns", facts.deployments)
    else:
        found = [d for d in facts.deployments if dig(d, "metadata", "labels", DNS[0]) in DNS[1]]
        if not found:
            why = "no deployment is labelled k8s-app=kube-dns; it may run as something else"
            yield warn("dns", "not found", why, "see that pods resolve kubernetes.default.svc")
        elif not any(dig(d, "status", "availableReplicas", default=0) for d in found):
            why = "pods find Ray's head by a name of the cluster"
            yield fail("dns", f"{name_of(found[0])} is not available", why, "kubectl -n kube-system get pods")
        else:
            yield ok("dns", f"{name_of(found[0])} is available")


def quotas(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """Whether quotas leave room for the least that the release starts with."""
    if isinstance(facts.quotas, Unknown):
        yield not_seen("quota", facts.quotas)
        return
    if not facts.quotas:
        yield ok("quota", "none in this namespace")
        return
    wanted: dict[str, float] = {"pods": float(sum(g.minimum for g in needs.groups))}
    for group in needs.groups:
        for resource, amount in group.requests.items():
            for key in (resource, f"requests.{resource}"):
                wanted[key] = wanted.get(key, 0.0) + amount * group.minimum
    for quota in facts.quotas:
        short = []
        hard = dig(quota, "status", "hard", default=dig(quota, "spec", "hard", default={}))
        for resource, most in hard.items():
            room = quantity(most) - quantity(dig(quota, "status", "used", resource, default="0"))
            if wanted.get(resource, 0.0) > room:
                short.append(f"{resource}: {written(wanted[resource], resource)} of {written(room, resource)} left")
        what = f"quota {name_of(quota)}"
        if short:
            yield fail(
                what, "; ".join(short), "pods beyond it are refused", "raise the quota, or lower the groups' min"
            )
        else:
            yield ok(what, "leaves room")


def limits(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """Limits on single containers."""
    if isinstance(facts.limit_ranges, Unknown):
        yield not_seen("limit range", facts.limit_ranges)
        return
    for document in facts.limit_ranges:
        over = [
            f"{group.name} asks for {written(amount, resource)} {resource}, at most {most[resource]}"
            for limit in dig(document, "spec", "limits", default=[])
            if dig(limit, "type") in {"Container", "Pod"}
            for most in (dig(limit, "max", default={}),)
            for group in needs.groups
            for resource, amount in group.requests.items()
            if resource in most and amount > quantity(most[resource])
        ]
        what = f"limit range {name_of(document)}"
        if over:
            yield fail(what, "; ".join(over), "such pods are refused", "raise its max, or lower the groups' resources")
        else:
            yield ok(what, "every group fits")


def pod_security(facts: Facts, _: Needs) -> Iterator[Finding]:
    """The namespace's Pod Security level; the chart's pods keep to restricted."""
    found = facts.namespace_labels
    if isinstance(found, Unknown):
        yield not_seen("pod security", found)
    elif found is None:
        fix = f"kubectl create namespace {facts.namespace}, then label it {ENFORCE}=restricted"
        yield warn("pod security", "no such namespace yet", "its level cannot be seen", fix)
    elif found.get(ENFORCE) == "restricted":
        yield ok("pod security", "restricted")
    else:
        why = "the chart's pods keep to restricted; enforced, nothing else in the namespace can do more either"
        fix = f"kubectl label namespace {facts.namespace} {ENFORCE}=restricted"
        yield warn("pod security", found.get(ENFORCE) or "not enforced", why, fix)


def egress(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """What the release expects of ways out; nothing is sent."""
    if needs.hub_sources:
        why = "engines never go out: weights must be there before they start"
        fix = "set weights.prepare.enabled, or a path: source on a volume"
        yield fail("egress", f"no weights are prepared for {', '.join(needs.hub_sources)}", why, fix)
    # Without a host in front an image comes from wherever the nodes' container runtime looks first.
    hostless = sorted({i for i in needs.images if not {".", ":"} & set(i.split("/")[0]) or "/" not in i})
    if hostless:
        why = "no registry is named: nodes ask the one their container runtime is set up for"
        yield warn("images", ", ".join(hostless), why, "name your registry or mirror (values-airgap.yaml)")
    elif needs.known and needs.images:
        yield ok("images", f"from {', '.join(sorted({i.split('/')[0] for i in needs.images}))}")
    if isinstance(facts.network_policies, Unknown):
        yield not_seen("egress", facts.network_policies)
        return
    closed = [
        name_of(p)
        for p in facts.network_policies
        if "Egress" in dig(p, "spec", "policyTypes", default=[])
        and not dig(p, "spec", "podSelector")
        and dig(p, "metadata", "labels", "app.kubernetes.io/part-of") != "galerne"
    ]
    if closed and needs.egress_expected:
        why = f"{', '.join(closed)} closes the namespace, and the Job that fetches weights has to go out"
        yield warn(
            "egress", "closed by a policy of yours", why, "policies add up: networkPolicy.prepareEgress opens it"
        )
    elif not needs.hub_sources:
        expected = "the Job that fetches weights" if needs.egress_expected else "nothing"
        yield ok("egress", f"{expected} has to go out")


def ingress(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """The Ingress's class."""
    if needs.ingress_class is None:
        return
    if isinstance(facts.ingress_classes, Unknown):
        yield not_seen("ingress", facts.ingress_classes)
        return
    names = sorted(name_of(c) for c in facts.ingress_classes)
    if needs.ingress_class in names or (not needs.ingress_class and names):
        yield ok("ingress", needs.ingress_class or f"the default of {', '.join(names)}")
    else:
        there = ", ".join(names) or "none"
        why = "nothing would serve the Ingress"
        yield fail("ingress", f"no class {needs.ingress_class or 'at all'}", why, f"classes here: {there}")


def node_groups(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """GPUs, and nodes for every group."""
    if isinstance(facts.nodes, Unknown):
        yield not_seen("nodes", facts.nodes)
        return
    yield from gpus(facts.nodes, facts.daemon_sets, needs)
    yield from groups(facts.nodes, needs)


CHECKS: Final[tuple[Check, ...]] = (
    version,
    definitions,
    operator,
    node_groups,
    storage,
    dns,
    quotas,
    limits,
    pod_security,
    enforced,
    api_server,
    node_dns,
    egress,
    ingress,
)
