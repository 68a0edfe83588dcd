"""Names of objects: two releases never share one, references lead to them, and none is longer than Kubernetes takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.rendering import CHART, HELMS, NAMESPACE, helm

EVERYTHING, KEDA = "ci/02-everything-values.yaml", "ci/05-keda-values.yaml"
ALIKE = "assistants-of-the-newsroom-production-west"  # more than 40 characters
LONG = (f"{ALIKE}-one", f"{ALIKE}-two")
# Two that only what is appended to makes alike.
NEARLY = ("a" * 34 + "-1", "a" * 34 + "-2")
LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
# What KubeRay 1.7 takes: it makes further names of them ("-xxxxx", "-head-svc").
MOST_RAYSERVICE = 47


@cache
def rendered(line: str, release: str, values: str, *args: str) -> tuple[dict[str, Any], ...]:
    """Every object of a release."""
    named = ("template", release, str(CHART), "--namespace", NAMESPACE, "--values", str(CHART / values))
    ran = helm(line, *named, *args)
    assert ran.status == 0, ran.err
    return tuple(found for found in yaml.load_all(ran.out, yaml.CSafeLoader) if found)


def names(objects: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    """Kind and name of each."""
    found = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize("values", [EVERYTHING, KEDA])
def test_two_releases_whose_names_begin_alike_share_no_object(values: str, line: str) -> None:
    one, two = (names(rendered(line, release, values)) for release in LONG)
    assert len(one) == len(two) >= 18
    assert one & two == set()


@pytest.mark.parametrize("line", HELMS)
def test_two_names_that_are_alike_only_where_more_is_appended_share_none(line: str) -> None:
    one, two = (names(rendered(line, "a", KEDA, "--set", f"fullnameOverride={name}")) for name in NEARLY)
    assert one & two == set()


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize(("release", "fullname"), [("trial", "trial-galerne"), ("b" * 32, "b" * 32 + "-galerne")])
def test_a_name_that_is_short_enough_stands_as_it_is(release: str, fullname: str, line: str) -> None:
    # What is installed keeps its names: another RayService is another cluster.
    found = names(rendered(line, release, EVERYTHING))
    assert ("RayService", fullname) in found
    assert {
        ("Secret", f"{fullname}-tokens"),
        ("StatefulSet", f"{fullname}-redis"),
        ("PodDisruptionBudget", f"{fullname}-gateway"),
    } <= found


@pytest.mark.parametrize("release", [LONG[0], "trial"])
@pytest.mark.parametrize("values", [EVERYTHING, KEDA])
def test_no_name_is_longer_than_kubernetes_takes(values: str, release: str) -> None:
    for thing in rendered("helm4", release, values):
        metadata = thing["metadata"]
        assert LABEL.fullmatch(metadata["name"]), metadata["name"]
        assert all(len(value) <= 63 for value in metadata["labels"].values())
        if thing["kind"] == "RayService":
            assert len(metadata["name"]) <= MOST_RAYSERVICE


def test_models_with_long_ids_that_begin_alike_have_their_own_objects(tmp_path: Path) -> None:
    # As long as an id may be.
    first, second = (f"organisation/{'a-model-with-a-long-name-' * 4}".ljust(127, "x") + end for end in "12")
    models = [
        {"id": name, "source": "fake:chat", "replicas": {"max": 2}, "drain_timeout_s": 20} for name in (first, second)
    ]
    given = yaml.safe_load((CHART / KEDA).read_text())
    given["config"]["models"], given["keda"]["models"] = models, {first: {}, second: {}}
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(given))
    for release in ("trial", LONG[0]):
        scaled = [name for kind, name in names(rendered("helm4", release, str(values))) if kind == "ScaledObject"]
        assert len(scaled) == 2
        assert all(LABEL.fullmatch(name) for name in scaled)


def test_groups_whose_names_begin_alike_have_their_own_budget(tmp_path: Path) -> None:
    groups = {f"nodes-with-eight-gpus-{pool}": {"gpus": 0, "cpu": 4, "min": 2, "max": 2} for pool in ("spot", "kept")}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"workerGroups": groups}))
    found = names(rendered("helm4", "trial", EVERYTHING, "--values", str(tmp_path / "values.yaml")))
    assert len([name for kind, name in found if kind == "PodDisruptionBudget"]) == 3


# Fields that name an object: (kind, path of the name within what holds it).
REFERENCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Secret", ("secret", "secretName")),
    ("Secret", ("secretKeyRef", "name")),
    ("Secret", ("secretRef", "name")),
    ("ConfigMap", ("configMap", "name")),
    ("ServiceAccount", ("serviceAccountName",)),
    ("PriorityClass", ("priorityClassName",)),
    ("PersistentVolumeClaim", ("persistentVolumeClaim", "claimName")),
    ("Service", ("backend", "service", "name")),
    ("Deployment", ("scaleTargetRef", "name")),
    ("Secret", ("authOptions", "secretName")),
)
# Objects of the operator's own, or of the cluster's.
OTHERS = {
    "galerne-test-key",
    "hub-token",
    "ledger-database",
    "limits-redis",
    "loadtest-keys",
    "models",
    "kube-root-ca.crt",
}


def references(thing: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of what a part of an object refers to."""
    if isinstance(thing, dict):
        for kind, path in REFERENCES:
            found: Any = thing
            for step in path:
                found = found.get(step) if isinstance(found, dict) else None
            if isinstance(found, str):
                yield kind, found
    for part in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
        yield from references(part)


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize("values", [EVERYTHING, KEDA])
def test_references_lead_to_objects_of_the_release(values: str, line: str) -> None:
    for release in ("trial", LONG[0]):
        objects = rendered(line, release, values)
        there = names(objects)
        referred = {found for thing in objects for found in references(thing)}
        assert len(referred) >= 5
        assert {name for kind, name in referred if (kind, name) not in there} <= OTHERS


def test_texts_name_the_release_as_its_objects_do() -> None:
    """Addresses, commands and variables: a long name stands wherever a short one does."""

    def text(release: str) -> str:
        found = rendered("helm4", release, EVERYTHING)
        (fullname,) = [name for kind, name in names(found) if kind == "RayService"]
        # Tokens are made up anew each time, and names of dashboards are cut anew.
        objects = [t for t in found if t["kind"] != "Secret" and "dashboard" not in t["metadata"]["name"]]
        variable = fullname.upper().replace("-", "_")
        dumped = yaml.safe_dump_all(objects, width=10_000)
        return dumped.replace(fullname, "NAME").replace(variable, "VARIABLE").replace(release, "RELEASE")

    assert text(LONG[0]) == text("trial-one")
