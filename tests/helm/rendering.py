"""The chart as helm renders it: one rendering for each helm line and values file, made once a session."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "galerne"
TOOLS = ROOT / ".tools" / "helm"
HELMS = ("helm4", "helm3")
VALUES = tuple(
    sorted(p.relative_to(CHART).as_posix() for p in (*CHART.glob("values-*.yaml"), *CHART.glob("ci/*.yaml")))
)
SHARED = Path(os.environ.get("GALERNE_SHARED") or ROOT.parent / "shared")
RELEASE, NAMESPACE = "trial", "galerne"


@dataclass(frozen=True)
class Ran:
    """What a helm command said."""

    status: int
    out: str
    err: str


def helm(line: str, *args: str, home: Path = ROOT / "build" / "helm-home") -> Ran:
    """Run a helm of `.tools/helm`, which keeps its own things in `home`; skips without it, fails in CI."""
    program = TOOLS / line
    if not program.exists():
        reason = f"{program.relative_to(ROOT)} is not installed: `make helm` does it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Nothing of the user's own helm: no plugins, no repositories, no cluster.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "HELM_CACHE_HOME": str(home), "HELM_CONFIG_HOME": str(home)}
    done = subprocess.run([program, *args], capture_output=True, text=True, env=env, timeout=60, check=False, cwd=ROOT)
    return Ran(done.returncode, done.stdout, done.stderr)


def template(line: str, values: str, *args: str) -> Ran:
    """`helm template` of the chart with one of its values files."""
    return helm(line, "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(CHART / values), *args)


@cache
def objects(line: str, values: str) -> tuple[dict[str, Any], ...]:
    """Every object of a rendering."""
    ran = template(line, values)
    assert ran.status == 0, ran.err
    return tuple(found for found in yaml.safe_load_all(ran.out) if found)


def of_kind(values: str, kind: str, line: str = "helm4") -> list[dict[str, Any]]:
    """The objects of a kind, of one values file."""
    return [found for found in objects(line, values) if found["kind"] == kind]


def rayservice(values: str, line: str = "helm4") -> dict[str, Any]:
    """The RayService of a values file."""
    (found,) = of_kind(values, "RayService", line)
    return found


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever it stands."""

    where: str
    metadata: dict[str, Any]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Init containers included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(values: str, line: str = "helm4") -> list[Pod]:
    """Every pod that the objects of a values file make."""
    return pods_of(objects(line, values))


def pods_of(things: Iterable[dict[str, Any]]) -> list[Pod]:
    """Every pod that objects make."""
    found = []
    for thing in things:
        where = f"{thing['kind']} {thing['metadata']['name']}"
        if thing["kind"] == "Pod":
            found.append(Pod(where, thing["metadata"], thing["spec"]))
        elif thing["kind"] == "RayService":
            cluster = thing["spec"]["rayClusterConfig"]
            groups = [("head", cluster["headGroupSpec"])]
            groups += [(group["groupName"], group) for group in cluster["workerGroupSpecs"]]
            for name, group in groups:
                pod = group["template"]
                found.append(Pod(f"{where} {name}", pod["metadata"], pod["spec"]))
        elif "template" in thing.get("spec", {}):
            pod = thing["spec"]["template"]
            if "spec" in pod:
                found.append(Pod(where, pod["metadata"], pod["spec"]))
    return found


def ray_groups(values: str) -> dict[str, dict[str, Any]]:
    """Head and worker groups of the RayService by name."""
    cluster = rayservice(values)["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


DIGEST = "0" * 64


def galerne_config(values: str) -> dict[str, Any]:
    """Galerne's configuration of a values file; where its tenants come from elsewhere, with one that fits no key."""
    texts = [
        s["stringData"]["galerne.yaml"] for s in of_kind(values, "Secret") if "galerne.yaml" in s.get("stringData", {})
    ]
    texts += [
        e["spec"]["target"]["template"]["data"]["galerne.yaml"].partition("\ntenants:")[0]
        for e in of_kind(values, "ExternalSecret")
    ]
    if texts:
        config: dict[str, Any] = yaml.safe_load(texts[0])
    else:
        given = yaml.safe_load((CHART / values).read_text())["config"]
        config = given | {"listen": {"host": "0.0.0.0", "port": 8000}}  # noqa: S104 - as pods do
    tenants = [{"id": "first-tenant", "keys": [{"id": "key-1", "sha256": DIGEST}]}]
    config.pop("tenants_file", None)  # its Secret is the operator's
    return {"tenants": tenants} | config
