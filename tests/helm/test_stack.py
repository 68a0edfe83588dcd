"""The stack's chart: pinned parts that can be left out, each told where the others are, and open to no more than they need."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config_file import parse
from tests.helm.custom_kinds import DESCRIBED
from tests.helm.rendering import HELMS, NAMESPACE, RELEASE, helm
from tests.helm.stack import STACK, aliases, built, pinned, render, repository
from tests.helm.test_docs import pins
from tests.helm.test_objects import core_validator
from tests.helm.test_policy import matches

WHOLE, OWN = "01-whole-values.yaml", "02-own-parts-values.yaml"
PARTS = ("kuberay-operator", "kube-prometheus-stack", "valkey", "postgres")
Thing = dict[str, Any]
CHART = f"galerne-stack-{yaml.safe_load((STACK / 'Chart.yaml').read_text())['version']}"
# What the sub-charts at these versions, and the operators that they bring, put on their pods.
POD_LABELS = {
    "kuberay-operator": {"app.kubernetes.io/name": "kuberay-operator"},
    "prometheus-operator": {"app.kubernetes.io/name": "kube-prometheus-stack-prometheus-operator"},
    "grafana": {"app.kubernetes.io/name": "grafana"},
    "valkey": {"app.kubernetes.io/name": "valkey"},
    "postgres": {"app.kubernetes.io/name": "postgres"},
}
OPERATED_POD_LABELS = {
    "prometheus": {"operator.prometheus.io/name": "galerne-metrics-prometheus"},
    "alertmanager": {"alertmanager": "galerne-metrics-alertmanager"},
}


@pytest.fixture(scope="module", params=HELMS)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A helm line, and the stack whose dependencies it has built."""
    line: str = request.param
    directory = tmp_path_factory.mktemp(line)
    with repository(directory) as url:
        yield line, built(line, directory, url)


@cache
def objects(stack: tuple[str, Path], values: str, *args: str) -> list[Thing]:
    """Every object of a rendering."""
    line, chart = stack
    ran = render(line, chart, values, *args)
    assert ran.status == 0, ran.err
    return [thing for thing in yaml.safe_load_all(ran.out) if thing]


def told(things: list[Thing]) -> dict[str, Thing]:
    """What each sub-chart that is there was told."""
    return {
        thing["metadata"]["name"].removeprefix("told-"): yaml.safe_load(thing["data"]["values"])
        for thing in things
        if thing["metadata"]["name"].startswith("told-")
    }


def of_kind(things: list[Thing], kind: str) -> dict[str, Thing]:
    return {thing["metadata"]["name"]: thing for thing in things if thing["kind"] == kind}


def test_every_version_is_exact_and_the_one_that_the_guides_install() -> None:
    parts = pinned()
    assert set(parts) == {"galerne", *PARTS}
    for name in PARTS:
        assert re.fullmatch(r"\d+\.\d+\.\d+", parts[name]["version"]), name
        assert parts[name]["version"] == pins()[name]["version"]
        assert parts[name]["condition"] == f"{name}.enabled"
    own = yaml.safe_load((STACK.parent / "galerne" / "Chart.yaml").read_text())
    mine = yaml.safe_load((STACK / "Chart.yaml").read_text())
    assert parts["galerne"] == {"name": "galerne", "version": own["version"], "repository": "file://../galerne"}
    assert (mine["version"], mine["appVersion"]) == (own["version"], own["appVersion"])
    # The chart itself, which crosses air gaps, has none.
    assert "dependencies" not in own
    # An address would be somebody's registry, which not every cluster reaches.
    assert {part["repository"] for name, part in parts.items() if name != "galerne"} == {f"@{a}" for a in aliases()}


@pytest.mark.parametrize("values", [WHOLE, OWN])
def test_lint(stack: tuple[str, Path], values: str) -> None:
    line, chart = stack
    ran = helm(line, "lint", "--strict", str(chart), "--values", str(chart / "ci" / values))
    assert ran.status == 0, ran.out + ran.err
    assert "[WARNING]" not in ran.out


def test_every_values_file_is_rendered_here() -> None:
    assert {path.name for path in (STACK / "ci").iterdir()} == {WHOLE, OWN}


def test_core_objects(stack: tuple[str, Path]) -> None:
    things = [t for t in objects(stack, WHOLE) if (t["metadata"].get("labels") or {}).get("helm.sh/chart") == CHART]
    kinds = {thing["kind"] for thing in things}
    assert kinds == {"NetworkPolicy", "Secret", "Role"}
    for thing in things:
        core_validator("1.36", thing["apiVersion"], thing["kind"]).validate(thing)
        assert "namespace" not in thing["metadata"]


