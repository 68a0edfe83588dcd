"""checkov finds nothing in what the chart renders, with every values file, but what EXCEPTIONS says the reason of.

It knows nothing of a RayService, so the pods of one are put before it as pods. What it looks for and `policy` does not, and the
other way round, is why there are both.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.rendering import NAMESPACE, ROOT, VALUES, objects, pods

CHECKOV = ROOT / ".tools" / "checkov" / "bin" / "checkov"
PINNED_BY_DIGEST = {"values-airgap.yaml"}
# (check, resource as a pattern): why it may.
EXCEPTIONS = {
    (
        "CKV_K8S_15",
        r".*",
    ): "a tag never moves (the chart refuses those that do), so an image on the node is the same one; and a node "
    "has to start pods while its registry is away. image.pullPolicy: Always where a policy of the cluster asks for it",
    (
        "CKV_K8S_35",
        r"Pod\..*|Job\..*-(loadtest-\d+|prepare)",
    ): "Ray reads its token, a load scenario its keys and the hub's client its token from variables alone; "
    "nothing of them is printed, and no other process of the pod's user is there to look",
    (
        "CKV_K8S_43",
        r".*",
    ): "a digest is the registry's that the image was pushed to: image.digest and redis.digest, which "
    "values-airgap.yaml sets",
    ("CKV_K8S_8", r"Deployment\..*-keda-.*"): "it does nothing, and nothing is to be found of it",
    ("CKV_K8S_9", r"Deployment\..*-keda-.*"): "as above",
    ("CKV_K8S_8", r"Pod\..*-verify"): "it runs once, to its end: it is a probe itself",
    ("CKV_K8S_9", r"Pod\..*-verify"): "nothing is sent to it",
}


def scanned(directory: Path) -> dict[str, Any]:
    """What checkov says of the manifests below a directory; skips where it is not installed, fails in CI."""
    if not CHECKOV.exists():
        reason = f"{CHECKOV.relative_to(ROOT)} is not installed: `make checkov` does it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Nothing is fetched and nobody is told.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "CKV_VALIDATE_SECRETS": "false"}
    command = [
        CHECKOV,
        "--directory",
        directory,
        "--framework",
        "kubernetes",
        "--skip-download",
        "--compact",
        "--output",
        "json",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in {0, 1}, done.stderr  # 1: it has found something
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def written(directory: Path, values: str) -> int:
    """The manifests of a values file as an API server would have them; how many pods of a RayService are among them."""
    # Rendered charts name no namespace: whoever installs does.
    things = [thing | {"metadata": thing["metadata"] | {"namespace": NAMESPACE}} for thing in objects("helm4", values)]
    of_ray = [pod for pod in pods(values) if pod.where.startswith("RayService")]
    for pod in of_ray:
        metadata = pod.metadata | {"name": pod.where.split()[-1], "namespace": NAMESPACE}
        things.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec})
    (directory / values.replace("/", "-")).write_text(yaml.safe_dump_all(things))
    return len(of_ray)


def test_checkov_finds_nothing_that_has_no_reason(tmp_path: Path) -> None:
    ray_pods = sum(written(tmp_path, values) for values in VALUES)
    said = scanned(tmp_path)
    assert said["summary"]["parsing_errors"] == 0
    seen = said["results"]["passed_checks"] + said["results"]["failed_checks"]
    # Every pod was looked at.
    assert len({(c["file_path"], c["resource"]) for c in seen if c["resource"].startswith("Pod.")}) >= ray_pods
    unexplained, used = [], set()
    for check in said["results"]["failed_checks"]:
        resource = check["resource"].replace(f".{NAMESPACE}.", ".", 1)
        reasons = {
            exception
            for exception in EXCEPTIONS
            if exception[0] == check["check_id"] and re.fullmatch(exception[1], resource)
        }
        used |= reasons
        pinned = check["check_id"] == "CKV_K8S_43" and Path(check["file_path"]).name in PINNED_BY_DIGEST
        if not reasons or pinned:
            unexplained.append((check["check_id"], check["check_name"], resource, check["file_path"]))
    assert unexplained == []
    assert used == EXCEPTIONS.keys(), "an exception is left over"


def test_checkov_finds_what_is_wrong(tmp_path: Path) -> None:
    # Else the test above would show nothing.
    bad = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bad", "namespace": NAMESPACE},
        "spec": {
            "hostNetwork": True,
            "containers": [{"name": "c", "image": "redis", "securityContext": {"privileged": True}}],
        },
    }
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    failed = {check["check_id"] for check in scanned(tmp_path)["results"]["failed_checks"]}
    # Privileged, on the host's network, as root, without limits, with a root file system that can be written to.
    assert {"CKV_K8S_16", "CKV_K8S_19", "CKV_K8S_23", "CKV_K8S_11", "CKV_K8S_22"} <= failed
