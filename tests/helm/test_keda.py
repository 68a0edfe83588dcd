"""Models that KEDA scales: it is given a Deployment and our own metrics, and Galerne follows the number it sets."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config_file import parse
from serving.metrics.rules import SIGNALS
from tests.helm.rendering import HELMS, NAMESPACE, RELEASE, VALUES, galerne_config, of_kind, pods, template

KEDA = "ci/05-keda-values.yaml"
RECORDS = {rule.field: rule.record for rule in SIGNALS}


def by_model() -> dict[str, str]:
    """Name of the Deployment that each model follows, as the rendered configuration says."""
    config = parse(yaml.safe_dump(galerne_config(KEDA)), "galerne.yaml")
    follows = {}
    for model in config.models:
        external = model.autoscaling and model.autoscaling.external
        if external:
            assert external.query == (
                f'kube_deployment_spec_replicas{{namespace="{NAMESPACE}",deployment="{external.query.split(chr(34))[3]}"}}'
            )
            assert external.sampled_query == f"timestamp({external.query})"
            follows[model.id] = external.query.split('"')[3]
    return follows


def test_each_model_follows_the_deployment_that_its_scaled_object_scales() -> None:
    follows = by_model()
    assert set(follows) == {"org/Chat-1.5", "vectors"}
    deployments = {thing["metadata"]["name"] for thing in of_kind(KEDA, "Deployment")}
    scaled = {thing["metadata"]["name"]: thing["spec"]["scaleTargetRef"] for thing in of_kind(KEDA, "ScaledObject")}
    assert set(follows.values()) == deployments == set(scaled)
    for name, target in scaled.items():
        assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    # Labels and what KEDA and Kubernetes append to names.
    assert all(len(name) <= 63 for name in deployments)


def test_what_else_the_model_says_of_autoscaling_stays() -> None:
    config = parse(yaml.safe_dump(galerne_config(KEDA)), "galerne.yaml")
    sections = {model.id: model.autoscaling for model in config.models}
    assert sections["vectors"] is not None
    assert sections["vectors"].start_s == 60
    assert sections["own-policy"] is not None
    assert sections["own-policy"].external is None


def test_it_is_told_our_metrics_and_the_models_bounds() -> None:
    follows = by_model()
    objects = {thing["metadata"]["name"]: thing["spec"] for thing in of_kind(KEDA, "ScaledObject")}
    chat, vectors = objects[follows["org/Chat-1.5"]], objects[follows["vectors"]]
    assert (chat["minReplicaCount"], chat["maxReplicaCount"], chat["pollingInterval"]) == (0, 6, 10)
    assert (vectors["minReplicaCount"], vectors["maxReplicaCount"], vectors["pollingInterval"]) == (1, 3, 15)
    running, waiting = (trigger["metadata"] for trigger in chat["triggers"])
    named = f'{{galerne_release="{NAMESPACE}/{RELEASE}",model="org/Chat-1.5"}}'
    assert running["query"] == f"sum({RECORDS['running']}{named})"
    assert waiting["query"] == f"sum({RECORDS['waiting']}{named}) + sum({RECORDS['held']}{named})"
    assert (running["threshold"], waiting["threshold"]) == ("16", "2.5")
    assert [t["metadata"]["threshold"] for t in vectors["triggers"]] == ["16", "4"]
    for spec in objects.values():
        for trigger in spec["triggers"]:
            assert trigger["metadata"]["serverAddress"] == "http://prometheus-operated.monitoring.svc:9090"
            # What is not known is no 0, which would take replicas away.
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            assert "activationThreshold" not in trigger["metadata"]


def test_an_upgrade_leaves_the_number_to_keda() -> None:
    for thing in of_kind(KEDA, "Deployment"):
        assert "replicas" not in thing["spec"]
        selected = thing["spec"]["selector"]["matchLabels"]
        others = [p for p in pods(KEDA) if selected.items() <= p.metadata["labels"].items()]
        assert len(others) == 1


def test_the_pod_that_does_nothing_ends_when_told(tmp_path: Path) -> None:
    (command, _) = [p.containers[0]["command"] for p in pods(KEDA) if p.where.startswith("Deployment")]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        # Until it has a child, its trap may not be set.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until_s = time.monotonic() + 30
        while not children.read_text().strip():
            assert time.monotonic() < until_s
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        # The group: what it slept in outlives it here, where no container ends with it.
        subprocess.run(["kill", "--", f"-{process.pid}"], check=False, stderr=subprocess.DEVNULL)


def test_nothing_of_it_is_there_by_default() -> None:
    for values in VALUES:
        if values != KEDA:
            kinds = {thing["kind"] for thing in of_kind(values, "Deployment") + of_kind(values, "ScaledObject")}
            assert kinds == set()


CHAT = {"id": "org/Chat-1.5", "source": "fake:chat", "replicas": {"max": 2}}
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"keda": {"models": {"other": {}}}}, 'keda.models names "other", and config.models has no such model'),
    ({"keda": {"models": {"vectors": {"running": 3}}}}, "running"),
    ({"keda": {"models": {"vectors": {"runningPerReplica": 0}}}}, "runningPerReplica"),
    ({"config": {"prometheus": None}}, "keda.models needs config.prometheus"),
    ({"config": {"prometheus": {"url": "http://prometheus:9090"}}}, "http://prometheus.NAMESPACE.svc:PORT"),
    (
        {"config": {"models": [CHAT, {"id": "vectors", "source": "fake:v"}]}},
        'keda.models names "vectors": set its replicas.max',
    ),
    (
        {"config": {"models": [CHAT, CHAT | {"id": "vectors", "autoscaling": {"external": {"query": "a"}}}]}},
        "names another number to follow",
    ),
    ({"tenants": {"existingSecret": "mine"}}, "make a ScaledObject of your own"),
)


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_wrong_is_refused(line: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    ran = template(line, KEDA, "--values", str(tmp_path / "values.yaml"))
    assert ran.status != 0
    assert message in ran.err