def test_each_part_is_told_where_the_others_are(stack: tuple[str, Path]) -> None:
    things = objects(stack, WHOLE)
    parts, secrets = told(things), of_kind(things, "Secret")
    assert set(parts) == set(PARTS)
    config = parse(secrets[f"{RELEASE}-galerne-config"]["stringData"]["galerne.yaml"], "galerne.yaml")

    # Quotas: the Service of the sub-chart's name, the password that both sides read.
    valkey = parts["valkey"]
    assert config.limits_store == f"redis://{valkey['fullnameOverride']}:6379/0"
    gateway = gateway_variables(things)
    limits = gateway["GALERNE_LIMITS_STORE_PASSWORD"]["secretKeyRef"]
    assert valkey["auth"]["enabled"]
    assert valkey["auth"]["usersExistingSecret"] == limits["name"]
    assert set(valkey["auth"]["aclUsers"]) == {limits["key"]} <= secrets[limits["name"]]["data"].keys()

    # The ledger: the same user, password and database as the sub-chart makes.
    postgres, url = parts["postgres"], gateway["GALERNE_LEDGER_URL"]["secretKeyRef"]
    data = {key: b64decode(value).decode() for key, value in secrets[url["name"]]["data"].items()}
    made = postgres["userDatabase"]
    assert postgres["settings"]["existingSecret"] == made["existingSecret"] == url["name"]
    user, password, database = (data[made[part]["secretKey"]] for part in ("user", "password", "name"))
    assert data[url["key"]] == f"postgresql://{user}:{password}@{postgres['fullnameOverride']}:5432/{database}"
    assert data[postgres["settings"]["superuserPassword"]["secretKey"]] not in {"", password}

    # Signals and scrapes.
    monitoring = parts["kube-prometheus-stack"]
    assert config.prometheus is not None
    assert config.prometheus.url == f"http://{monitoring['fullnameOverride']}-prometheus:9090"
    spec = monitoring["prometheus"]["prometheusSpec"]
    for kind, selector in (
        ("PodMonitor", "podMonitorSelector"),
        ("ScrapeConfig", "scrapeConfigSelector"),
        ("PrometheusRule", "ruleSelector"),
    ):
        for thing in of_kind(things, kind).values():
            assert matches(spec[selector], thing["metadata"]["labels"]), kind
    sidecar = monitoring["grafana"]["sidecar"]["dashboards"]
    boards = [
        t for t in of_kind(things, "ConfigMap").values() if "grafana_dashboard" in t["metadata"].get("labels", {})
    ]
    assert len(boards) == 5
    assert sidecar == {"resource": "configmap", "searchNamespace": "{{ .Release.Namespace }}"}
    role = of_kind(things, "Role")[monitoring["grafana"]["rbac"]["useExistingRole"]]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]}]


def gateway_variables(things: list[Thing]) -> dict[str, Thing]:
    """Variables of gateways' pods that come from Secrets."""
    (service,) = of_kind(things, "RayService").values()
    (group,) = [g for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "gateway"]
    env = group["template"]["spec"]["containers"][0]["env"]
    return {entry["name"]: entry["valueFrom"] for entry in env if "valueFrom" in entry}


def pods(things: list[Thing]) -> dict[str, dict[str, str]]:
    """Labels of every pod there will be, by name of the part."""
    (service,) = of_kind(things, "RayService").values()
    cluster = service["spec"]["rayClusterConfig"]
    ours = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    found = {
        labels["app.kubernetes.io/component"]: labels
        for labels in (group["template"]["metadata"]["labels"] for group in ours)
    }
    instance = {"app.kubernetes.io/instance": RELEASE}
    return found | {n: labels | instance for n, labels in POD_LABELS.items()} | OPERATED_POD_LABELS


# (who, to whom, port) of every way that is open between two pods, but for Galerne's own among themselves (test_policy).
WAYS = {
    ("kuberay-operator", "head", 8265),
    ("kuberay-operator", "head", 8000),
    ("gateway", "valkey", 6379),
    ("gateway", "postgres", 5432),
    ("head", "prometheus", 9090),
    ("gateway", "prometheus", 9090),
    ("prometheus", "head", 9390),
    ("prometheus", "gateway", 9400),
    ("prometheus", "gateway", 9101),
    ("prometheus", "engine", 32768),
    ("prometheus", "alertmanager", 9093),
    ("prometheus", "alertmanager", 8080),
    ("prometheus", "prometheus-operator", 8080),
    ("prometheus", "grafana", 3000),
    ("grafana", "prometheus", 9090),
    ("grafana", "alertmanager", 9093),
}
PORTS = (3000, 5432, 6379, 8000, 8080, 8265, 9090, 9093, 9101, 9390, 9400, 32768)


def test_who_may_reach_whom(stack: tuple[str, Path]) -> None:
    things = objects(stack, WHOLE)
    policies = [p["spec"] for p in of_kind(things, "NetworkPolicy").values() if p["spec"]["podSelector"]]
    there = pods(things)
    own = {"head", "gateway", "engine"}
    for name, labels in there.items():
        assert any(matches(spec["podSelector"], labels) for spec in policies), name
    found = {
        (who, whom, port)
        for who, source in there.items()
        for whom, target in there.items()
        for port in PORTS
        if not {who, whom} <= own
        and opens(policies, source, "egress", "to", target, port)
        and opens(policies, target, "ingress", "from", source, port)
    }
    assert found == WAYS


