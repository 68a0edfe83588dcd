"""What differs from cluster to cluster: Cilium, DNS on every node, spot machines that do not come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helm.rendering import HELMS, VALUES, of_kind, rayservice, template
from tests.helm.test_policy import matches, selecting
from tests.helm.test_policy import pods as pods_of

CILIUM = "ci/04-tenants-file-values.yaml"


def test_cilium_opens_the_api_server_for_the_head_alone() -> None:
    (policy,) = of_kind(CILIUM, "CiliumNetworkPolicy")
    chosen = {
        pod.metadata["labels"]["app.kubernetes.io/component"]
        for pod in pods_of(CILIUM)
        if matches(policy["spec"]["endpointSelector"], pod.metadata["labels"])
    }
    assert chosen == {"head"}
    assert [rule["toEntities"] for rule in policy["spec"]["egress"]] == [["kube-apiserver"]]
    # No address is given, and a rule without peers would open everything.
    for thing in of_kind(CILIUM, "NetworkPolicy"):
        assert all(rule["to"] for rule in thing["spec"].get("egress", []))


def test_without_cilium_there_is_no_policy_of_its_kind() -> None:
    assert [values for values in VALUES if of_kind(values, "CiliumNetworkPolicy")] == [CILIUM]


@pytest.mark.parametrize("line", HELMS)
def test_no_way_to_the_api_server_is_refused(line: str) -> None:
    ran = template(line, CILIUM, "--set", "networkPolicy.cilium=false")
    assert ran.status != 0
    assert "networkPolicy.apiServer is empty" in ran.err


def test_dns_on_every_node_is_reached_by_whoever_resolves_names_on_its_port_alone() -> None:
    wanted = yaml.safe_load((Path(__file__).parents[2] / "helm" / "galerne" / CILIUM).read_text())
    addresses = set(wanted["networkPolicy"]["dns"]["cidrs"])
    resolving = set()
    for pod in pods_of(CILIUM):
        for spec in selecting(CILIUM, pod.metadata["labels"]):
            for rule in spec.get("egress", []):
                opened = {peer["ipBlock"]["cidr"] for peer in rule["to"] if "ipBlock" in peer}
                ports = {port["port"] for port in rule["ports"]}
                # Wherever cluster DNS is opened its addresses are, and nowhere else.
                assert (ports == {53}) == bool(opened & addresses), pod.where
                if ports == {53}:
                    assert opened == addresses
                    resolving.add(pod.metadata["labels"]["app.kubernetes.io/component"])
    assert resolving >= {"head", "gateway", "engine"}


@pytest.mark.parametrize("values", VALUES)
def test_a_pod_that_no_node_takes_is_given_up_in_minutes(values: str) -> None:
    cluster = rayservice(values)["spec"]["rayClusterConfig"]
    if not cluster["enableInTreeAutoscaling"]:
        return
    env = {entry["name"]: entry["value"] for entry in cluster["autoscalerOptions"]["env"]}
    # Ray itself says what it makes of them: it reads the variable when the module is imported.
    script = (
        "from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig as c; "
        "print(c().allocate_status_timeout_s)"
    )
    if values == VALUES[0]:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | env, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == 900
    assert env["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"] == "900"
