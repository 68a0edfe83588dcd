"""The support bundle: secrets planted wherever a cluster may hold one, and none of them in what is written."""

from __future__ import annotations

import base64
import json
import stat
import tarfile
from pathlib import Path

import pytest

from serving.cluster.kubernetes.bundle import collect
from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.masking import MASK, Masker
from tests.unit.kubernetes.conftest import NAMESPACE, TOKEN
from tests.unit.kubernetes.kuberay import pod
from tests.unit.kubernetes.release import PROMETHEUS, Run, populate
from tests.unit.kubernetes.server import ApiServer

DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQifQ.c2lnbmF0dXJlLXBhcnQ"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAplantedkeybody\n-----END RSA PRIVATE KEY-----"
# What must not be found, by where it is planted.
SECRETS = {
    "Secret data": "plain-secret-in-data",
    "env value": "env-value-hunter2",
    "env token": "ray-auth-token-777",
    "config digest": DIGEST,
    "config password": "pg-password-in-url",
    "redis password": "redis-pass-in-args",
    "annotation": "annotated-password-1",
    "last applied": "last-applied-secret-9",
    "log key": "sk-live-4f9a2b7c81",
    "log bearer": "AbCdEf0123456789bearer",
    "log basic": "dXNlcjpwYXNzd29yZA==",
    "log jwt": JWT,
    "log url": "url-password-xyz",
    "log sas": "sas%2Bsignature%3D",
    "log account key": "AccountKeyValue0123456789==",
    "log hub": "hf_abcdefghijklmnopqrst",
    "log pem": "MIIEowIBAAKCAQEAplantedkeybody",
    "log json": "json-password-value",
    "log cookie": "session-cookie-value",
    "log flag": "flag-token-value-1",
    "event": "event-password-3",
    "prometheus": "prom-label-token-5",
    "own token": TOKEN,
}
LOG = f"""2026-11-25T10:00:00Z starting up
key {SECRETS["log key"]} used by newsroom
Authorization: Bearer {SECRETS["log bearer"]}
authorization: Basic {SECRETS["log basic"]}
{{"headers": {{"Authorization": "Token {SECRETS["env value"]}"}}, "password": "{SECRETS["log json"]}"}}
token is {SECRETS["log jwt"]}
GET https://user:{SECRETS["log url"]}@registry.example.com/v2/ 401
GET https://x.blob.core.windows.net/m?sv=2024&sig={SECRETS["log sas"]} 403
AccountKey={SECRETS["log account key"]};EndpointSuffix=core.windows.net
HF token {SECRETS["log hub"]}
{PEM}
Cookie: {SECRETS["log cookie"]}
started with --auth-token {SECRETS["log flag"]}
raw env again: {SECRETS["env value"]} and {SECRETS["redis password"]}
digest of the key: {DIGEST}
throughput 812.4 tokens/s, prompt tokens: 1024, output tokens: 128
image registry/galerne@sha256:{"ab" * 32}
done
"""


