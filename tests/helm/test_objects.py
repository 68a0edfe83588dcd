"""Every rendered object is one that an API server takes: core objects by each release's own schema, custom ones by their CRD."""

from __future__ import annotations

import gzip
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pydantic
import pytest
import yaml
from referencing import Registry, Resource

from tests.helm.custom_kinds import DESCRIBED, described
from tests.helm.rendering import HELMS, SHARED, VALUES, objects, of_kind, pods

KUBERNETES = ("1.32", "1.33", "1.34", "1.35", "1.36")
CRDS = SHARED / "crds"
CUSTOM_GROUPS = (
    "ray.io/",
    "monitoring.coreos.com/",
    "external-secrets.io/",
    "gateway.networking.k8s.io/",
    "keda.sh/",
    "cilium.io/",
)


def is_custom(thing: dict[str, Any]) -> bool:
    """Whether its kind comes from a CRD."""
    return str(thing["apiVersion"]).startswith(CUSTOM_GROUPS)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", VALUES)
def test_core_objects(values: str, version: str) -> None:
    core = [thing for thing in objects("helm4", values) if not is_custom(thing)]
    assert len(core) >= 4
    for thing in core:
        core_validator(version, thing["apiVersion"], thing["kind"]).validate(thing)


@pytest.mark.parametrize("line", HELMS)
@pytest.mark.parametrize("values", VALUES)
def test_custom_objects(values: str, line: str) -> None:
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is absent: custom objects are not checked against their CRDs (GALERNE_SHARED names it)")
    checked = 0
    for thing in objects(line, values):
        if is_custom(thing) and not described(thing):
            validator(thing["apiVersion"], thing["kind"]).validate(thing)
            checked += 1
    assert checked >= 1


@pytest.mark.parametrize("line", HELMS)
def test_custom_objects_without_a_crd_at_hand(line: str) -> None:
    seen = set()
    for values in VALUES:
        for thing in objects(line, values):
            if described(thing):
                DESCRIBED[thing["kind"]].model_validate(thing)
                seen.add(thing["kind"])
    assert seen == DESCRIBED.keys() - {"ClusterSecretStore"}  # that one is the guides'


