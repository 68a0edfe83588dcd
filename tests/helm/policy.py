"""Rules that every rendered object keeps, as a table: `findings` names each object that breaks one.

They are what Pod Security "restricted" asks for, what scanners of manifests look for, and what THREATS asks of a chart
(10, 12, 17). An exception stands in EXCEPTIONS with its reason; there is none without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.helm.rendering import Pod, objects, pods

Thing = dict[str, Any]
MOVING_TAGS = {"latest", "main", "master", "dev", "edge", "nightly", "stable"}
VOLUMES_OF_RESTRICTED = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Of Ray: control store, dashboard, client, raylets, workers, agents. No Service of the chart leads to one.
RAY_PORTS = {6379, 6380, 6381, 6382, 6383, 8265, 10001, 52365, *range(10002, 20000)}
# (rule, object): why it may.
EXCEPTIONS = {
    (
        "probes",
        "Deployment trial-galerne-keda-org-chat-1-5-4dd2c4",
    ): "it does nothing, and nothing is to be found of it",
    ("probes", "Deployment trial-galerne-keda-vectors-29a6a5"): "as above",
    (
        "service-links",
        "Pod trial-galerne-verify",
    ): "it has no DNS, so that it can show that names do not resolve, and finds the gateways by their Service's variable",
    ("ray-ports", "Service trial-galerne-redis"): "6379 is Redis' own port, too; its selector takes Redis' pod alone",
}


def _security(container: Thing) -> Thing:
    found: Thing = container.get("securityContext", {})
    return found


def _mentions(container: Thing, kind: str) -> set[str]:
    return set(container.get("resources", {}).get(kind, {}))


# One rule a line: what it is called, and what is wrong with a pod or a container of it.
POD_RULES: dict[str, Callable[[Pod], bool]] = {
    "host-namespaces": lambda pod: any(pod.spec.get(k) for k in ("hostNetwork", "hostPID", "hostIPC")),
    "run-as-root": lambda pod: (
        pod.spec.get("securityContext", {}).get("runAsNonRoot") is not True
        or pod.spec["securityContext"].get("runAsUser", 0) < 1000
    ),
    "pod-seccomp": lambda pod: pod.spec["securityContext"].get("seccompProfile", {}).get("type") != "RuntimeDefault",
    "volume-types": lambda pod: any(
        not (v.keys() - {"name"}) <= VOLUMES_OF_RESTRICTED for v in pod.spec.get("volumes", [])
    ),
    "host-path": lambda pod: any("hostPath" in v for v in pod.spec.get("volumes", [])),
    "token-mounted": lambda pod: pod.spec.get("automountServiceAccountToken") is not False,
    "service-links": lambda pod: pod.spec.get("enableServiceLinks") is not False,
    "unlimited-scratch": lambda pod: any(
        "sizeLimit" not in (v["emptyDir"] or {}) for v in pod.spec.get("volumes", []) if "emptyDir" in v
    ),
    "sysctls": lambda pod: "sysctls" in pod.spec.get("securityContext", {}),
}
CONTAINER_RULES: dict[str, Callable[[Thing], bool]] = {
    "privileged": lambda c: _security(c).get("privileged") is not False,
    "escalation": lambda c: _security(c).get("allowPrivilegeEscalation") is not False,
    "root-file-system": lambda c: _security(c).get("readOnlyRootFilesystem") is not True,
    "capabilities": lambda c: _security(c).get("capabilities") != {"drop": ["ALL"]},
    "seccomp": lambda c: _security(c).get("seccompProfile", {}).get("type") != "RuntimeDefault",
    "non-root": lambda c: _security(c).get("runAsNonRoot") is not True,
    "host-port": lambda c: any("hostPort" in port for port in c.get("ports", [])),
    "moving-tag": lambda c: _moves(c["image"]),
    "requests": lambda c: not {"cpu", "memory"} <= _mentions(c, "requests"),
    "limits": lambda c: not {"cpu", "memory"} <= _mentions(c, "limits"),
    "secret-in-plain": lambda c: any(
        re.search("token|password|secret|key", e["name"], re.I) and e.get("value") for e in c.get("env", [])
    ),
}


def _moves(image: str) -> bool:
    _, colon, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    return not colon or tag in MOVING_TAGS


def _role_with_wildcard(thing: Thing) -> bool:
    return any(
        "*" in rule.get(part, []) for rule in thing.get("rules", []) for part in ("apiGroups", "resources", "verbs")
    )


THING_RULES: dict[str, Callable[[Thing], bool]] = {
    "wildcard-rbac": lambda t: t["kind"] in {"Role", "ClusterRole"} and _role_with_wildcard(t),
    "cluster-rbac": lambda t: t["kind"] in {"ClusterRole", "ClusterRoleBinding"},
    "default-account": lambda t: t["kind"] == "ServiceAccount" and t.get("automountServiceAccountToken") is not False,
    "ray-ports": lambda t: t["kind"] == "Service" and any(p["port"] in RAY_PORTS for p in t["spec"]["ports"]),
    "named-ray-ports": lambda t: (
        t["kind"] == "Service" and any(p.get("targetPort") in {"dashboard", "gcs-server"} for p in t["spec"]["ports"])
    ),
    "namespace-set": lambda t: "namespace" in t["metadata"],
    "unlabelled": lambda t: "app.kubernetes.io/name" not in t["metadata"].get("labels", {}),
    "probes": lambda t: (
        t["kind"] in {"StatefulSet", "Deployment"}
        and any(
            "livenessProbe" not in c or "readinessProbe" not in c for c in t["spec"]["template"]["spec"]["containers"]
        )
    ),
    "ingress-without-tls": lambda t: t["kind"] == "Ingress" and not t["spec"].get("tls"),
    "open-policy": lambda t: (
        t["kind"] == "NetworkPolicy"
        and any(
            not rule.get("from", rule.get("to")) or not rule.get("ports")
            for rule in (*t["spec"].get("ingress", []), *t["spec"].get("egress", []))
        )
    ),
}


def findings(values: str, line: str = "helm4") -> set[tuple[str, str]]:
    """(rule, object) for each rule that an object of a values file breaks, exceptions included."""
    return set(_all(values, line))


def _all(values: str, line: str) -> Iterator[tuple[str, str]]:
    for thing in objects(line, values):
        where = f"{thing['kind']} {thing['metadata']['name']}"
        yield from ((rule, where) for rule, broken in THING_RULES.items() if broken(thing))
    for pod in pods(values, line):
        yield from ((rule, pod.where) for rule, broken in POD_RULES.items() if broken(pod))
        for container in pod.containers:
            where = f"{pod.where} :: {container['name']}"
            yield from ((rule, where) for rule, broken in CONTAINER_RULES.items() if broken(container))
