"""`galerne cluster rollout` as an operator types it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from serving.cluster.kubernetes.versions import applied, config_changes, config_volume, image_changes
from serving.errors import ClusterError
from tests.unit.kubernetes.conftest import NAMESPACE
from tests.unit.kubernetes.kuberay import NAME, service
from tests.unit.kubernetes.release import PROMETHEUS, Run, operate, populate
from tests.unit.kubernetes.server import ApiServer
from tests.unit.kubernetes.shared import ROOT

CONFIG = """\
listen: {host: 0.0.0.0}
models: [{id: m-v1.5, source: "path:/models/m-2", resources: {accelerator: gpu}}]
tenants: [{id: press, keys: [{id: k, sha256: "%s"}]}]
""" % ("0" * 64)
Rollout = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "new.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def rollout(server: ApiServer, kubeconfig: Path, galerne: Run, monkeypatch: pytest.MonkeyPatch) -> Rollout:
    populate(server)
    operate(server, monkeypatch)
    monkeypatch.setattr("serving.cluster.kubernetes.client.FIRST_PAUSE_S", 0.0)
    return lambda *arguments: galerne("rollout", "--kubeconfig", str(kubeconfig), *arguments)


def written(server: ApiServer) -> list[tuple[str, str]]:
    return [(s.verb, s.resource) for s in server.seen if s.method != "GET"]


def test_a_dry_run_says_everything_and_changes_nothing(server: ApiServer, rollout: Rollout, config: Path) -> None:
    code, out, _ = rollout(
        "--config", str(config), "--image", "registry/galerne:2", "--prometheus", PROMETHEUS, "--dry-run"
    )
    assert code == 0
    assert written(server) == []
    assert "create Secret galerne-config-" in out
    assert "registry/galerne:1 -> registry/galerne:2" in out
    assert "traffic: 20%, 40%, 60%, 80%, 100%; each held for 600 s and 200 requests" in out
    assert "back: more than 5% of requests miss" in out


def test_a_new_configuration_reaches_everybody(server: ApiServer, rollout: Rollout, config: Path) -> None:
    code, out, err = rollout("--config", str(config), "--prometheus", PROMETHEUS, "--yes", "--observe-s", "120")
    assert code == 0, err
    assert "done: the new version has all traffic" in out
    assert "20% of the traffic: held" in err
    spec = server.find("ray.io", "rayservices", NAMESPACE, NAME)["spec"]
    mounted = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["volumes"][0]["secret"]["secretName"]
    revision = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]["revision"]
    secret = server.find("", "secrets", NAMESPACE, mounted)
    assert secret["immutable"] is True
    text = secret["stringData"]["galerne.yaml"]
    assert text.splitlines()[0] == f"# revision: {revision}", "what the application waits for"
    assert text.endswith(CONFIG)


def test_no_is_no(server: ApiServer, rollout: Rollout, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.cli.cluster.typer.confirm", lambda *_, **__: (_ for _ in ()).throw(SystemExit(1)))
    assert rollout("--config", str(config), "--prometheus", PROMETHEUS)[0] == 1
    assert written(server) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--prometheus", PROMETHEUS), 1, "name what is new"),
        (("--image", "registry/galerne:1", "--prometheus", PROMETHEUS), 1, "nothing to roll out"),
        (("--image", "x:2"), 1, "name it with --prometheus"),
        (("--image", "x:2", "--prometheus", "service:monitoring/other:9090"), 1, "does not answer"),
        (("--config-from", "mine", "--prometheus", PROMETHEUS), 1, "--revision is missing"),
        (("--back",), 1, "no rollout is under way"),
        (("--resume", "--prometheus", PROMETHEUS), 1, "nothing to resume"),
        (("--image", "x:2", "--service", "other", "--prometheus", PROMETHEUS), 1, "no RayService other"),
        (("--image", "x:2", "--share", "0"), 2, "share"),
    ],
)
def test_what_is_refused(server: ApiServer, rollout: Rollout, arguments: tuple[str, ...], code: int, says: str) -> None:
    found, _, err = rollout(*arguments)
    assert found == code
    assert says in " ".join(err.split())
    assert written(server) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: []", "models"),
        (CONFIG.replace("listen: {host: 0.0.0.0}\n", ""), "listen.host"),
        (CONFIG.replace(", resources: {accelerator: gpu}", ""), "models[m-v1.5].resources.accelerator: says auto"),
    ],
)
def test_a_configuration_that_pods_could_not_serve(
    server: ApiServer, rollout: Rollout, config: Path, text: str, says: str
) -> None:
    config.write_text(text)
    code, _, err = rollout("--config", str(config), "--prometheus", PROMETHEUS, "--yes")
    assert code == 2
    assert says in err
    assert written(server) == []


def test_every_group_gets_the_new_version(server: ApiServer, rollout: Rollout) -> None:
    own = service()
    group = own["spec"]["rayClusterConfig"]["workerGroupSpecs"][-1]
    group["template"]["spec"]["containers"][0]["image"] = "registry/galerne:1-cpu"
    server.put("ray.io", "rayservices", own)
    new = ("--image", "registry/galerne:2", "--prometheus", PROMETHEUS, "--dry-run")
    code, _, err = rollout(*new)
    assert code == 1
    assert f"--group-image {group['groupName']}=IMAGE" in err
    code, out, err = rollout(*new, "--group-image", f"{group['groupName']}=registry/galerne:2-cpu")
    assert code == 0, err
    assert "registry/galerne:1-cpu -> registry/galerne:2-cpu" in out
    assert rollout(*new, "--group-image", "registry/galerne:2-cpu")[0] == 1
    code, _, err = rollout("--group-image", "a=b", "--config-from", "mine", "--revision", "r", "--dry-run")
    assert (code, "--group-image is for a rollout with --image" in err) == (1, True)


def test_without_a_second_cluster_helm_is_named(server: ApiServer, rollout: Rollout) -> None:
    server.put("ray.io", "rayservices", service("None"))
    code, _, err = rollout("--image", "x:2", "--prometheus", PROMETHEUS)
    assert code == 1
    assert "helm upgrade" in err


def test_somebody_elses_secret(server: ApiServer, rollout: Rollout) -> None:
    code, _, _ = rollout(
        "--config-from", "mine", "--revision", "r7", "--prometheus", PROMETHEUS, "--yes", "--observe-s", "60"
    )
    assert code == 0
    assert not [s for s in server.seen if s.resource == "secrets"]
    spec = server.find("ray.io", "rayservices", NAMESPACE, NAME)["spec"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["volumes"][0]["secret"]["secretName"] == "mine"
    assert "revision: r7" in spec["serveConfigV2"]


@pytest.mark.parametrize("values", ["values-mixed-gpus.yaml", "values-aks.yaml"])
def test_the_charts_own_service_can_be_rolled_out(values: str) -> None:
    """Held against the chart, where it and helm are there: its pods' image and configuration are found."""
    chart = ROOT / "helm" / "galerne"
    helm = next(
        (path for name in ("helm4", "helm3", "helm") if (path := ROOT / ".tools" / "helm" / name).exists()), None
    )
    if not chart.exists() or helm is None:
        pytest.skip("the chart or helm is not in this tree (make helm)")
    command = [str(helm), "template", "galerne", str(chart), "-f", str(chart / values)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = next(d for d in yaml.safe_load_all(rendered) if d and d["kind"] == "RayService")
    groups = 1 + len(found["spec"]["rayClusterConfig"]["workerGroupSpecs"])
    assert config_volume(found).key == "galerne.yaml"
    own = {"processors": "registry/galerne:next-cpu"} if "mixed" in values else {}
    if own:
        with pytest.raises(ClusterError, match="--group-image processors=IMAGE"):
            image_changes(found, "registry/galerne:next")
    changes = image_changes(found, "registry/galerne:next", own)
    assert len(changes) >= groups
    after = applied(found, changes)["spec"]["rayClusterConfig"]
    assert {
        group["groupName"]: {container["image"] for container in group["template"]["spec"]["containers"]}
        for group in after["workerGroupSpecs"]
    } == {g["groupName"]: {own.get(g["groupName"], "registry/galerne:next")} for g in after["workerGroupSpecs"]}
    applied(found, changes, back=True)
    with pytest.raises(ClusterError, match="no group nobody"):
        image_changes(found, "registry/galerne:next", own | {"nobody": "x"})
    assert len(config_changes(found, "other", "next")) == groups + 1
