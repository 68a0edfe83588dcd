"""What pods are made from: what may change without another pod, what only some of them get, which models they can hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.app import bundles
from serving.cli.lifecycle import fake_models
from serving.config_file import parse
from tests.helm.rendering import (
    CHART,
    NAMESPACE,
    RELEASE,
    VALUES,
    galerne_config,
    helm,
    pods,
    pods_of,
    ray_groups,
    template,
)

BASE = "ci/01-simulated-values.yaml"
MIXED = "values-mixed-gpus.yaml"


def service(rendered: str) -> dict[str, Any]:
    """The RayService of a rendering."""
    (found,) = [thing for thing in yaml.safe_load_all(rendered) if thing and thing["kind"] == "RayService"]
    return found


def hashed(found: dict[str, Any]) -> dict[str, Any]:
    """What KubeRay makes a new cluster for: the cluster's spec, without how many pods there are."""
    cluster: dict[str, Any] = found["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        for part in ("replicas", "minReplicas", "maxReplicas"):
            del group[part]
    return cluster


def over(path: Path, text: str) -> dict[str, Any]:
    """The RayService of the least values with more over them."""
    (path / "more.yaml").write_text(text)
    ran = template("helm4", BASE, "--values", str(path / "more.yaml"))
    assert ran.status == 0, ran.err
    return service(ran.out)


MODELS = "[{id: demo, source: 'fake:demo'}%s]"
CHANGES = {
    "a second model with the default drain": "config: {models: %s}" % (MODELS % ", {id: b, source: 'fake:b'}"),
    "a longer drain": "config: {models: [{id: demo, source: 'fake:demo', drain_timeout_s: 599.5}]}",
    "more gateways": "config: {gateway: {replicas: {min: 3, max: 8}}}",
    "gateways that accept more": "config: {gateway: {max_ongoing_requests: 16384}}",
    "another tenant": "config: {tenants: [{id: other, keys: [{id: k, sha256: '%s'}]}]}" % ("1" * 64),
    "another Prometheus": "config: {prometheus: {url: 'http://prometheus.monitoring.svc:9090'}}",
}


@pytest.mark.parametrize("text", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_configuration_makes_no_second_cluster(text: str, tmp_path: Path) -> None:
    before = service(template("helm4", BASE).out)
    after = over(tmp_path, text)
    assert before != after or "tenant" in text
    assert hashed(before) == hashed(after)


def test_a_change_of_pods_is_one() -> None:
    # Else the tests around it would show nothing.
    before, after = (
        hashed(service(template("helm4", BASE, "--set", f"image.tag={tag}").out)) for tag in ("0.1.1", "0.1.2")
    )
    assert before != after


def test_another_version_of_the_chart_alone_makes_no_second_cluster(tmp_path: Path) -> None:
    chart = tmp_path / "galerne"
    shutil.copytree(CHART, chart)
    told = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump(told | {"version": "99.0.0"}))
    for values in (BASE, "ci/02-everything-values.yaml"):
        ran = helm("helm4", "template", RELEASE, str(chart), "--namespace", NAMESPACE, "--values", str(chart / values))
        assert "galerne-99.0.0" in ran.out
        assert hashed(service(ran.out)) == hashed(service(template("helm4", values).out))
        # Nor is Redis started again, which places nothing while it is away.
        redis, redis_then = (
            thing["spec"]["template"]
            for rendered in (ran.out, template("helm4", values).out)
            for thing in yaml.safe_load_all(rendered)
            if thing and thing["kind"] == "StatefulSet"
        )
        assert redis == redis_then


def test_two_gateways_unless_it_is_said() -> None:
    said = galerne_config(BASE)["gateway"]["replicas"]
    assert said == ray_groups(BASE)["gateway"]["minReplicas"] == 1
    assert "gateway" not in yaml.safe_load((CHART / "values-multi-node.yaml").read_text())["config"]
    config = parse(yaml.safe_dump(galerne_config("values-multi-node.yaml")), "galerne.yaml")
    assert config.gateway.bounds.min == config.gateway.bounds.max == 2
    assert ray_groups("values-multi-node.yaml")["gateway"]["minReplicas"] == 2


def test_a_single_gateway_is_told_of() -> None:
    def notes(*args: str) -> str:
        values = ("--values", str(CHART / BASE), "--namespace", NAMESPACE)
        ran = helm("helm4", "install", RELEASE, str(CHART), "--dry-run=client", *values, *args)
        assert ran.status == 0, ran.err
        return " ".join(ran.out.partition("NOTES:")[2].split())

    assert "There is one gateway: at a change of the configuration it takes no request" in notes()
    assert "up to 20 s" in notes()
    assert "one gateway" not in notes("--set", "config.gateway.replicas=2")


@pytest.mark.parametrize("values", VALUES)
def test_pods_without_gpus_see_none(values: str) -> None:
    asking = 0
    for pod in pods(values):
        for container in pod.containers:
            if container["name"] == "redis":
                continue
            env = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
            gpus = any(name.startswith("nvidia.com/") for name in container["resources"]["limits"])
            assert env.get("NVIDIA_VISIBLE_DEVICES") == (None if gpus else "void"), (pod.where, container["name"])
            asking += gpus
    assert asking or "ci/" in values
    for name, group in ray_groups(values).items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        there = sum(int(count) for resource, count in limits.items() if resource.startswith("nvidia.com/"))
        assert int(group["rayStartParams"]["num-gpus"]) == there, name


@pytest.mark.parametrize("values", VALUES)
def test_weights_are_in_pods_that_run_engines_alone(values: str) -> None:
    given = yaml.safe_load((CHART / values).read_text()).get("weights", {}).get("volume")
    with_weights = set()
    for name, group in ray_groups(values).items():
        spec = group["template"]["spec"]
        volumes = {v["name"] for v in spec["volumes"]}
        assert {m["name"] for m in spec["containers"][0]["volumeMounts"]} <= volumes | {"api-token"}
        if "weights" in volumes:
            with_weights.add(name)
    assert with_weights == (ray_groups(values).keys() - {"head", "gateway"} if given else set())


@pytest.mark.parametrize("values", VALUES)
def test_every_model_says_what_it_runs_on(values: str) -> None:
    # `auto` asks Ray, which has no GPU to show while only the head is up.
    if not yaml.safe_load((CHART / values).read_text()).get("tenants", {}).get("existingSecret"):
        for model in galerne_config(values)["models"]:
            if not model["source"].startswith("fake:"):
                assert model["resources"]["accelerator"] in {"gpu", "cpu"}, model["id"]


def test_auto_is_a_gpu(tmp_path: Path) -> None:
    group = {"gpus": 2, "cpu": 4, "min": 1}
    for said in ({}, {"accelerator": "auto"}, {"accelerator": "gpu"}):
        model = {"id": "a", "source": "path:/models/a", "resources": {"gpus": 2} | said}
        (tmp_path / "values.yaml").write_text(
            yaml.safe_dump({"config": {"models": [model]}, "workerGroups": {"large": group}})
        )
        ran = template("helm4", BASE, "--values", str(tmp_path / "values.yaml"))
        assert ran.status == 0, ran.err
        (text,) = [
            thing["stringData"]["galerne.yaml"]
            for thing in yaml.safe_load_all(ran.out)
            if thing and "galerne.yaml" in thing.get("stringData", {})
        ]
        (found,) = yaml.safe_load(text)["models"]
        assert found["resources"] == {"accelerator": "gpu", "gpus": 2}


def test_models_on_processors_go_where_their_engine_is() -> None:
    images = {name: g["template"]["spec"]["containers"][0]["image"] for name, g in ray_groups(MIXED).items()}
    own = images.pop("processors")
    assert own == "galerne/galerne:0.1.0-cpu"
    assert set(images.values()) == {"galerne/galerne:0.1.0"}
    config = parse(yaml.safe_dump(galerne_config(MIXED)), MIXED)
    (model,) = [m for m in config.models if m.resources.accelerator == "cpu"]
    (bundle,) = bundles(model, gpu=False)
    params = ray_groups(MIXED)["processors"]["rayStartParams"]
    offered = yaml.safe_load(params["resources"].strip("'")) | {"CPU": int(params["num-cpus"])}
    assert bundle.keys() == offered.keys()
    assert all(bundle[resource] <= offered[resource] for resource in bundle)
    # In place of an engine a simulated one runs wherever there is room.
    for fake in fake_models(config).models:
        assert bundles(fake, gpu=False)[0].keys() == {"CPU"}


@pytest.mark.parametrize(
    ("own", "image"),
    [
        ({}, "galerne/galerne:0.1.0@sha256:" + "a" * 64),
        ({"tag": "0.1.0-cpu"}, "galerne/galerne:0.1.0-cpu"),
        ({"repository": "other/galerne"}, "other/galerne:0.1.0"),
        ({"digest": "sha256:" + "b" * 64}, "galerne/galerne:0.1.0@sha256:" + "b" * 64),
    ],
)
def test_a_group_has_its_own_image(own: dict[str, str], image: str, tmp_path: Path) -> None:
    values = {"image": {"digest": "sha256:" + "a" * 64}, "workerGroups": {"processors": {"image": own}}}
    *_, group = over(tmp_path, yaml.safe_dump(values))["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["image"] == image


def test_gated_models_are_fetched_with_a_token() -> None:
    (pod,) = [pod for pod in pods("ci/02-everything-values.yaml") if pod.where.endswith("-prepare")]
    env = {entry["name"]: entry for entry in pod.containers[0]["env"]}
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub-token", "key": "token"}}
    assert "HF_HUB_OFFLINE" not in env
    assert (pod.spec["nodeSelector"], pod.spec["tolerations"]) == ({"disk": "local"}, [{"operator": "Exists"}])
    # Nobody else sees it.
    for other in pods("ci/02-everything-values.yaml"):
        if other.where != pod.where:
            assert "hub-token" not in str(other.spec)


def chosen(values: Any, where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where the chart's values have nodeSelector and tolerations."""
    if not isinstance(values, dict):
        return []
    here = [where] if {"nodeSelector", "tolerations"} <= values.keys() else []
    return here + [found for name, part in values.items() for found in chosen(part, (*where, name))]


@pytest.mark.parametrize("values", ["ci/02-everything-values.yaml", "ci/05-keda-values.yaml"])
def test_every_pod_can_be_kept_to_nodes_and_bears_their_taints(values: str, tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    for where in chosen(yaml.safe_load((CHART / "values.yaml").read_text())):
        part = told
        for name in where:
            part = part.setdefault(name, {})
        part["nodeSelector"] = {"told": ".".join(where)}
        part["tolerations"] = [{"key": ".".join(where), "operator": "Exists"}]
    (tmp_path / "told.yaml").write_text(yaml.safe_dump(told))
    ran = template("helm4", values, "--values", str(tmp_path / "told.yaml"))
    assert ran.status == 0, ran.err
    found = pods_of(thing for thing in yaml.safe_load_all(ran.out) if thing)
    assert len(found) >= len(pods(values)) >= 7
    for pod in found:
        by = pod.spec.get("nodeSelector", {}).get("told")
        assert by, f"{pod.where}: no value of the chart says which nodes it may run on"
        assert pod.spec["tolerations"] == [{"key": by, "operator": "Exists"}], pod.where


def test_on_aks_all_but_engines_bears_the_taint_of_a_system_pool() -> None:
    taint = {"key": "CriticalAddonsOnly", "operator": "Exists"}
    for pod in pods("values-aks.yaml"):
        if pod.metadata["labels"]["app.kubernetes.io/component"] != "engine":
            assert taint in pod.spec["tolerations"], pod.where


def test_priority_classes_are_the_charts_or_those_that_are_there() -> None:
    # They belong to the whole cluster: two releases of one name, in two namespaces, cannot both make them.
    def classes(*args: str) -> dict[str, str | None]:
        ran = template("helm4", "ci/02-everything-values.yaml", *args)
        assert ran.status == 0, ran.err
        things = [thing for thing in yaml.safe_load_all(ran.out) if thing]
        made = {thing["metadata"]["name"] for thing in things if thing["kind"] == "PriorityClass"}
        assert len(made) == (2 if not args else 0)
        found = pods_of(things)
        return {
            pod.metadata["labels"]["app.kubernetes.io/component"]: pod.spec.get("priorityClassName") for pod in found
        }

    own = classes()
    assert own["head"] == own["gateway"] == own["redis"] == "trial-galerne-serving"
    assert own["engine"] == "trial-galerne-engines"
    there = ("priorityClasses.create=false", "priorityClasses.serving=a", "priorityClasses.engines=b")
    given = classes(*(word for value in there for word in ("--set", value)))
    assert {name: given[name] for name in ("head", "gateway", "redis", "engine")} == {
        "head": "a", "gateway": "a", "redis": "a", "engine": "b"
    }  # fmt: skip
