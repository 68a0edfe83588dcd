"""The real front (HAProxy, gateway, Ray Serve) with simulated engines: what no in-process test can show."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from openai import OpenAI

from serving.cluster.haproxy import TCP_IDLE_S
from tests.integration.conftest import CONFIGS, FAKE_START_TIMEOUT_S, WITH_PROMETHEUS
from tests.integration.running import GALERNE, KEY, OTHER_KEY, RunningCluster, metric, stop
from tests.tcp_timers import keep_alive_due_s

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

FRONT_SEEN_S = 30.0
GATEWAY_RSS_BOUND_BYTES = 250 * 1024 * 1024
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
AUTH = {"authorization": f"Bearer {KEY}"}
CHAT_BODY = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def test_every_listening_socket_is_loopback_only(fake_cluster: RunningCluster) -> None:
    # HAProxy's reload hands its sockets from one process to the next, and a walk over the processes
    # can pass between the two: what any walk saw counts, and walks go on until the front was seen.
    listening: set[tuple[str, str, int]] = set()
    deadline_s = time.monotonic() + FRONT_SEEN_S
    while not any(port == 18100 for _, _, port in listening):
        assert time.monotonic() < deadline_s, f"nobody listens on the front's port: {sorted(listening)}"
        listening |= fake_cluster.listening()
    if address := fake_cluster.state()["prometheus_url"]:
        port = urlsplit(address).port
        assert [(name, ip) for name, ip, number in listening if number == port] == [("prometheus", "127.0.0.1")]
    assert {row for row in listening if row[1] not in LOOPBACK} == set()


def test_other_interfaces_refuse(fake_cluster: RunningCluster) -> None:
    others = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }
    if not others:
        pytest.skip("this machine has no interface but loopback")
    for host in others:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, 18100), timeout=2).close()


def test_a_client_that_hears_nothing_for_long_is_kept_connected(fake_cluster: RunningCluster) -> None:
    front = urlsplit(fake_cluster.url)
    with socket.create_connection((front.hostname, front.port), timeout=10) as client:
        # A load balancer between the two would forget it after four minutes without a packet.
        client.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1024)
        assert 0 < keep_alive_due_s(int(front.port or 0), client.getsockname()[1]) <= TCP_IDLE_S


def test_gateway_is_light(fake_cluster: RunningCluster) -> None:
    (pid,) = fake_cluster.state()["pids"]["gateway"]
    process = psutil.Process(pid)
    assert process.memory_info().rss < GATEWAY_RSS_BOUND_BYTES
    mapped = " ".join(m.path for m in process.memory_maps())
    assert "/torch/" not in mapped
    assert "/vllm/" not in mapped


def test_gateway_imports_neither_torch_nor_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import deployments.gateway"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "serving" in imported
    assert not imported & {"torch", "vllm", "transformers"}


def test_both_replicas_are_used_and_counted(fake_cluster: RunningCluster) -> None:
    def ask(_: int) -> int:
        return httpx.post(f"{fake_cluster.url}/v1/chat/completions", json=CHAT_BODY, headers=AUTH).status_code

    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(ask, range(64))) == {200}
    done = [fake_cluster.engine_metric("chat", "vllm:request_success_total", index) for index in range(2)]
    assert min(done) > 8, done
    port = fake_cluster.state()["gateways"][0]["metrics_port"]
    url = f"http://127.0.0.1:{port}/metrics"
    accepted = metric(url, "galerne_requests_accepted_total", model="chat")
    assert accepted == metric(url, "galerne_requests_finished_total", model="chat")
    assert metric(url, "galerne_requests_in_flight", model="chat") == 0
    assert metric(url, "galerne_replicas_ready", model="chat") == 2


def test_every_kind_of_metrics_is_scrapeable(fake_cluster: RunningCluster) -> None:
    targets = json.loads((fake_cluster.ready_file.parent / "ready.json").read_text())
    assert targets["haproxy_metrics_port"]
    listed = subprocess.run(
        [GALERNE, "status", "--port", "18100", "--json"], capture_output=True, text=True, check=True
    )
    assert {row["model"] for row in json.loads(listed.stdout)["replicas"]} == {
        "chat",
        "vectors",
        "smollm2-135m-instruct",
    }
    up = metric(f"http://127.0.0.1:{targets['haproxy_metrics_port']}/metrics", "haproxy_process_nbthread")
    assert up >= 1


def test_metrics_are_not_for_clients(fake_cluster: RunningCluster) -> None:
    for path in ("/metrics", "/-/routes", "/docs", "/openapi.json", "/v1/load_lora_adapter", "/pause"):
        answer = httpx.get(f"{fake_cluster.url}{path}", headers=AUTH)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "not_found"


def test_the_engines_port_asks_for_its_token(fake_cluster: RunningCluster) -> None:
    url = fake_cluster.engine_url("chat")
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT_BODY).status_code == 403
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT_BODY, headers=AUTH).status_code == 403
    direct = httpx.post(f"{url}/v1/chat/completions", json=CHAT_BODY, headers=fake_cluster.engine_headers())
    assert direct.status_code == 200


def test_edge_refuses_before_the_gateway(fake_cluster: RunningCluster) -> None:
    large = httpx.post(f"{fake_cluster.url}/v1/chat/completions", content=b"x" * (5 << 20), headers=AUTH)
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "request_too_large"
    long = httpx.get(f"{fake_cluster.url}/v1/models", headers=AUTH | {"x-padding": "a" * 9000})
    assert long.status_code == 431
    assert long.json()["error"]["code"] == "headers_too_large"


def test_request_id_goes_in_and_out_once(fake_cluster: RunningCluster) -> None:
    answer = httpx.get(f"{fake_cluster.url}/v1/models", headers=AUTH | {"x-request-id": "my-id-1"})
    assert answer.headers.get_list("x-request-id") == ["my-id-1"]
    odd = httpx.get(f"{fake_cluster.url}/v1/models", headers=AUTH | {"x-request-id": "a b<c>"})
    assert odd.headers["x-request-id"] != "a b<c>"
    assert "server" not in answer.headers


def test_a_client_cannot_steer_ray(fake_cluster: RunningCluster) -> None:
    steering = {"x-request-timeout-seconds": "0.000001", "serve_multiplexed_model_id": "x"}
    answer = httpx.post(f"{fake_cluster.url}/v1/chat/completions", json=CHAT_BODY, headers=AUTH | steering)
    assert answer.status_code == 200


def test_tenants_are_apart(fake_cluster: RunningCluster) -> None:
    other = {"authorization": f"Bearer {OTHER_KEY}"}
    refused = httpx.post(f"{fake_cluster.url}/v1/chat/completions", json=CHAT_BODY, headers=other)
    assert refused.status_code == 404
    assert "vectors" in refused.json()["error"]["message"]
    unknown = httpx.post(
        f"{fake_cluster.url}/v1/chat/completions", json=CHAT_BODY | {"model": "nothing"}, headers=other
    )
    assert unknown.json()["error"]["message"].replace("nothing", "chat") == refused.json()["error"]["message"]


# Last in this file: it takes a replica away from the others.
def test_zz_a_killed_replica_is_replaced_and_its_stream_ends_with_an_error_event(
    fake_cluster: RunningCluster,
) -> None:
    engines = fake_cluster.state()["engines"]["vectors"]
    assert len(engines) == 1
    with OpenAI(base_url=f"{fake_cluster.url}/v1", api_key=KEY, max_retries=0) as client:
        long = {
            "model": "chat",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4000,
            "ignore_eos": True,
        }
        with httpx.stream(
            "POST", f"{fake_cluster.url}/v1/chat/completions", json=long | {"stream": True}, headers=AUTH, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            busy = max(range(2), key=lambda i: fake_cluster.engine_metric("chat", "vllm:num_requests_running", i))
            os.kill(fake_cluster.state()["engines"]["chat"][busy]["pid"], signal.SIGKILL)
            rest = [line for line in lines if line]
        event = json.loads(rest[-1].removeprefix("data: "))
        assert event["error"]["code"] == "stream_cut"
        # The other replica goes on answering; the dead one is passed over.
        for _ in range(20):
            assert client.chat.completions.create(**CHAT_BODY).choices  # type: ignore[call-overload]
        deadline_s = time.monotonic() + 120
        while len(fake_cluster.state()["engines"]["chat"]) < 2:
            assert time.monotonic() < deadline_s, "the killed replica was not replaced"
            time.sleep(0.5)


def _asked(proxy: socket.socket) -> list[bytes]:
    """What the clients of a listener have sent that nobody accepted until now."""
    proxy.setblocking(False)
    asked = []
    with proxy, contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(300))
    return asked


def test_loading_model_answers_503_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    slow = tmp_path / "slow.yaml"
    text = (CONFIGS / "fake.yaml").read_text().replace("18100", "18300").replace("19400", "19600")
    # The vectors model never becomes ready in the time of this test, and nobody waits long for it.
    never = "task: embed\n    fake: {faults: {slow_start_s: 600}}\n    hold: {wait_s: 1}\n"
    slow.write_text(text.replace("task: embed\n", never))
    log = tmp_path / "serve.log"
    # A proxy of the environment is for what leaves the machine: whoever connects to this one is not answered.
    proxy = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    proxies = {name: address for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())}
    outside = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [GALERNE, "serve", slow, *WITH_PROMETHEUS],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=outside | proxies,
        )
    try:
        url = "http://127.0.0.1:18300"
        deadline_s = time.monotonic() + FAKE_START_TIMEOUT_S
        while True:
            assert time.monotonic() < deadline_s, log.read_text()
            assert process.poll() is None, log.read_text()
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": "vectors", "input": "x"}, headers=AUTH)
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "model_not_ready"
        caused = psutil.Process(process.pid).children(recursive=True)
        assert len(caused) > 5
        assert [p.name() for p in caused].count("prometheus") == len(WITH_PROMETHEUS)
    finally:
        status = stop(process)
    assert status == 0, log.read_text()
    assert _asked(proxy) == []
    left = [p for p in caused if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    for port in (18300, 19600):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=2).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: []\n", "models"),
        ("modles: 1\n", "did you mean"),
        ("models: [\n", "not valid YAML"),
    ],
)
def test_a_configuration_error_stops_the_start_with_one_message(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    done = subprocess.run([GALERNE, "serve", config], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "bad.yaml" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_refused_before_anything_starts(fake_cluster: RunningCluster) -> None:
    done = subprocess.run(
        [GALERNE, "serve", CONFIGS / "fake.yaml"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "18100" in done.stderr
    assert "taken" in done.stderr
