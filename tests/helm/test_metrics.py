"""What Prometheus and Grafana get from the chart is what one machine has: rules, jobs and dashboards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serving.cli.state import ClusterState, EngineState, GatewayState
from serving.metrics.prometheus import rule_file
from serving.metrics.release import LABEL, matcher, scoped
from serving.metrics.rules import SCRAPE_S
from tests.helm.rendering import (
    CHART,
    HELMS,
    NAMESPACE,
    RELEASE,
    VALUES,
    galerne_config,
    helm,
    of_kind,
    pods,
    pods_of,
    template,
)

EVERYTHING = "ci/02-everything-values.yaml"
NAMED = {"targetLabel": "galerne_release", "replacement": f"{NAMESPACE}/{RELEASE}", "action": "replace"}
NOBODY = "http://127.0.0.1:18499"
DASHBOARD = {"title": "A dashboard", "panels": [{"targets": [{"legendFormat": "{{model}} {{ tenant }}"}]}]}


def test_the_rules_are_those_of_galerne_rules() -> None:
    for line in HELMS:
        (rule,) = of_kind(EVERYTHING, "PrometheusRule", line)
        # Alerts' texts are templates of Prometheus, and must reach it as such.
        assert rule["spec"] == yaml.safe_load(rule_file(f"{NAMESPACE}/{RELEASE}"))
        assert "{{ $labels" in json.dumps(rule["spec"])


@pytest.mark.parametrize(("name", "told"), [("", f"{NAMESPACE}/{RELEASE}"), ("news", "news")])
def test_everything_that_is_measured_and_asked_is_of_the_release(name: str, told: str) -> None:
    # One name for targets, pods, rules and KEDA: what is asked is what is scraped.
    for values in (EVERYTHING, "ci/05-keda-values.yaml"):
        ran = template("helm4", values, *(("--set", f"config.release={name}") if name else ()))
        assert ran.status == 0, ran.err
        things = [thing for thing in yaml.safe_load_all(ran.out) if thing]
        found: set[str] = set()
        for thing in things:
            if thing["kind"] in {"PodMonitor", "ScrapeConfig"}:
                spec = thing["spec"]
                (named,) = [
                    relabeling["replacement"]
                    for endpoint in spec.get("podMetricsEndpoints", [spec])
                    for relabeling in endpoint["relabelings"]
                    if relabeling["targetLabel"] == LABEL
                ]
                found.add(named)
            elif thing["kind"] == "PrometheusRule":
                assert thing["spec"] == yaml.safe_load(rule_file(told))
            elif thing["kind"] == "ScaledObject":
                for trigger in thing["spec"]["triggers"]:
                    query = trigger["metadata"]["query"]
                    assert scoped(query, matcher(told)) == query
                    assert query.count(matcher(told)) == query.count("model:galerne")
        for pod in pods_of(thing for thing in things if thing["kind"] == "RayService"):
            found.add(next(v["value"] for v in pod.containers[0]["env"] if v["name"] == "GALERNE_RELEASE"))
        assert found == {told}


def test_every_job_of_one_machine_is_scraped_under_its_name() -> None:
    one_machine = ClusterState(
        url="",
        pid=1,
        engine_token="",
        haproxy_metrics_port=9101,
        models={},
        gateways=(GatewayState("g", 1, 9400),),
        engines={"a": (EngineState("e", "127.0.0.1", 1, 1),)},
        autoscaler_port=9390,
    ).prometheus_targets()
    ports = {
        row["labels"]["job"]: int(row["targets"][0].rpartition(":")[2])
        for row in one_machine
        if row["labels"]["job"] not in {"galerne-gateway", "vllm"}  # told by the gateways: test_start
    }
    scraped = {}
    for monitor in of_kind(EVERYTHING, "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["interval"], endpoint["scrapeTimeout"]) == (f"{SCRAPE_S}s", f"{SCRAPE_S - 1}s")
        relabeled, named = endpoint["relabelings"]
        assert named == NAMED
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (pod,) = [pod for pod in pods(EVERYTHING) if wanted <= pod.metadata["labels"].items()]
        named = {port["name"]: port["containerPort"] for port in pod.containers[0]["ports"]}
        scraped[relabeled["replacement"]] = named[endpoint["port"]]
    assert scraped == ports


@pytest.mark.parametrize("values", [values for values in VALUES if values.startswith("values-")])
def test_the_prometheus_that_the_guides_install_chooses_what_the_examples_make(values: str) -> None:
    # kube-prometheus-stack takes objects of its own release unless it is told otherwise: nothing else is scraped.
    made = [thing for kind in ("PodMonitor", "ScrapeConfig", "PrometheusRule") for thing in of_kind(values, kind)]
    for thing in made:
        assert thing["metadata"]["labels"].get("release") == "prometheus", thing["metadata"]["name"]
    assert bool(made) is ("prometheus" in galerne_config(values))


def test_every_dashboard_becomes_a_config_map_as_it_stands(tmp_path: Path) -> None:
    chart = tmp_path / "galerne"
    shutil.copytree(CHART, chart)
    for name in ("one.json", "model_two.json"):
        (chart / "dashboards").mkdir(exist_ok=True)
        (chart / "dashboards" / name).write_text(json.dumps(DASHBOARD))
    for line in HELMS:
        ran = helm(line, "template", RELEASE, str(chart), "--namespace", NAMESPACE, "--values", str(CHART / EVERYTHING))
        assert ran.status == 0, ran.err
        maps = {
            next(iter(o["data"])): o
            for o in yaml.safe_load_all(ran.out)
            if o and o["kind"] == "ConfigMap" and "dashboard" in o["metadata"]["name"]
        }
        expected = {path.name for path in (chart / "dashboards").glob("*.json")}
        assert maps.keys() == expected
        for name in ("one.json", "model_two.json"):
            assert json.loads(maps[name]["data"][name]) == DASHBOARD
            assert maps[name]["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert {m["metadata"]["name"] for m in maps.values()} >= {
            "trial-galerne-dashboard-one",
            "trial-galerne-dashboard-model-two",
        }


def test_panels_link_to_the_runbook_where_it_is_published() -> None:
    address = "https://docs.example/runbook"
    for line in HELMS:
        ran = template(line, EVERYTHING, "--set", f"metrics.runbookUrl={address}")
        assert ran.status == 0, ran.err
        assert f"{address}#" in ran.out
        assert "docs/runbook.md" not in ran.out
        assert "docs/runbook.md#" in template(line, EVERYTHING).out


def test_the_load_test_is_called_as_it_is_written(tmp_path: Path) -> None:
    (command,) = [c["command"] for pod in pods(EVERYTHING) for c in pod.containers if c["name"] == "loadtest"]
    assert command[1:5] == ["-m", "loadtest", "run", "/etc/loadtest/scenario.yaml"]
    # Nobody listens there, so that it ends at once, after it has taken every option and the scenario.
    (found,) = [m for m in of_kind(EVERYTHING, "ConfigMap") if "scenario.yaml" in m["data"]]
    (tmp_path / "scenario.yaml").write_text(found["data"]["scenario.yaml"])
    here = {"/etc/loadtest/scenario.yaml": str(tmp_path / "scenario.yaml"), "http://trial-galerne:8000": NOBODY}
    args = [here.get(word, word).replace("/report", str(tmp_path)) for word in command[1:]]
    # At an installation it is there before the gateways are, and it is not started a second time.
    waits = args.index("--wait-ready-s") + 1
    assert int(args[waits]) >= 3600
    args[waits] = "0"
    env = os.environ | {"FIRST_TENANT_KEY": "sk-test", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "127.0.0.1:18499" in done.stderr + done.stdout