def opens(
    policies: list[Thing], pod: dict[str, str], direction: str, peers: str, other: dict[str, str], port: int
) -> bool:
    """Whether a pod's side of a connection is open, both being in the release's namespace."""
    here = {"kubernetes.io/metadata.name": NAMESPACE}
    return any(
        matches(peer.get("namespaceSelector", {}), here) and matches(peer["podSelector"], other)
        for spec in policies
        if matches(spec["podSelector"], pod)
        for rule in spec.get(direction, [])
        if any(p["port"] <= port <= p.get("endPort", p["port"]) and p["protocol"] == "TCP" for p in rule["ports"])
        for peer in rule[peers]
        if "podSelector" in peer
    )


def test_the_ways_out_are_the_api_server_dns_and_what_is_said(stack: tuple[str, Path]) -> None:
    outside: dict[str, set[str]] = {}
    for name, policy in of_kind(objects(stack, WHOLE), "NetworkPolicy").items():
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    outside.setdefault(name, set()).add(peer["ipBlock"]["cidr"])
    api = {"10.0.0.10/32"}
    assert outside == {
        "trial-galerne-head": api,
        "trial-kuberay-operator": api,
        "trial-prometheus-operator": api,
        "trial-prometheus": api,
        "trial-grafana": api,
        "trial-alertmanager": {"10.9.0.25/32"},
    }


def test_no_part_is_there_where_all_are_left_out(stack: tuple[str, Path]) -> None:
    things = objects(stack, OWN)
    assert told(things) == {}
    assert not [t for t in things if (t["metadata"].get("labels") or {}).get("helm.sh/chart") == CHART]
    gateway = gateway_variables(things)
    assert gateway["GALERNE_LEDGER_URL"]["secretKeyRef"] == {"name": "ledger-app", "key": "uri"}
    # Nothing of the namespace itself is let in.
    text = yaml.safe_dump(of_kind(things, "NetworkPolicy"))
    assert "kuberay-system" in text
    assert "valkey" not in text


ALONE = {
    "kuberay-operator": "galerne.networkPolicy.operatorNamespace=kuberay-system",
    "kube-prometheus-stack": "galerne.config.prometheus.url=http://prometheus.monitoring.svc:9090",
    "valkey": "galerne.config.limits_store=redis://redis.platform.svc:6379/0",
    "postgres": "galerne.ledger.existingSecret=ledger-app",
}


@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_left_out(stack: tuple[str, Path], part: str) -> None:
    line, chart = stack
    off = ("--set", f"{part}.enabled=false")
    refused = render(line, chart, WHOLE, *off)
    assert refused.status != 0
    assert f"{part}.enabled is false" in refused.err
    # With what the message asks for.
    there = told(objects(stack, WHOLE, *off, "--set", ALONE[part]))
    assert set(there) == set(PARTS) - {part}


REFUSED = (
    ("valkey.fullnameOverride=other", 'set it to "redis://other:6379/0"'),
    ("galerne.ledger.existingSecret=other", 'galerne.ledger.existingSecret is "other"'),
    ("kube-prometheus-stack.fullnameOverride=other", 'set it to "http://other-prometheus:9090"'),
    ("galerne.imagee=x", "imagee"),
    ("secret.create=false", "secret"),
    ("valkey.enabled=maybe", "enabled"),
    ("galerne.networkPolicy.gatewayEgress=null", "networkPolicy.gatewayEgress"),
)


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_what_does_not_meet_is_refused(stack: tuple[str, Path], value: str, message: str) -> None:
    line, chart = stack
    ran = render(line, chart, WHOLE, "--set", value)
    assert ran.status != 0
    assert message in ran.err


def test_secrets_of_ones_own(stack: tuple[str, Path]) -> None:
    made = (
        of_kind(objects(stack, WHOLE), "Secret").keys()
        - of_kind(objects(stack, WHOLE, "--set", "secrets.create=false"), "Secret").keys()
    )
    assert made == {"galerne-limits", "galerne-ledger"}


def test_with_cilium_whoever_asks_the_api_server_reaches_it(stack: tuple[str, Path]) -> None:
    things = objects(stack, WHOLE, "--set", "galerne.networkPolicy.cilium=true,galerne.networkPolicy.apiServer=null")
    policies = of_kind(things, "CiliumNetworkPolicy")
    for policy in policies.values():
        DESCRIBED["CiliumNetworkPolicy"].model_validate(policy)
    # Those that the addresses opened it for before.
    asking = {
        name
        for name, policy in of_kind(objects(stack, WHOLE), "NetworkPolicy").items()
        if any(
            peer.get("ipBlock", {}).get("cidr") == "10.0.0.10/32"
            for rule in policy["spec"].get("egress", [])
            for peer in rule["to"]
        )
    }
    assert len(policies) == len(asking) == 5
    selectors = [policy["spec"]["endpointSelector"]["matchLabels"] for policy in policies.values()]
    for name in asking:
        assert of_kind(things, "NetworkPolicy")[name]["spec"]["podSelector"]["matchLabels"] in selectors
    for policy in of_kind(things, "NetworkPolicy").values():
        assert all(rule["to"] for rule in policy["spec"].get("egress", []))
