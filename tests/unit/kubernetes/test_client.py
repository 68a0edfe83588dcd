"""The client against a server that speaks the REST API: every answer that is no success, and what becomes of it."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from serving.cluster.kubernetes.client import ATTEMPTS, CONFLICT_ATTEMPTS, LONGEST_PAUSE_S, Client, connect
from serving.cluster.kubernetes.resources import CONFIG_MAPS, NODES, PODS, RAY_SERVICES
from serving.errors import (
    ApiBusy,
    ApiConflict,
    ApiDenied,
    ApiMissing,
    ApiUnreachable,
    ClusterError,
    KubernetesError,
)
from tests.unit.kubernetes.conftest import NAMESPACE, TOKEN, write_kubeconfig
from tests.unit.kubernetes.server import ApiServer, Fault


def config_map(name: str, **data: str) -> dict[str, object]:
    return {"metadata": {"name": name, "namespace": NAMESPACE}, "data": data}


def test_sends_the_kubeconfigs_token(server: ApiServer, client: Client) -> None:
    server.put("", "nodes", {"metadata": {"name": "a"}})
    assert client.get(NODES, None, "a")["metadata"]["name"] == "a"
    assert server.seen[-1].authorization == f"Bearer {TOKEN}"


def test_lists_in_parts(server: ApiServer, client: Client) -> None:
    for index in range(7):
        server.put("", "nodes", {"metadata": {"name": f"node-{index}"}})
    server.page = 3
    listing = client.list(NODES)
    assert [i["metadata"]["name"] for i in listing.items] == [f"node-{i}" for i in range(7)]
    assert listing.resource_version == str(server.version)
    assert [s.query.get("continue") for s in server.seen] == [None, "3", "6"]


def test_a_list_whose_first_part_is_forgotten_begins_anew(server: ApiServer, client: Client) -> None:
    for index in range(4):
        server.put("", "nodes", {"metadata": {"name": f"node-{index}"}})
    server.page = 2
    server.faults.append(Fault(lambda s: s.query.get("continue") == "2", 410, {"reason": "Expired", "code": 410}))
    assert len(client.list(NODES).items) == 4
    assert [s.query.get("continue") for s in server.seen] == [None, "2", None, "2"]


@pytest.mark.parametrize(
    ("headers", "body", "waits"),
    [
        ({"Retry-After": "3"}, {}, [3.0]),
        ({}, {"details": {"retryAfterSeconds": 2}}, [2.0]),
        ({}, {}, [0.5]),
        ({"Retry-After": "86400"}, {}, [LONGEST_PAUSE_S]),
        ({"Retry-After": "Wed, 25 Nov 2026 07:28:00 GMT"}, {}, [0.5]),
    ],
)
def test_429_is_waited_for_within_a_bound(
    server: ApiServer, client: Client, slept: list[float], headers: dict[str, str], body: dict, waits: list[float]
) -> None:
    server.put("", "nodes", {"metadata": {"name": "a"}})
    server.faults.append(Fault(lambda _: True, 429, body, headers))
    assert client.get(NODES, None, "a")
    assert slept == waits
    assert len(server.seen) == 2


def test_429_without_end_is_an_error_that_carries_the_wait(
    server: ApiServer, client: Client, slept: list[float]
) -> None:
    server.faults.append(Fault(lambda _: True, 429, {}, {"Retry-After": "7"}, times=99))
    with pytest.raises(ApiBusy) as caught:
        client.list(NODES)
    assert caught.value.retry_after_s == 7
    assert len(server.seen) == ATTEMPTS
    assert slept == [7.0] * (ATTEMPTS - 1)


@pytest.mark.parametrize("status", [0, 500, 502, 503, 504])
def test_a_read_survives_drops_and_server_errors(server: ApiServer, client: Client, status: int) -> None:
    server.put("", "nodes", {"metadata": {"name": "a"}})
    server.faults.append(Fault(lambda _: True, status, times=2))
    assert client.get(NODES, None, "a")["metadata"]["name"] == "a"
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [0, 500])
def test_a_creation_whose_answer_was_not_heard_is_not_repeated(server: ApiServer, client: Client, status: int) -> None:
    server.faults.append(Fault(lambda _: True, status))
    with pytest.raises(KubernetesError):
        client.create(CONFIG_MAPS, NAMESPACE, config_map("a"))
    assert len(server.seen) == 1


def test_403_names_what_was_asked_for(server: ApiServer, client: Client) -> None:
    server.allow([])
    with pytest.raises(ApiDenied) as caught:
        client.list(RAY_SERVICES, NAMESPACE)
    error = caught.value
    assert (error.verb, error.group, error.resource, error.namespace) == ("list", "ray.io", "rayservices", NAMESPACE)
    assert len(server.seen) == 1
    assert pickle.loads(pickle.dumps(error)).resource == "rayservices"  # noqa: S301  # our own


def test_401_is_a_refusal(server: ApiServer, tmp_path: Path) -> None:
    client, _ = connect(str(write_kubeconfig(tmp_path / "other", server.url, token="wrong")))
    with pytest.raises(ApiDenied) as caught:
        client.list(NODES)
    assert caught.value.status == 401
    client.close()


def test_404(client: Client) -> None:
    with pytest.raises(ApiMissing):
        client.get(PODS, NAMESPACE, "none")


def test_a_change_is_made_on_the_newest(server: ApiServer, client: Client) -> None:
    server.put("", "configmaps", config_map("a", ours="1", theirs="1"))
    interfered = []

    def change(document: dict) -> dict:
        if not interfered:
            interfered.append(1)
            server.put("", "configmaps", config_map("a", ours="1", theirs="2"))
        document["data"]["ours"] = "2"
        return document

    client.modify(CONFIG_MAPS, NAMESPACE, "a", change)
    assert server.find("", "configmaps", NAMESPACE, "a")["data"] == {"ours": "2", "theirs": "2"}
    assert [s.verb for s in server.seen] == ["get", "update", "get", "update"]


def test_changes_that_always_come_too_late_end(server: ApiServer, client: Client) -> None:
    server.put("", "configmaps", config_map("a"))

    def change(document: dict) -> dict:
        server.put("", "configmaps", config_map("a", theirs=str(server.version)))
        return document

    with pytest.raises(ApiConflict):
        client.modify(CONFIG_MAPS, NAMESPACE, "a", change)
    assert sum(s.verb == "update" for s in server.seen) == CONFLICT_ATTEMPTS


def test_nothing_to_change_writes_nothing(server: ApiServer, client: Client) -> None:
    server.put("", "configmaps", config_map("a"))
    client.modify(CONFIG_MAPS, NAMESPACE, "a", lambda _: None)
    assert [s.verb for s in server.seen] == ["get"]


def test_an_object_without_a_resource_version_is_not_swapped(client: Client) -> None:
    with pytest.raises(ClusterError, match="resource version"):
        client.replace(CONFIG_MAPS, NAMESPACE, config_map("a"))


def test_a_write_whose_answer_was_lost_is_seen_as_done(server: ApiServer, client: Client) -> None:
    """The server took the first PUT and dropped the connection: the second is a conflict, and the change is there."""
    server.put("", "configmaps", config_map("a", n="0"))
    wrote = []

    def take_and_drop(seen: object) -> bool:
        if getattr(seen, "verb", "") == "update" and not wrote:
            wrote.append(1)
            server.put("", "configmaps", config_map("a", n="1"))
            return True
        return False

    server.faults.append(Fault(take_and_drop, 0))

    def change(document: dict) -> dict | None:
        if document["data"]["n"] == "1":
            return None
        document["data"]["n"] = "1"
        return document

    assert client.modify(CONFIG_MAPS, NAMESPACE, "a", change)["data"] == {"n": "1"}


def test_an_unreachable_server_is_named(tmp_path: Path, slept: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client, _ = connect(str(write_kubeconfig(tmp_path / "k", f"http://127.0.0.1:{port}")))
    client._pause = slept.append
    with pytest.raises(ApiUnreachable, match=f"127.0.0.1:{port} cannot be reached") as caught:
        client.list(NODES)
    assert len(slept) == ATTEMPTS - 1
    assert "kubeconfig" in str(caught.value)
    client.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of 127.0.0.1 in one file, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key"), "-out", str(folder / "crt")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    both = folder / "both"
    both.write_text((folder / "crt").read_text() + (folder / "key").read_text())
    return both


@pytest.mark.parametrize("trusted", [True, False])
def test_https_and_whom_to_trust(certificate: Path, tmp_path: Path, trusted: bool, slept: list[float]) -> None:
    with ApiServer(certificate=certificate) as server:
        server.token = TOKEN
        server.put("", "nodes", {"metadata": {"name": "a"}})
        authority = {"certificate-authority": str(certificate)} if trusted else {}
        client, _ = connect(str(write_kubeconfig(tmp_path / "k", server.url, **authority)))
        client._pause = slept.append
        if trusted:
            assert client.get(NODES, None, "a")
        else:
            with pytest.raises(ApiUnreachable, match=r"(?i)certificate"):
                client.get(NODES, None, "a")
            assert server.seen == [], "no token is sent to a stranger"
        client.close()


def test_something_else_than_an_api_server(server: ApiServer, client: Client) -> None:
    server.faults.append(Fault(lambda _: True, 200, b"<html>welcome</html>"))
    with pytest.raises(KubernetesError, match="no JSON"):
        client.list(NODES)


@pytest.mark.parametrize("content", ["", "{}", "not: [a, kubeconfig"])
def test_a_kubeconfig_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "k"
    path.write_text(content)
    with pytest.raises(ClusterError, match="--kubeconfig"):
        connect(str(path))


def test_a_context_that_is_not_there(kubeconfig: Path) -> None:
    with pytest.raises(ClusterError, match="other"):
        connect(str(kubeconfig), "other")
