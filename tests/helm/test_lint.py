"""Both helm lines take the chart and every values file, and what is wrong is refused in words that say what to set."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helm.rendering import CHART, HELMS, ROOT, VALUES, helm, objects, template


@pytest.mark.parametrize("line", HELMS)
def test_the_helm_lines_are_the_ones_we_say(line: str) -> None:
    assert helm(line, "version", "--short").out.startswith({"helm4": "v4.3.1", "helm3": "v3.18."}[line])


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize("values", ["", *VALUES])
def test_lint(line: str, values: str) -> None:
    ran = helm(line, "lint", "--strict", str(CHART), *(["--values", str(CHART / values)] if values else []))
    assert ran.status == 0, ran.out + ran.err
    assert "[WARNING]" not in ran.out
    assert "[ERROR]" not in ran.out
    # With values of its own nothing is left to set; `fail` only informs here.
    assert not values or "[INFO] Fail" not in ran.err + ran.out
    assert not values or "funcMap fail" not in ran.err


@pytest.mark.parametrize("values", VALUES)
def test_both_lines_render_the_same(values: str) -> None:
    secrets = ("Secret",)  # made up anew each time
    three, four = (
        sorted(yaml.safe_dump(o) for o in objects(line, values) if o["kind"] not in secrets)
        for line in ("helm3", "helm4")
    )
    assert three == four
    assert len(four) >= 6


# (values over ci/01, what the message says)
REFUSED = (
    # Misspelt.
    ("imagee: {}", "additional properties 'imagee' not allowed"),
    ("image: {tagg: v1}", "additional properties 'tagg' not allowed"),
    ("workerGroups: {processors: {gpu: 1}}", "additional properties 'gpu' not allowed"),
    ("networkPolicy: {apiserver: []}", "additional properties 'apiserver' not allowed"),
    ("config: {model: []}", "additional properties 'model' not allowed"),
    ("config: {gateway: {replica: 2}}", "additional properties 'replica' not allowed"),
    ("config: {models: [{id: a, source: 'fake:a', replica: {min: 1}}]}", "additional properties 'replica' not allowed"),
    ("config: {limits: {body_byte: 5}}", "additional properties 'body_byte' not allowed"),
    # What pods decide.
    ("config: {listen: {port: 9000}}", "additional properties 'listen' not allowed"),
    ("config: {demo_keys: true}", "additional properties 'demo_keys' not allowed"),
    # Mistyped.
    ("gateway: {cpu: two}", "got string, want integer"),
    ("gateway: {memory: 4}", "got number, want string"),
    ("gateway: {memory: 4GB}", "does not match pattern"),
    ("autoscaler: {enabled: 'yes'}", "got string, want boolean"),
    ("workerGroups: {processors: {min: -1}}", "minimum: got -1, want 0"),
    ("workerGroups: []", "got array, want object"),
    ("image: {digest: 'sha256:123'}", "does not match pattern"),
    ("service: {type: Loadbalancer}", "value must be one of"),
    ("upgrade: {strategy: Rolling}", "value must be one of"),
    ("config: {limits: {body_bytes: 0}}", "minimum: got 0, want 1"),
    ("config: {models: [{id: a, source: 'fake:a', parallel: {tensor: two}}]}", "got string, want integer"),
    ("config: {tenants: [{id: a, keys: [{id: k, sha256: abc}]}]}", "does not match pattern"),
    ("networkPolicy: {egress: [{to: [{ipBlock: {cidr: 10.0.0.1/32}}]}]}", "missing property 'ports'"),
    ("networkPolicy: {apiServer: [10.0.0.1]}", "does not match pattern"),
    ("weights: {volume: {hostPath: {path: /models}}}", "additional properties 'hostPath' not allowed"),
    ("security: {runAsUser: 0}", "minimum: got 0, want 1,000"),
    # What no single value shows: the templates say what to set.
    ("image: {tag: latest}", 'the tag "latest" of image'),
    ("redis: {tag: stable}", 'the tag "stable" of image'),
    ("config: {models: []}", "config.models is empty: name at least one model"),
    ("config: {tenants: []}", "config.tenants is empty: name at least one tenant"),
    ("tenants: {existingSecret: a, externalSecret: {enabled: true}}", "exclude each other"),
    ("tenants: {externalSecret: {enabled: true}}", "tenants.externalSecret needs store and remoteKey"),
    ("workerGroups: {gateway: {}}", "workerGroups.gateway: this name is the chart's own"),
    ("workerGroups: {Bad_Group: {}}", "workerGroups.Bad_Group: a group's name is of lower-case letters"),
    ("workerGroups: {%s: {}}" % ("a" * 31), "has 30 characters at most"),
    ("workerGroups: {processors: {min: 3, max: 2}}", "workerGroups.processors: max (2) is below min (3)"),
    ("workerGroups: {processors: {min: 0}}", "workerGroups.processors.min is 0 and autoscaler.enabled is false"),
    ("autoscaler: {enabled: true}", "networkPolicy.apiServer is empty"),
    (
        "config: {tracing: {otlp_endpoint: 'http://collector.tracing:4318'}}",
        "open the way to it in networkPolicy.egress",
    ),
    ("config: {limits_store: 'rediss://redis.data:6379/0'}", "config.limits_store names a Redis that network policies"),
    ("ledger: {existingSecret: a}", "open the way to it in networkPolicy.gatewayEgress"),
    ("limitsStore: {passwordSecret: {name: a}}", "config.limits_store names none"),
    ("gcs: {redisAddress: 'redis:6379'}", "set redis.enabled to false"),
    ("{gcs: {redisAddress: 'redis:6379'}, redis: {enabled: false}}", "gcs.passwordSecret.name is empty"),
    ("upgrade: {strategy: NewClusterWithIncrementalUpgrade}", "needs autoscaler.enabled"),
    ("ingress: {enabled: true}", "ingress.host is empty"),
    ("httpRoute: {enabled: true}", "httpRoute.parentRefs is empty"),
    ("weights: {prepare: {enabled: true}}", "weights.prepare needs weights.volume"),
    (
        "{weights: {volume: {persistentVolumeClaim: {claimName: a}}, prepare: {enabled: true}}}",
        "weights.prepare.enabled fetches hf: sources, and no model",
    ),
    (
        "{image: {build: cpu}, config: {models: [{id: a, source: 'hf:a/b', resources: {accelerator: cpu}}]}}",
        "a model has an hf: source",
    ),
    ("loadtest: {enabled: true}", "loadtest.keysSecret is empty"),
    ("config: {models: [{id: a, source: 'path:/m'}]}", 'no workerGroup can hold model "a": it needs 1 GPU(s) in a pod'),
    (
        "{config: {models: [{id: a, source: 'path:/m', resources: {accelerator_type: H100}}]}, "
        "workerGroups: {processors: {gpus: 1, acceleratorType: L4}}}",
        "it needs 1 GPU(s) of type H100 in a pod",
    ),
    ("config: {models: [{id: a, source: 'fake:a', resources: {cpus: 64}}]}", "no workerGroup has the 64 processors"),
    (
        "{config: {models: [{id: a, source: 'fake:a', parallel: {tensor: 4}}]}, workerGroups: {processors: {cpu: 3}}}",
        "no workerGroup has the 4 processors",
    ),
    (
        "{config: {models: [{id: a, source: 'path:/m', parallel: {tensor: 8, pipeline: 2}}]}, "
        "workerGroups: {processors: {gpus: 8, cpu: 8, max: 2}}}",
        'model "a" is 16 workers (parallel), and at their most the workerGroups hold 8',
    ),
    # The image for GPUs has no engine for processors, and Ray knows nothing of images.
    (
        "config: {models: [{id: a, source: 'path:/m', resources: {accelerator: cpu}}]}",
        'model "a" runs on processors, and workerGroups.processors, which could take it, has the image for GPUs',
    ),
    (
        "{config: {models: [{id: a, source: 'path:/m', resources: {accelerator: cpu}}]}, "
        "workerGroups: {processors: {image: {build: cpu, tag: 1-cpu}}, large: {gpus: 1, min: 1}}}",
        'model "a" runs on processors, and workerGroups.large, which could take it, has the image for GPUs',
    ),
    (
        "{config: {models: [{id: a, source: 'path:/m'}]}, image: {build: cpu}, workerGroups: {processors: {gpus: 1}}}",
        'model "a" runs on GPUs, and workerGroups.processors, which could take it, has the image for processors',
    ),
    ("workerGroups: {processors: {image: {build: cpu}}}", "workerGroups.processors.image.build is cpu"),
    ("workerGroups: {processors: {image: {tag: latest}}}", 'the tag "latest" of image'),
    ("image: {build: cuda}", "value must be one of"),
    ("drainSeconds: 10", "drainSeconds (10) is below the longest drain_timeout_s of config.models (20)"),
    ("drainSeconds: 0", "minimum: got 0, want 1"),
    (
        "config: {gateway: {replicas: {max: 16}}}",
        "gateway.maxConnections (65536) is below 131072, twice what 16 gateways accept",
    ),
)


# The helm 3 line has another validator of schemas, which says the same in its own words.
WORDS = (
    (r"additional properties '(\w+)' not allowed", r"Additional property \1 is not allowed"),
    (r"missing property '(\w+)'", r"\1 is required"),
    (r"got (\w+), want (string|integer|boolean|object)", r"Invalid type. Expected: \2, given: "),
    (r"value must be one of", "must be one of the following"),
    (r"minimum: got -?\d+, want ([\d,]+)", r"Must be greater than or equal to \1"),
)


def in_helm_3(message: str) -> str:
    """What the helm 3 line says where helm 4 says `message`."""
    for pattern, words in WORDS:
        message = re.sub(pattern, words, message)
    return message.replace("equal to 1,000", "equal to 1000")


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_wrong_is_refused(line: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(text)
    ran = template(line, "ci/01-simulated-values.yaml", "--values", str(tmp_path / "values.yaml"))
    assert ran.status != 0
    assert (message if line == "helm4" else in_helm_3(message)).casefold() in ran.err.casefold()


def test_a_release_without_values_says_what_to_set() -> None:
    ran = helm("helm4", "template", "trial", str(CHART))
    assert ran.status != 0
    assert "config.models is empty" in ran.err


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "helm.tools.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_chart_packages_without_what_only_tests_read(tmp_path: Path) -> None:
    ran = helm("helm4", "package", str(CHART), "--destination", str(tmp_path))
    assert ran.status == 0, ran.err
    (archive,) = tmp_path.glob("*.tgz")
    names = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout.split()
    assert "galerne/values-aks.yaml" in names
    assert "galerne/files/galerne.rules.yaml" in names
    assert not [name for name in names if "/ci/" in name]
