"""HAProxy as Ray starts it, killed and left alone: who listens, what streams notice, what Ray reads at its socket.

The program and HAProxy are real; a few lines stand for Ray's actor and its node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from serving.cluster.haproxy import EdgeLimits
from serving.cluster.haproxy_keeper import Kept, ask, divided, running, without_takeover

CONFIG = """global
    stats socket {socket} mode 666 level admin expose-fd listeners
    maxconn 100
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend http_frontend
    bind *:{port}
    acl is_engines path_beg /
    use_backend engines if is_engines
    default_backend nowhere
backend nowhere
    http-request return status 404
backend engines
    server one 127.0.0.1:{backend}
"""
# Ray's node starts its actor, and the actor HAProxy; the node tells the actor's and HAProxy's ids.
ACTOR = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(600)"
NODE = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(600)"
WAIT_S = 20.0


class Stream:
    """A backend whose answers begin at once and end when they are told to."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.begun = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\nconnection: close\r\n\r\nbegun")
            self.begun.release()
            self.end.wait(60)
            connection.sendall(b"end")

    def close(self) -> None:
        self.end.set()
        self._listener.close()


@dataclass
class Door:
    """A directory as Ray makes it, and the program that it starts."""

    directory: Path
    port: int
    stream: Stream
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    clients: list[socket.socket] = field(default_factory=list)

    @property
    def asked(self) -> Path:
        return self.directory / "admin.sock"

    @property
    def config(self) -> Path:
        return self.directory / "haproxy.cfg"

    @property
    def haproxy(self) -> int:
        kept = Kept.read(self.directory / "kept")
        assert kept is not None
        return kept.haproxy

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "serving.cluster.haproxy", "-db", "-f", str(self.config)]

    def start(self, *extra: str) -> int:
        """As Ray does: the program's id, once it answers for it at the socket."""
        process = subprocess.Popen([*self.command, *extra], text=True, env=environment())
        self.started.append(process)
        until(lambda: running(self.asked) == process.pid)
        return process.pid

    def start_below(self) -> tuple[psutil.Process, psutil.Process, int]:
        """Ray's node and actor, and the program's id."""
        nested = [sys.executable, "-c", NODE, sys.executable, "-c", ACTOR, *self.command]
        node = subprocess.Popen(nested, text=True, stdout=subprocess.PIPE, env=environment())
        self.started.append(node)
        assert node.stdout is not None
        told = {int(node.stdout.readline()), int(node.stdout.readline())}
        actor = next(p for p in psutil.Process(node.pid).children())
        (keeper,) = told - {actor.pid}
        until(lambda: running(self.asked) == keeper)
        return psutil.Process(node.pid), actor, keeper

    def begin(self) -> socket.socket:
        """A client whose answer has begun."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        self.clients.append(client)
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert self.stream.begun.acquire(timeout=WAIT_S)
        return client

    def opens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


def environment() -> dict[str, str]:
    return os.environ | EdgeLimits("127.0.0.1", 8192, 1_000_000, 100).environment()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)


def rest(client: socket.socket) -> bytes:
    """What still comes, up to the connection's end."""
    found = b""
    with client:
        while part := client.recv(65536):
            found += part
    return found


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    stream = Stream()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    made = Door(tmp_path_factory.mktemp("h"), port, stream)
    config = CONFIG.format(socket=made.asked, port=port, backend=stream.port)
    made.config.write_text(config)
    yield made
    stream.close()
    for client in made.clients:
        client.close()
    for process in made.started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for below in psutil.Process(process.pid).children(recursive=True):
                below.kill()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(made.directory) in word for word in process.cmdline()):
                process.kill()


def test_a_killed_haproxy_is_back_and_ray_does_not_notice(door: Door) -> None:
    keeper = door.start()
    client = door.begin()
    for _ in range(2):
        before = door.haproxy
        os.kill(before, signal.SIGKILL)
        # Asked while it is away, too.
        assert running(door.asked) == keeper
        until(lambda before=before: door.haproxy != before and door.opens())
    # Its answer has broken off, and the client can see that: three bytes are missing.
    with contextlib.suppress(ConnectionResetError):
        assert not rest(client).endswith(b"end")
    door.stream.end.set()
    assert rest(door.begin()).endswith(b"begunend")


def test_a_haproxy_that_is_told_to_end_ends_with_its_streams(door: Door) -> None:
    door.start()
    client = door.begin()
    os.kill(door.haproxy, signal.SIGUSR1)
    until(lambda: not door.opens())
    door.stream.end.set()
    assert rest(client).endswith(b"begunend")
    assert door.started[0].wait(WAIT_S) == 0
    assert not door.opens()


