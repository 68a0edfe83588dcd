"""The tests' API server is one to a client that is not ours: kubectl, where `make helm` or the system has it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.kubernetes.conftest import NAMESPACE, write_kubeconfig
from tests.unit.kubernetes.release import populate
from tests.unit.kubernetes.server import ApiServer
from tests.unit.kubernetes.shared import ROOT


def test_kubectl_gets_cordons_and_evicts(tmp_path: Path) -> None:
    own = ROOT / ".tools" / "helm" / "kubectl"
    kubectl = str(own) if own.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed (make helm)")
    with ApiServer() as server:  # without a token: kubectl sends none over plain HTTP
        populate(server)
        kubeconfig = write_kubeconfig(tmp_path / "k", server.url)
        server.on_eviction = lambda pod: server.delete("", "pods", NAMESPACE, pod["metadata"]["name"])

        def run(*arguments: str) -> str:
            command = [kubectl, "--kubeconfig", str(kubeconfig), "--cache-dir", str(tmp_path / "cache"), *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

        assert "c-1-gw-1" in run("get", "pods", "-n", NAMESPACE)
        assert "galerne" in run("get", "rayservices.ray.io", "-n", NAMESPACE)
        assert "node-2 cordoned" in run("cordon", "node-2")
        assert server.find("", "nodes", "", "node-2")["spec"]["unschedulable"] is True
        run("drain", "node-2", "--force", "--timeout=20s")
        assert not [name for _, name in server.objects["", "pods"] if name in {"c-1-h100-2", "c-1-gw-2"}]
