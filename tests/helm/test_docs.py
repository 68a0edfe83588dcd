"""What the installation guides tell people to type is what works: every command that can run without a cluster is run.

`helm upgrade --install` is run as `helm template` with the same arguments, `kubectl create` as a client-side dry run.
What is left needs a cluster, a cloud or a registry; a command of any other kind fails the test.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helm.custom_kinds import DESCRIBED
from tests.helm.rendering import HELMS, RELEASE, ROOT, TOOLS, galerne_config, helm, ray_groups
from tests.helm.stack import checkout, repository
from tests.helm.test_objects import core_validator, is_custom
from tests.integration.running import GALERNE

STACK = "install-stack.md"
GUIDES = ("install-aks.md", "install-onprem.md", "install-airgap.md", STACK)
# (program, words after it): what only a cluster, a cloud or a registry answers.
ELSEWHERE = (
    ("az",),
    ("skopeo",),
    ("make", "image"),
    ("docker",),
    ("kubectl", "get"),
    ("kubectl", "label"),
    ("kubectl", "delete"),
    ("kubectl", "apply"),
    ("kubectl", "wait"),
    ("galerne", "cluster"),
    ("helm", "install"),
    ("helm", "pull"),
    ("helm", "test"),
    ("helm", "uninstall"),
)
HERE = (
    ("helm", "repo", "add"),
    ("helm", "dependency", "build"),
    ("helm", "lint"),
    ("helm", "template"),
    ("helm", "package"),
    ("cp",),
    ("export",),
    ("galerne",),
)


def blocks(guide: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / guide).read_text(), re.S | re.M)


def commands(guide: str) -> list[str]:
    """Every command of the guide, with lines that go on joined."""
    text = "\n".join(blocks(guide, "sh")).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def words(command: str) -> list[str]:
    """Program and words without options that stand between."""
    found = shlex.split(command)
    if found[:2] == ["kubectl", "-n"]:
        del found[1:3]
    return found


def runnable(command: str) -> str | None:
    """The command as it runs here; None where it needs what is not here."""
    found = words(command)
    if found[:3] == ["helm", "upgrade", "--install"]:
        return command.replace("helm upgrade --install", "helm template", 1)
    if found[:2] == ["kubectl", "create"]:
        return f"{command} --dry-run=client --output yaml"
    if any(tuple(found[: len(start)]) == start for start in ELSEWHERE):
        return None
    assert any(tuple(found[: len(start)]) == start for start in HERE), (
        f"neither run nor known to need a cluster: {command}"
    )
    return command


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide(guide: str, line: str, tmp_path: Path) -> None:
    helm(line, "version")  # skips where it is absent
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, target in (("helm", TOOLS / line), ("kubectl", TOOLS / "kubectl"), ("galerne", GALERNE)):
        (programs / name).symlink_to(target)
    checkout(tmp_path / "helm")
    (tmp_path / "galerne.yaml").write_text(yaml.safe_dump(galerne_config("values-airgap.yaml")))
    script = [run for command in commands(guide) if (run := runnable(command)) is not None]
    assert len(script) >= 6
    env = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "GALERNE_TEST_KEY": "sk-test",
        "REGISTRY_PASSWORD": "x",
        "REDIS_PASSWORD": "x",
        "KUBECONFIG": os.devnull,
    }
    with repository(tmp_path, {name: pin["version"] for name, pin in pins().items()}) as url:
        env |= dict.fromkeys(re.findall(r"\$(\w+_CHARTS)", "\n".join(script)), url)
        for command in script:
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-500:]}{done.stderr}"


def pins() -> dict[str, dict[str, Any]]:
    """helm/versions.yaml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "helm" / "versions.yaml").read_text())
    return found


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if guide != STACK])
def test_operators_are_installed_as_pinned(guide: str) -> None:
    installed = 0
    for command in commands(guide):
        found = shlex.split(command)
        if found[:2] in (["helm", "install"], ["helm", "pull"]):
            name = next(word for word in reversed(found[2:4]) if not word.startswith("-")).rpartition("/")[2]
            archive = re.fullmatch(r"(.+)-(\d[\d.]*)\.tgz", name)
            chart, version = archive.groups() if archive else (name, found[found.index("--version") + 1])
            assert pins()[chart]["version"] == version, command
            installed += 1
    assert installed >= 1