def plant(server: ApiServer) -> None:
    populate(server)
    encoded = base64.b64encode(SECRETS["Secret data"].encode()).decode()
    server.put(
        "", "secrets", {"metadata": {"name": "s", "namespace": NAMESPACE}, "type": "Opaque", "data": {"k": encoded}}
    )
    engine = pod("c-1-h100-1", "c-1", "h100", "10.0.1.3")
    container = engine["spec"]["containers"][0]
    container["env"] = [
        {"name": "DATABASE", "value": SECRETS["env value"]},
        {"name": "RAY_AUTH_TOKEN", "value": SECRETS["env token"]},
        {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"},
        {"name": "GALERNE_RELEASE", "value": "galerne/news"},
        {
            "name": "GALERNE_ENGINE_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "galerne-tokens", "key": "engine_token"}},
        },
    ]
    container["args"] = ["redis-server", "--password", SECRETS["redis password"]]
    engine["metadata"]["annotations"] = {
        "team/password": SECRETS["annotation"],
        "kubectl.kubernetes.io/last-applied-configuration": json.dumps({"env": SECRETS["last applied"]}),
    }
    engine["metadata"]["managedFields"] = [{"manager": "helm"}]
    server.put("", "pods", engine)
    config = (
        f'tenants:\n- id: press\n  keys: [{{id: newsroom, sha256: "{DIGEST}"}}]\n'
        f'ledger: {{url: "postgresql://galerne:{SECRETS["config password"]}@db/galerne"}}\n'
    )
    server.put("", "configmaps", {"metadata": {"name": "c", "namespace": NAMESPACE}, "data": {"galerne.yaml": config}})
    server.put(
        "",
        "events",
        {
            "metadata": {"name": "e2", "namespace": NAMESPACE},
            "message": f"probe failed: GET http://u:{SECRETS['event']}@x/ token={SECRETS['own token']}",
        },
    )
    # Read before the pods whose variable it repeats.
    server.change(
        "ray.io",
        "rayservices",
        NAMESPACE,
        "galerne",
        lambda d: d["metadata"]["annotations"].update(note=f"started as {SECRETS['env value']}"),
    )
    for name in ("c-1-h100-1", "c-1-gw-1"):
        server.logs[name, "ray", False] = LOG.encode()
    server.logs["c-1-h100-1", "ray", True] = b"before the restart: password=" + SECRETS["log json"].encode()
    server.proxy["prometheus:9090"] = lambda _, __: json.dumps(
        {"status": "success", "data": {"result": [{"metric": {"api_token": SECRETS["prometheus"]}, "value": [1, "1"]}]}}
    ).encode()


def unpack(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }


@pytest.fixture
def bundle(server: ApiServer, kubeconfig: Path, tmp_path: Path, galerne: Run) -> dict[str, str]:
    plant(server)
    path = tmp_path / "bundle.tar.gz"
    code, out, _ = galerne(
        "support-bundle", "--kubeconfig", str(kubeconfig), "--out", str(path), "--prometheus", PROMETHEUS
    )
    assert code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "left out: Secrets" in out
    return unpack(path)


@pytest.mark.parametrize("where", sorted(SECRETS))
def test_no_secret_is_in_it(bundle: dict[str, str], where: str) -> None:
    secret = SECRETS[where]
    forms = {secret, base64.b64encode(secret.encode()).decode(), json.dumps(secret)[1:-1]}
    found = [path for path, text in bundle.items() for form in forms if form in text]
    assert found == []


def test_what_people_need_is_in_it(bundle: dict[str, str]) -> None:
    log = bundle["logs/c-1-gw-1/ray.log"]
    for line in (
        "starting up",
        "throughput 812.4 tokens/s, prompt tokens: 1024, output tokens: 128",
        "registry.example.com/v2/ 401",
        "done",
    ):
        assert line in log
    assert f"sha256:{'ab' * 32}" in log, "an image's digest is no secret"
    assert MASK in log
    pods = json.loads(bundle["objects/pods.json"])
    engine = next(p for p in pods if p["metadata"]["name"] == "c-1-h100-1")
    env = {e["name"]: e for e in engine["spec"]["containers"][0]["env"]}
    assert env["DATABASE"]["value"] == MASK
    assert env["RAY_AUTH_TOKEN"]["value"] == MASK
    assert env["RAY_SERVE_ENABLE_HA_PROXY"]["value"] == "1"
    # Every series has it as a label: cut out it would be cut out of the figures, too.
    assert env["GALERNE_RELEASE"]["value"] == "galerne/news"
    assert env["GALERNE_ENGINE_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "galerne-tokens", "key": "engine_token"}
    assert engine["spec"]["containers"][0]["image"] == "registry/galerne:1"
    assert "managedFields" not in engine["metadata"]
    assert "newsroom" in bundle["objects/configmaps.json"]
    assert json.loads(bundle["status.json"])["service"] == "galerne"
    assert "logs/c-1-h100-1/ray.previous.log" in bundle
    assert "metrics/signals.json" in bundle
    events = bundle["objects/events.json"]
    assert "Readiness probe failed" in events


def test_the_manifest_says_what_is_there_and_what_is_not(bundle: dict[str, str]) -> None:
    manifest = json.loads(bundle["manifest.json"])
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert set(listed) | {"manifest.json"} == set(bundle)
    assert all(listed[path] == len(text.encode()) for path, text in bundle.items() if path != "manifest.json")
    assert manifest["masked_places"] > 20
    assert manifest["kubernetes"] == "v1.34.2"
    left_out = "\n".join(manifest["left_out"])
    assert "Secrets: never asked for" in left_out
    assert "logs/c-1-h100-2/ray.previous.log" in left_out


def test_secrets_are_never_asked_for(server: ApiServer, bundle: dict[str, str]) -> None:
    assert server.seen
    assert not [s for s in server.seen if s.resource == "secrets"]


def test_logs_are_bounded_and_keep_the_newest(server: ApiServer, client: Client) -> None:
    plant(server)
    for name in ("c-1-h100-1", "c-1-gw-1", "c-1-gw-2"):
        server.logs[name, "ray", False] = b"".join(b"line %06d\n" % i for i in range(4000))
    files = collect(client, NAMESPACE, None, facts={}, log_bytes=1000, all_logs_bytes=1500)
    logs = {path: content for path, content in files.items() if path.startswith("logs/")}
    assert sum(map(len, logs.values())) <= 1500
    assert all(len(content) <= 1000 for content in logs.values())
    first = files["logs/c-1-gw-1/ray.log"]
    assert first.endswith(b"line 003999\n")
    assert first.startswith(b"line 00")
    left_out = json.loads(files["manifest.json"])["left_out"]
    assert any("bounded to 1500" in line for line in left_out)
    assert any("all but its last 1000 bytes" in line for line in left_out)


def test_what_is_refused_is_left_out_with_the_rule(server: ApiServer, client: Client) -> None:
    plant(server)
    server.allow([("", "pods", "list", NAMESPACE)])
    files = collect(client, NAMESPACE, None, facts={})
    assert set(files) == {"objects/pods.json", "manifest.json"}
    left_out = "\n".join(json.loads(files["manifest.json"])["left_out"])
    assert 'resources: ["configmaps"], verbs: ["list"]' in left_out
    assert "may not get pods/log" in left_out


@pytest.mark.parametrize(
    "text",
    [
        "tokens_per_minute: 200000",
        "prompt_tokens=1024 output_tokens=12",
        "GET /v1/chat/completions 200 in 0.31 s",
        "secretName: galerne-config mounted",
        "RAY_SERVE_HAPROXY_MAXCONN=8192",
        "image sha256:" + "0" * 64,
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    if text.startswith(("tokens", "prompt", "secretName")):
        # Forms that look like a secret's name may lose their value; the name itself stays.
        assert text.split("=")[0].split(":")[0] in Masker().text(text)
    else:
        assert Masker().text(text) == text


def test_a_secret_object_keeps_its_names_only() -> None:
    masked = Masker().document({"kind": "Secret", "data": {"k": "djE="}, "stringData": {"j": "v2"}})
    assert masked["data"] == {"k": MASK}
    assert masked["stringData"] == {"j": MASK}
