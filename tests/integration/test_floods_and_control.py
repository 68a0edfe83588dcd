"""Floods at the real front, and Ray's control plane behind it: what no in-process test can show.

Timings decide nothing here: a slow request must end at some time with the right answer, and memory is held against
what the flood would have cost if it were kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from serving.cluster.haproxy import Timers
from tests.integration.running import KEY, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

AUTH = {"authorization": f"Bearer {KEY}"}
CHAT_BODY = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
MIB = 1024 * 1024
SLOW_CLIENTS = 100
END_WAIT_S = 60


def connected(cluster: RunningCluster) -> socket.socket:
    address = urlsplit(cluster.url)
    made = socket.create_connection((address.hostname or "", address.port or 0), timeout=END_WAIT_S)
    made.settimeout(END_WAIT_S)
    return made


def answered(connection: socket.socket) -> bytes:
    """One whole answer, or what came of it before the other side closed.

    An answer to a request that has not ended may be followed by nothing for as long as the client could still send.
    """
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
            head, end, body = found.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            if end and length is not None and len(body) >= int(length[1]):
                break
    return found


def front_bytes(cluster: RunningCluster) -> int:
    """Resident memory of HAProxy, which is another process after each reload, and of the gateways."""
    gateways = set(cluster.state()["pids"]["gateway"])
    found = 0
    for process in cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid in gateways or process.name() == "haproxy":
                found += process.memory_info().rss
    assert found > 32 * MIB
    return found


def still_serves(cluster: RunningCluster) -> bool:
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=CHAT_BODY, headers=AUTH, timeout=60).status_code == 200


def test_headers_that_never_end_are_answered_408_while_others_are_served(fake_cluster: RunningCluster) -> None:
    connections = [connected(fake_cluster) for _ in range(SLOW_CLIENTS)]
    for connection in connections:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-slow: ")
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.5):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(b"a")

    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    try:
        assert still_serves(fake_cluster)
        began_s = time.monotonic()
        for connection in connections:
            found = answered(connection)
            assert found.startswith(b"HTTP/1.1 408 "), found[:100]
            assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        # A byte now and then buys no time: all of them ended with the first bound.
        assert time.monotonic() - began_s < END_WAIT_S + Timers().headers_s
    finally:
        stop.set()
        dripping.join()
        for connection in connections:
            connection.close()
    assert still_serves(fake_cluster)


def test_floods_of_headers_are_refused_and_not_kept(fake_cluster: RunningCluster) -> None:
    def many(_: int) -> bytes:
        return flood(b"".join(b"x-%d: %b\r\n" % (i, b"a" * 40) for i in range(80)))

    def long(_: int) -> bytes:
        return flood(b"x-long: " + b"a" * 9000 + b"\r\n")

    def huge(_: int) -> bytes:
        return flood(b"".join(b"x-%d: %b\r\n" % (i, b"a" * 8000) for i in range(2000)))

    def flood(headers: bytes) -> bytes:
        with connected(fake_cluster) as connection:
            start = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer %b\r\n"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(start % KEY.encode() + headers + b"\r\n")
            return answered(connection)

    assert still_serves(fake_cluster)
    before = front_bytes(fake_cluster)
    with ThreadPoolExecutor(16) as threads:
        for made, statuses in ((many, {b"431"}), (long, {b"431"}), (huge, {b"400", b"431", b""})):
            found = list(threads.map(made, range(100)))
            # Where the rest of a flood is still on its way, the reset may overtake the answer.
            assert {text[9:12] for text in found} <= statuses, made.__name__
    # 100 floods of 16 MB would be 1.6 GB.
    assert front_bytes(fake_cluster) - before < 64 * MIB
    assert still_serves(fake_cluster)


def test_floods_of_bodies_are_refused_by_their_length_and_by_their_bytes(fake_cluster: RunningCluster) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer %b\r\n"
        % KEY.encode()
    )

    def declared(_: int) -> bytes:
        with connected(fake_cluster) as connection:
            connection.sendall(head + b"content-length: 1000000000\r\n\r\n")
            return answered(connection)

    def chunked(_: int) -> bytes:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with connected(fake_cluster) as connection:
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(400):
                    connection.sendall(chunk)
            return answered(connection)

    assert still_serves(fake_cluster)
    before = front_bytes(fake_cluster)
    with ThreadPoolExecutor(8) as threads:
        assert {text[9:12] for text in threads.map(declared, range(50))} == {b"413"}
        assert {text[9:12] for text in threads.map(chunked, range(24))} <= {b"413", b""}
    # 24 bodies of 26 MB would be 630 MB; eight at once may have come as far as the limit of 4 MiB.
    assert front_bytes(fake_cluster) - before < 96 * MIB
    assert still_serves(fake_cluster)


JOB = {"entrypoint": "true", "submission_id": "from-nobody"}


def test_no_port_of_the_cluster_takes_a_job_from_somebody_without_a_token(fake_cluster: RunningCluster) -> None:
    ports = set()
    for process in fake_cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            ports |= {
                connection.laddr.port
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            }
    assert len(ports) > 5
    spoke = {}
    for port in sorted(ports):
        for path in (
            "/api/jobs/",
            "/api/job_agent/jobs/",
            "/api/version",
            "/api/cluster_status",
            "/nodes?view=summary",
        ):
            method = "POST" if "jobs" in path else "GET"
            try:
                answer = httpx.request(method, f"http://127.0.0.1:{port}{path}", json=JOB, timeout=10)
            except httpx.TransportError:
                continue  # gRPC, or nothing that speaks HTTP to strangers
            spoke[port, path] = answer.status_code
    assert spoke, "no port speaks HTTP: that is no list of ports"
    # Exporters answer every path of a GET with their metrics; nobody takes a job.
    assert {key: status for key, status in spoke.items() if "jobs" in key[1] and status < 400} == {}


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


CONTROL = """
import sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
print("in", len(client.get_all_node_info(timeout=10)))
"""


def test_rays_control_store_asks_for_the_token(fake_cluster: RunningCluster) -> None:
    (store,) = [p for p in fake_cluster.processes() if _alive(p) and p.name() == "gcs_server"]
    arguments = dict(a.removeprefix("--").split("=", 1) for a in store.cmdline() if a.startswith("--") and "=" in a)
    listening = {c.laddr.port for c in store.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
    port = int(arguments.get("gcs_server_port", 0)) or min(listening)
    assert port in listening
    token = store.environ()["RAY_AUTH_TOKEN"]

    def ask(**environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.run(
            [sys.executable, "-c", CONTROL, f"127.0.0.1:{port}"],
            env=clean | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    known = ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert known.stdout.startswith("in 1"), known.stderr[-2000:]
    for stranger in (ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64), ask(RAY_AUTH_MODE="disabled")):
        assert stranger.returncode != 0
        assert "in " not in stranger.stdout
        assert "nauthenticated" in stranger.stderr or "UNAUTHENTICATED" in stranger.stderr, stranger.stderr[-2000:]


DASHBOARD = """
import json, os, sys, time
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
import ray
context = ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False, logging_level="ERROR")
print(json.dumps({"url": context.dashboard_url}), flush=True)
sys.stdin.read()
"""


def test_with_a_dashboard_a_job_without_the_token_is_refused(tmp_path: Path) -> None:
    """As in the chart: Ray's head has a dashboard there, and KubeRay submits through it."""
    process = subprocess.Popen(
        [sys.executable, "-c", DASHBOARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = f"http://{json.loads(line)['url']}"
        made = tmp_path / "made"
        job = {"entrypoint": f"touch {made}"}
        assert _status(lambda: httpx.post(f"{url}/api/jobs/", json=job, timeout=30)) in {401, 403}
        for header in ({"authorization": "Bearer " + "b" * 64}, {"x-ray-authorization": "Bearer x"}, {"host": "a?b"}):
            assert _status(lambda h=header: httpx.post(f"{url}/api/jobs/", json=job, headers=h, timeout=30)) in {
                401,
                403,
            }
        token = {"authorization": "Bearer " + "a" * 64}
        assert _status(lambda: httpx.get(f"{url}/api/jobs/", headers=token, timeout=30)) == 200
        assert not made.exists()
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def _status(ask: Callable[[], httpx.Response]) -> int:
    """Its status, when the dashboard has come up."""
    deadline_s = time.monotonic() + END_WAIT_S
    while True:
        try:
            return ask().status_code
        except httpx.TransportError:
            assert time.monotonic() < deadline_s, "the dashboard never came up"
            time.sleep(0.3)