def test_haproxys_socket_asks_for_its_user(door: Door) -> None:
    door.start()
    for name in ("admin.sock", "own.sock"):
        assert (door.directory / name).stat().st_mode & 0o777 == 0o600
    assert b"http_frontend" in ask(door.asked, b"show stat\n")


def test_a_reload_hands_over_and_the_former_one_ends_with_its_streams(door: Door) -> None:
    first = door.start()
    client, old = door.begin(), door.haproxy
    second = door.start("-sf", str(first), "-x", str(door.asked))
    assert second != first
    assert door.haproxy != old
    assert not ended(old)
    door.stream.end.set()
    assert rest(client).endswith(b"begunend")
    assert door.started[0].wait(WAIT_S) == 0
    assert ended(old)
    assert running(door.asked) == second
    # Of two generations, only the one that serves is started again.
    os.kill(door.haproxy, signal.SIGKILL)
    until(door.opens)


def test_the_actors_death_ends_nothing_and_its_successor_takes_over(door: Door) -> None:
    _, actor, keeper = door.start_below()
    client, old = door.begin(), door.haproxy
    actor.kill()
    until(lambda: ended(actor.pid))
    assert door.opens()
    # As the successor starts it: it knows of none before it, and of no gateway yet.
    full = door.config.read_text()
    door.config.write_text(full.replace("use_backend engines if is_engines", ""))
    second = door.start()
    assert door.haproxy != old
    assert not ended(old)
    door.stream.end.set()
    assert rest(client).endswith(b"begunend")
    until(lambda: ended(old) and ended(keeper))
    assert running(door.asked) == second
    assert rest(door.begin()).endswith(b"begunend")
    # Nor does it at its first reload.
    third = door.start("-sf", str(second), "-x", str(door.asked))
    assert rest(door.begin()).endswith(b"begunend")
    # A gateway elsewhere is another matter.
    door.config.write_text(full.replace("server one", "server two"))
    door.start("-sf", str(third), "-x", str(door.asked))
    assert b"engines,two," in ask(door.asked, b"show stat\n")


def test_the_keepers_death_ends_nothing_and_its_successor_takes_over(door: Door) -> None:
    keeper = door.start()
    client, old = door.begin(), door.haproxy
    os.kill(keeper, signal.SIGKILL)
    door.started[0].wait(WAIT_S)
    assert door.opens()
    door.start()
    assert door.haproxy != old
    door.stream.end.set()
    assert rest(client).endswith(b"begunend")
    until(lambda: ended(old))


def test_one_that_no_record_names_is_taken_over_too(door: Door) -> None:
    keeper = door.start()
    old = door.haproxy
    # As after a start that Ray gave up while HAProxy was about to serve.
    os.kill(keeper, signal.SIGKILL)
    door.started[0].wait(WAIT_S)
    (door.directory / "kept").unlink()
    door.start()
    until(lambda: ended(old))
    assert door.opens()


def test_haproxy_goes_with_rays_node(door: Door) -> None:
    node, actor, keeper = door.start_below()
    haproxy = door.haproxy
    node.kill()
    actor.kill()
    until(lambda: ended(haproxy) and ended(keeper))
    assert not door.opens()


def test_a_successor_ends_one_that_is_stopped(door: Door) -> None:
    first = door.start()
    before = door.haproxy
    os.kill(first, signal.SIGKILL)
    door.started[0].wait(WAIT_S)
    os.kill(before, signal.SIGSTOP)
    door.start()
    # It would go on taking connections beside its successor.
    assert ended(before)


def test_a_configuration_that_haproxy_refuses_ends_the_program(door: Door) -> None:
    door.config.write_text(door.config.read_text() + "nonsense\n")
    done = subprocess.run(door.command, check=False, capture_output=True, text=True, timeout=WAIT_S, env=environment())
    assert done.returncode == 1
    assert "[ALERT]" in done.stderr


def test_the_words_of_a_takeover_are_taken_out() -> None:
    assert without_takeover(["haproxy", "-db", "-f", "c", "-sf", "12", "13", "-x", "/s", "-dR"]) == (
        ["haproxy", "-db", "-f", "c", "-dR"],
        [12, 13],
    )
    text, asked = divided("global\n    stats socket /a/admin.sock mode 600 level admin expose-fd listeners\n")
    assert asked == Path("/a/admin.sock")
    assert text == "global\n    stats socket /a/own.sock mode 600 level admin expose-fd listeners\n"
    with pytest.raises(ValueError, match="no stats socket"):
        divided("global\n")
