"""The real front, by raw bytes: HAProxy, uvicorn and Ray in front of the gateway's app, at every port that takes HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from serving.cli import state
from serving.cli.lifecycle import RAY_DIR
from serving.cluster.haproxy import Timers
from tests.fronts import Answer, answer, until_closed
from tests.integration.running import KEY, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

AUTH = b"authorization: Bearer %b\r\n" % KEY.encode()
UUID = re.compile(r"[0-9a-f-]{32,36}")
# Sooner than any timer: what closes within it is closed because it was answered.
SOON_S = Timers().headers_s / 2
# More lines than Serve collects before it writes any.
LOGGED_REQUESTS = 1200


def connect(cluster: RunningCluster, port: int | None = None) -> socket.socket:
    front = urlsplit(cluster.url).port
    return socket.create_connection(("127.0.0.1", port or front or 0), timeout=SOON_S)


def ask(cluster: RunningCluster, request: bytes, port: int | None = None) -> Answer:
    with connect(cluster, port) as connection:
        connection.sendall(request)
        return until_closed(connection)


def get(path: bytes, headers: bytes = b"") -> bytes:
    return b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%b\r\n" % (path, headers)


def code(found: Answer) -> str:
    error = json.loads(found.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


@pytest.fixture(scope="module")
def past_haproxy(fake_cluster: RunningCluster) -> dict[str, int]:
    return fake_cluster.ports_past_haproxy()


@pytest.fixture(params=["front", "gateway", "fallback"])
def port(request: pytest.FixtureRequest, past_haproxy: dict[str, int]) -> int | None:
    return past_haproxy.get(request.param)


@pytest.mark.parametrize(
    ("request_", "statuses"),
    [
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", {401}),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\na", {401}),
        (b"GET /health/live HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\na", {200}),
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n%bcontent-length: 1000\r\n\r\na" % AUTH, {200}),
        (b"POST /v1/none HTTP/1.1\r\nhost: x\r\n%btransfer-encoding: chunked\r\n\r\n" % AUTH, {404}),
        (b"PUT /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: 1000\r\n\r\na" % AUTH, {405}),
    ],
)
def test_an_answer_before_the_requests_end_closes_the_connection(
    fake_cluster: RunningCluster, request_: bytes, statuses: set[int]
) -> None:
    found = ask(fake_cluster, request_)
    assert found.status in statuses
    assert found.headers["connection"] == "close"
    assert json.loads(found.body)


@pytest.mark.parametrize(
    "header",
    [
        b"x-session-id: \xff",
        b"x_session_id: \xff",
        b"X-Session_Id: \xff",
        b"serve-multiplexed-model-id: \xff",
        b"serve_multiplexed-model_id: \xff",
        b"x-request-id: ok,\xff",
        b"x-request-id: \xff",
        b"x-request-timeout-seconds: \xff",
        b"x-request-timeout-seconds: 0.000001",
        b"x_request_timeout_seconds: 0.000001",
        b"x-request-disconnect-disabled: \xff",
    ],
)
def test_no_header_steers_ray_or_makes_it_fail(fake_cluster: RunningCluster, port: int | None, header: bytes) -> None:
    found = ask(fake_cluster, get(b"/v1/models", header + b"\r\n"), port)
    assert (found.status, code(found)) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "header", [b"x-request-id: ok, " + b"evil " * 1000, b"x-request-id: one\r\nx-request-id: two", b"x-request-id: a b"]
)
def test_an_answer_has_one_id_which_is_the_gateways(
    fake_cluster: RunningCluster, port: int | None, header: bytes
) -> None:
    found = ask(fake_cluster, get(b"/v1/models", AUTH + header + b"\r\n"), port)
    assert found.status == 200
    assert UUID.fullmatch(found.headers["x-request-id"])


def test_of_two_keys_none_is_taken(fake_cluster: RunningCluster, port: int | None) -> None:
    for headers in (AUTH + AUTH, AUTH + b"authorization: Bearer x\r\n", b"authorization: Bearer x\r\n" + AUTH):
        found = ask(fake_cluster, get(b"/v1/models", headers), port)
        assert (found.status, code(found)) == (401, "invalid_api_key")
        assert "more than one" in json.loads(found.body)["error"]["message"]


@pytest.mark.parametrize("path", [b"/-/routes", b"/-/%72outes", b"/%2d/routes", b"/-/Routes"])
def test_rays_own_pages_answer_nobody(fake_cluster: RunningCluster, port: int | None, path: bytes) -> None:
    found = ask(fake_cluster, get(path), port)
    assert (found.status, code(found)) == (404, "not_found")


def test_more_headers_than_there_may_be_are_told_so(fake_cluster: RunningCluster) -> None:
    for count in (65, 101, 300):
        found = ask(fake_cluster, get(b"/v1/models", b"".join(b"x-%d: 1\r\n" % i for i in range(count))))
        assert (found.status, code(found)) == (431, "headers_too_large")


def test_an_idle_connection_is_kept_as_long_as_was_chosen(fake_cluster: RunningCluster) -> None:
    (configured,) = {
        words[words.index("-f") + 1]
        for words in (process.cmdline() for process in fake_cluster.processes() if process.name() == "haproxy")
    }
    # Of two lines the last would count.
    found = re.findall(r"timeout http-keep-alive (\S+)", Path(configured).read_text())
    assert found == [f"{Timers().keep_alive_s}s"]


def test_ray_writes_no_line_a_request(fake_cluster: RunningCluster) -> None:
    def often(_: int) -> None:
        with connect(fake_cluster) as connection:
            for _ in range(LOGGED_REQUESTS // 8):
                connection.sendall(b"GET /v1/logged-nowhere HTTP/1.1\r\nhost: x\r\n\r\n")
                found = b""
                while not found.endswith(b"}}"):
                    found += connection.recv(65536)
                assert answer(found).status == 401

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(often, range(8)))
    logs = list(ray_directory(fake_cluster).rglob("serve/*.log"))
    assert any("gateway" in log.name for log in logs)
    assert [log for log in logs if b"logged-nowhere" in log.read_bytes()] == []


def ray_directory(cluster: RunningCluster) -> Path:
    return state.state_dir(urlsplit(cluster.url).port or 0) / RAY_DIR


def entered(path: Path) -> bool:
    """Whether another user of this machine can come as far as this: every directory on the way lets others through."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)


def used(process: psutil.Process) -> set[Path]:
    """Files and sockets that a process has open now."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        files = {Path(file.path) for file in process.open_files()}
        return files | {Path(c.laddr) for c in process.net_connections(kind="unix") if str(c.laddr).startswith("/")}
    return set()


def test_nothing_of_the_cluster_is_open_to_other_users(fake_cluster: RunningCluster) -> None:
    ray = ray_directory(fake_cluster)
    for private in (ray.parent, ray.parent.parent):
        assert stat.S_IMODE(private.lstat().st_mode) == 0o700
    sockets = ray / "session_latest" / "sockets"
    # Ray's own directories let everybody in; that they cannot be reached is what holds. Its sockets let nobody in.
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in sockets.iterdir()} == {0o700}
    open_now = set().union(*map(used, fake_cluster.processes()))
    assert sockets.resolve() / "raylet" in open_now
    temporary = (Path("/tmp"), Path("/dev/shm"), Path(tempfile.gettempdir()))
    exposed = {
        path
        for path in open_now
        if any(path.is_relative_to(root) for root in temporary)
        if path.exists() and entered(path) and path.stat().st_mode & 0o077
    }
    assert exposed == set()
