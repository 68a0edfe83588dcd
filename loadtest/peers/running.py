"""A peer while it runs: started in a folder of its own, ready, and ended with all its processes."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from loadtest.errors import LoadtestError
from loadtest.peers.peer import PORTS, Engine, Launch, Peer
from loadtest.request import ENGINE_TOKEN_HEADER, Target

STOP_TIMEOUT_S = 10.0
_POLL_S = 0.2
_SHOWN_LOG_LINES = 10
_OK = 200
# Below the ports that Linux gives to outgoing connections: what is free stays free until the peer takes it.
_FIRST_PORT, _LAST_PORT = 18300, 29900
# Short: sockets of peers lie below the folder, and a socket's path has 107 characters.
_FOLDER_PREFIX = "galerne-"
# Names that a peer needs of our environment; the rest, keys among it, stays with us.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")


@contextmanager
def started(peer: Peer, programs: Path, engine: Engine) -> Iterator[tuple[Target, int, Launch]]:
    """The peer's target, its process's id (the group's, too) and how it was started.

    Raises LoadtestError with the end of its log where it does not start.
    """
    port = _free_ports()
    launch = peer.launch(engine, port)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    log = folder / "log"
    # Configuration may hold the engine's token.
    folder.chmod(0o700)
    for name, text in launch.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name in _KEPT}
    env["PATH"] = f"{programs}{os.pathsep}{env.get('PATH', '')}"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # a catalogue's words, a program that was installed for it
            [str(programs / launch.argv[0]), *launch.argv[1:]],
            cwd=folder,
            env={**env, **launch.env},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        target = Target(
            peer.name, "127.0.0.1", port, key=launch.key, engine_token=engine.token if launch.passes_token else None
        )
        _wait_ready(peer, launch, target, process, folder, log)
        yield target, process.pid, launch
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(
    peer: Peer, launch: Launch, target: Target, process: subprocess.Popen[bytes], folder: Path, log: Path
) -> None:
    deadline_s = time.monotonic() + launch.start_timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise LoadtestError(f"{peer.name} ended with code {process.returncode}:\n{_tail(log)}")
        up = launch.ready_file is None or (folder / launch.ready_file).exists()
        if up and _answers(launch, target):
            return
        time.sleep(_POLL_S)
    raise LoadtestError(f"{peer.name} was not ready after {launch.start_timeout_s:g} s:\n{_tail(log)}")


def _answers(launch: Launch, target: Target) -> bool:
    connection = http.client.HTTPConnection(target.host, target.port, timeout=2.0)
    try:
        headers = {} if target.engine_token is None else {ENGINE_TOKEN_HEADER: target.engine_token}
        connection.request("GET", launch.ready_path, headers=headers)
        return connection.getresponse().status == _OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LOG_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asked, then made to, with every process that it caused: workers, and daemons in sessions of their own."""
    caused = _below(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        caused |= _below(process.pid)
        time.sleep(_POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while left := {one for one in caused if _runs(one)}:
        for one in left:
            caused |= _below(one.pid)
            with suppress(psutil.NoSuchProcess):
                one.kill()
        time.sleep(_POLL_S)


def _below(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _runs(process: psutil.Process) -> bool:
    """Whether it is this very process, not another with its number, and not a zombie that nobody waits for."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _free_ports() -> int:
    """The first of `PORTS` ports in a row of which each is free: for metrics, and for what a peer listens on within."""
    for first in range(_FIRST_PORT, _LAST_PORT, PORTS):
        if all(_is_free(port) for port in range(first, first + PORTS)):
            return first
    raise LoadtestError(f"no {PORTS} free ports in a row between {_FIRST_PORT} and {_LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A connection of a former peer that still lingers does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