WRONG = {
    "ScrapeConfig": ('"refreshInterval"', '"refreshIntervall"'),
    "ExternalSecret": ('"creationPolicy": "Owner"', '"creationPolicy": "Owned"'),
    "HTTPRoute": ('"port": 8000', '"port": "8000"'),
    "CiliumNetworkPolicy": ('"port": "443"', '"port": 443'),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_them_does_not_pass(kind: str) -> None:
    thing = next(found for values in VALUES for found in of_kind(values, kind))
    right, wrong = WRONG[kind]
    assert right in json.dumps(thing)
    with pytest.raises(pydantic.ValidationError):
        DESCRIBED[kind].model_validate(json.loads(json.dumps(thing).replace(right, wrong)))


def test_a_misspelt_field_does_not_pass() -> None:
    # Else the tests above would show nothing.
    (pod,) = of_kind("ci/02-everything-values.yaml", "Pod")
    misspelt = pod | {"spec": pod["spec"] | {"restartPolicie": "Never"}}
    with pytest.raises(jsonschema.ValidationError, match="restartPolicie"):
        core_validator("1.36", "v1", "Pod").validate(misspelt)
    # And the package itself, whose files are read here without being parsed anew for every object, agrees.
    kubernetes_validate.validate(pod, "1.36", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolicie"):
        kubernetes_validate.validate(misspelt, "1.36", strict=True)
    if CRDS.is_dir():
        (service,) = of_kind("ci/02-everything-values.yaml", "RayService")
        wrong = json.loads(json.dumps(service).replace("rayStartParams", "rayStartParam"))
        with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
            validator("ray.io/v1", "RayService").validate(wrong)


SCHEMAS = Path(str(kubernetes_validate.__file__)).parent / "kubernetes-json-schema"


@cache
def definitions(version: str) -> Registry[Any]:
    """What a release's schemas refer to, with unknown fields refused."""
    contents = json.loads((SCHEMAS / f"v{version}.0-local-strict" / "_definitions.json").read_text())
    return (Resource.from_contents(contents) @ Registry()).crawl()


@cache
def core_validator(version: str, api_version: str, kind: str) -> jsonschema.protocols.Validator:
    """What a release of Kubernetes says of a kind."""
    group, slash, name = api_version.rpartition("/")
    suffix = f"{group.partition('.')[0]}-{name}" if slash else name
    schema = json.loads((SCHEMAS / f"v{version}.0-local-strict" / f"{kind.lower()}-{suffix}.json").read_text())
    registry = (Resource.from_contents(schema) @ definitions(version)).crawl()
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def validator(api_version: str, kind: str) -> jsonschema.protocols.Validator:
    """What a CRD of `shared/crds` says of one version, with unknown fields refused."""
    group, _, version = api_version.partition("/")
    for path in CRDS.glob(f"{group}_*.yaml.gz"):
        crd = yaml.load(gzip.decompress(path.read_bytes()), Loader=yaml.CSafeLoader)
        if crd["spec"]["names"]["kind"] == kind:
            (found,) = [v for v in crd["spec"]["versions"] if v["name"] == version]
            schema = closed(found["schema"]["openAPIV3Schema"])
            # The API server's own fields, which a CRD leaves open.
            schema["properties"]["metadata"] = {"type": "object"}
            return jsonschema.Draft202012Validator(schema)
    raise AssertionError(f"no CRD of {kind} in {CRDS}")


def closed(schema: Any) -> Any:
    """The schema with every described object closed, and the API server's integer-or-string understood."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(part) for key, part in schema.items()}
    if isinstance(found.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def test_scrape_configs_ask_the_gateways() -> None:
    (scrape,) = of_kind("ci/02-everything-values.yaml", "ScrapeConfig")
    services = {s["metadata"]["name"]: s["spec"] for s in of_kind("ci/02-everything-values.yaml", "Service")}
    assert scrape["apiVersion"] == "monitoring.coreos.com/v1alpha1"
    assert set(scrape["spec"]) == {"scrapeInterval", "scrapeTimeout", "httpSDConfigs", "relabelings"}
    ((discovery),) = scrape["spec"]["httpSDConfigs"]
    host, _, path = discovery["url"].removeprefix("http://").partition("/")
    name, namespace, _ = host.split(".", 2)
    assert (namespace, path) == ("galerne", "targets")
    assert services[name]["selector"]["app.kubernetes.io/component"] == "gateway"
    assert host.endswith(f":{services[name]['ports'][0]['port']}")


def test_routes_lead_to_the_gateways_service() -> None:
    (route,) = of_kind("ci/02-everything-values.yaml", "HTTPRoute")
    (ingress,) = of_kind("ci/02-everything-values.yaml", "Ingress")
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "trial-galerne", "port": 8000}]
    from serving.api import routes

    paths = {match["path"]["value"] for match in rule["matches"]}
    assert paths == {path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]}
    for path in (*routes.RELAYED, routes.READY, "/v1/models", "/version"):
        assert any(path == prefix or path.startswith(f"{prefix}/") for prefix in paths), path


def test_the_tenants_of_a_store_stand_in_the_file() -> None:
    (secret,) = of_kind("ci/03-external-secrets-values.yaml", "ExternalSecret")
    text = secret["spec"]["target"]["template"]["data"]["galerne.yaml"]
    # As the operator's template engine would put it there.
    filled = text.replace("{{ .tenants | indent 2 }}", '  - id: a\n    keys: [{id: k, sha256: "' + "0" * 64 + '"}]')
    from serving.config_file import parse

    assert [tenant.id for tenant in parse(filled, "galerne.yaml").tenants] == ["a"]
    assert secret["spec"]["data"] == [{"secretKey": "tenants", "remoteRef": {"key": "galerne/tenants"}}]


def test_redis_gets_its_password_on_standard_input(tmp_path: Path) -> None:
    (pod,) = [pod for pod in pods("ci/02-everything-values.yaml") if pod.where.startswith("StatefulSet")]
    shell, option, script = pod.containers[0]["command"]
    (settings,) = [m for m in of_kind("ci/02-everything-values.yaml", "ConfigMap") if "redis.conf" in m["data"]]
    (tmp_path / "redis.conf").write_text(settings["data"]["redis.conf"])
    (tmp_path / "password").write_text("s3cret")
    # Says what it was told, and how.
    (tmp_path / "redis-server").write_text('#!/bin/sh\necho "args: $*"\ncat\n')
    (tmp_path / "redis-server").chmod(0o755)
    for mount, here in (("/etc/redis-secret", tmp_path), ("/etc/redis", tmp_path)):
        script = script.replace(f"{mount}/", f"{here}/")
    done = subprocess.run(
        [shell, option, script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    first, *rest = done.stdout.splitlines()
    assert first == "args: -"
    assert rest[-1] == "requirepass s3cret"
    assert "appendonly yes" in rest