@pytest.mark.parametrize("guide", GUIDES)
def test_the_manifests_of_a_guide(guide: str) -> None:
    for block in blocks(guide, "yaml"):
        for thing in yaml.safe_load_all(block):
            if is_custom(thing):
                DESCRIBED[thing["kind"]].model_validate(thing)
                continue
            try:
                core_validator("1.36", thing["apiVersion"], thing["kind"]).validate(thing)
            except jsonschema.ValidationError as error:
                pytest.fail(f"{guide}: {thing['kind']}: {error.message}")


@pytest.mark.parametrize("guide", GUIDES)
def test_the_ray_cluster_goes_before_what_it_needs(guide: str) -> None:
    # Policies, Secrets and Redis belong to the release: pods that still drain would stand without them.
    *_, delete, cluster, pods, uninstall = commands(guide)
    assert delete == "kubectl -n galerne delete rayservice galerne"
    assert "--for=delete raycluster" in cluster
    assert "--for=delete pod" in pods
    assert uninstall.startswith("helm uninstall")


# What the Blob CSI driver documents of a static volume that is mounted with a token.
BLOB = {"protocol", "resourceGroup", "storageAccount", "containerName", "clientID", "mountWithWorkloadIdentityToken"}


def test_weights_on_aks_are_mounted_by_the_accounts_of_the_release() -> None:
    (volume,) = [
        thing
        for block in blocks("install-aks.md", "yaml")
        for thing in yaml.safe_load_all(block)
        if thing["kind"] == "PersistentVolume"
    ]
    # Without these the driver asks for the account's key.
    assert volume["spec"]["csi"]["volumeAttributes"].keys() == BLOB
    assert volume["spec"]["csi"]["volumeAttributes"]["mountWithWorkloadIdentityToken"] == "true"
    rendered = ray_groups("values-aks.yaml").values()
    user = {group["template"]["spec"]["securityContext"]["runAsUser"] for group in rendered}
    options = set(volume["spec"]["mountOptions"])
    assert options >= {"-o allow_other", *(f"-o {kind}={uid}" for uid in user for kind in ("uid", "gid"))}
    # Whoever mounts it is trusted, under the names that the guide's release has.
    trusted = set(re.findall(r"--subject system:serviceaccount:galerne:(\S+)", "\n".join(commands("install-aks.md"))))
    accounts = {
        group["template"]["spec"]["serviceAccountName"]
        for group in rendered
        if any(volume["name"] == "weights" for volume in group["template"]["spec"]["volumes"])
    }
    assert accounts
    assert {account.removeprefix(f"{RELEASE}-") for account in accounts} <= trusted
    claim = yaml.safe_load((ROOT / "helm/galerne/values-aks.yaml").read_text())["weights"]["volume"]
    assert claim["persistentVolumeClaim"]["claimName"] == volume["spec"]["claimRef"]["name"]


def test_identities_that_no_pod_uses_are_not_given_to_pods() -> None:
    (store,) = [t for t in blocks("install-aks.md", "yaml") if "ClusterSecretStore" in t]
    account, found = yaml.safe_load_all(store)
    referred = found["spec"]["provider"]["azurekv"]["serviceAccountRef"]
    assert referred == {key: account["metadata"][key] for key in ("name", "namespace")}
    subject = f"system:serviceaccount:{referred['namespace']}:{referred['name']}"
    assert any(f"--subject {subject} " in command for command in commands("install-aks.md"))
    given = yaml.safe_load((ROOT / "helm/galerne/values-aks.yaml").read_text())
    assert found["metadata"]["name"] == given["tenants"]["externalSecret"]["store"]
    assert "serviceAccount" not in given


def test_every_values_file_is_told_of() -> None:
    told = (ROOT / "helm" / "galerne" / "README.md").read_text()
    for path in (ROOT / "helm" / "galerne").glob("values-*.yaml"):
        assert f"[{path.name}]({path.name})" in told
