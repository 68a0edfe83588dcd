"""Least privilege: every command runs on its own rules, asks for nothing else, and needs each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from serving.cluster.kubernetes.permissions import COMMANDS, Rule, roles
from serving.metrics.release import matcher, scoped
from tests.unit.kubernetes import kuberay
from tests.unit.kubernetes.conftest import NAMESPACE
from tests.unit.kubernetes.kuberay import NAME
from tests.unit.kubernetes.release import PROMETHEUS, VALUES, Run, being_removed, populate
from tests.unit.kubernetes.server import ApiServer, Document, Seen

MONITORING = PROMETHEUS.removeprefix("service:").partition("/")[0]

CONFIG = """\
listen: {host: 0.0.0.0}
models: [{id: m-v1.5, source: "fake:m"}]
tenants: [{id: press, keys: [{id: k, sha256: "%s"}]}]
""" % ("0" * 64)


def grants(documents: list[Document]) -> set[tuple[str, str, str, str | None]]:
    """What a server gathers from rendered roles."""
    return {
        (group, resource, verb, document["metadata"].get("namespace"))
        for document in documents
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.fixture
def runs(
    server: ApiServer, kubeconfig: Path, tmp_path: Path, galerne: Run, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Callable[[], str]]:
    """By command: everything it can do, once; gives what it printed."""
    populate(server)
    monkeypatch.setattr("serving.cli.cluster_rollout.LEAST_S", 0.0)
    server.on_eviction = lambda p: server.delete("", "pods", NAMESPACE, p["metadata"]["name"])
    values, config = tmp_path / "values.yaml", tmp_path / "galerne.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    config.write_text(CONFIG)
    common = ("--kubeconfig", str(kubeconfig))

    def run(*arguments: str) -> str:
        code, out, err = galerne(*arguments, *common)
        return f"{code} {out}{err}"

    def rollout() -> str:
        # The figures are read once traffic moves; KubeRay says that it does, and then that it failed.
        def operate(seen: Seen) -> None:
            if seen.resource == "rayservices":
                server.change("ray.io", "rayservices", NAMESPACE, NAME, advance)

        def advance(document: Document) -> None:
            status = document["status"]
            state = json.loads(document["metadata"]["annotations"].get("galerne/rollout", "null"))
            if state is None:
                return
            if state["phase"] == "rolling-back":
                status["pendingServiceStatus"] = {}
                return
            shifting = state["phase"] == "shifting"
            status["pendingServiceStatus"] = {
                "rayClusterName": "c-2",
                "targetCapacity": 20,
                "trafficRoutedPercent": 20 if shifting else 0,
                "applicationStatuses": {"galerne": {"status": "DEPLOY_FAILED" if shifting else "RUNNING"}},
            }

        server.on_write = operate
        server.put("ray.io", "rayservices", kuberay.service())
        server.put("", "pods", kuberay.pod("c-2-gw", "c-2", "gateway", "10.0.2.1"))
        out = run("rollout", "--config", str(config), "--yes", "--prometheus", PROMETHEUS)
        server.on_write = lambda _: None
        return out

    def drain() -> str:
        told = (
            run("drain", "--node", "node-1")
            + run("drain", "--group", "h100")
            + run("drain", "--group", "h100", "--undo")
        )
        populate(server)
        return told

    def free() -> str:
        being_removed(server)
        return run("free", "--yes")

    return {
        "preflight": lambda: run("preflight", "--values", str(values)),
        "status": lambda: run("status", "--prometheus", PROMETHEUS),
        "rollout": rollout,
        "drain": drain,
        "free": free,
        "support-bundle": lambda: run(
            "support-bundle", "--out", str(tmp_path / "b.tar.gz"), "--prometheus", PROMETHEUS
        ),
    }


def complains(told: str) -> bool:
    return "It would take" in told or "may not " in told or "Forbidden" in told or "is forbidden" in told


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_runs_on_its_own_rules_and_asks_for_nothing_else(
    server: ApiServer, runs: dict[str, Callable[[], str]], command: str
) -> None:
    allowed = grants(roles([command], "r", NAMESPACE, MONITORING))
    server.allow(allowed)
    told = runs[command]()
    assert not complains(told), told
    refused = [s for s in server.seen if s.resource and not server.permits(s)]
    assert refused == []


@pytest.mark.parametrize(
    ("command", "rule", "verb"),
    [
        pytest.param(command, rule, verb, id=f"{command}-{verb}-{rule.resource.replace('/', '-')}")
        for command, rules in COMMANDS.items()
        for rule in rules
        for verb in rule.verbs
        if (command, rule.resource, verb) != ("status", "rayservices", "watch")  # `--watch`: below
    ],
)
def test_each_rule_is_needed(
    server: ApiServer, runs: dict[str, Callable[[], str]], command: str, rule: Rule, verb: str
) -> None:
    scope = {"namespace": NAMESPACE, "monitoring": MONITORING, "cluster": None}[rule.scope]
    granted = grants(roles([command], "r", NAMESPACE, MONITORING))
    assert (rule.group, rule.resource, verb, scope) in granted
    server.allow(granted - {(rule.group, rule.resource, verb, scope)})
    told = runs[command]()
    assert [s for s in server.seen if s.resource and not server.permits(s)], "it never asked"
    assert complains(told), told


def test_following_needs_to_watch(server: ApiServer, kubeconfig: Path, galerne: Run) -> None:
    populate(server)
    granted = grants(roles(["status"], "r", NAMESPACE, MONITORING))
    server.allow(granted - {("ray.io", "rayservices", "watch", NAMESPACE)})
    code, _, err = galerne("status", "--watch", "--kubeconfig", str(kubeconfig))
    assert code == 1
    assert 'resources: ["rayservices"], verbs: ["watch"]' in err


@pytest.mark.parametrize("command", ["status", "rollout", "support-bundle"])
def test_prometheus_is_asked_of_this_release_alone(
    server: ApiServer, runs: dict[str, Callable[[], str]], command: str
) -> None:
    runs[command]()
    asked = {seen.query["query"] for seen in server.seen if seen.resource == "services/proxy"} - {"vector(1)"}
    assert asked
    for query in asked:
        assert scoped(query, matcher(kuberay.RELEASE)) == query
        assert matcher(kuberay.RELEASE) in query


def test_there_is_no_wildcard_and_no_reading_of_secrets() -> None:
    for command in COMMANDS:
        for document in roles([command], "r", NAMESPACE, MONITORING):
            for rule in document["rules"]:
                # Through the API server's proxy whoever may do so reaches every Service there is.
                if "services/proxy" in rule["resources"]:
                    assert document["kind"] == "Role"
                    assert document["metadata"]["namespace"] == MONITORING
                assert "*" not in json.dumps(rule)
                if "secrets" in rule["resources"]:
                    assert rule["verbs"] == ["create"]


def test_the_command_prints_them(galerne: Run) -> None:
    code, out, _ = galerne("permissions", "status", "--namespace", "prod", "--monitoring-namespace", "watch")
    assert code == 0
    documents = list(yaml.safe_load_all(out))
    assert [(d["kind"], d["metadata"].get("namespace")) for d in documents] == [("Role", "prod"), ("Role", "watch")]
    assert grants(documents) == grants(roles(["status"], "r", "prod", "watch"))
    # One namespace for both has one Role: two of a name would be one, the later of them.
    documents = list(yaml.safe_load_all(galerne("permissions", "-n", "prod", "--monitoring-namespace", "prod")[1]))
    assert [(d["kind"], d["metadata"].get("namespace")) for d in documents] == [("ClusterRole", None), ("Role", "prod")]
    assert galerne("permissions", "destroy")[0] == 2


def test_nothing_that_serves_imports_the_client() -> None:
    import subprocess
    import sys

    script = "import serving.cli, serving.api.app, sys; assert 'kubernetes' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
