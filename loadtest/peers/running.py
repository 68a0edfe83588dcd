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

from loadtest.errors import LoadtestError
from loadtest.peers.peer import Engine, Launch, Peer
from loadtest.request import ENGINE_TOKEN_HEADER, Target

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.2
_SHOWN_LOG_LINES = 10
_OK = 200
# Names that a peer needs of our environment; the rest, keys among it, stays with us.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")


@contextmanager
def started(peer: Peer, programs: Path, engine: Engine) -> Iterator[tuple[Target, int, Launch]]:
    """The peer's target, its process's id (the group's, too) and how it was started.

    Raises LoadtestError with the end of its log where it does not start.
    """
    port = _two_free_ports()
    launch = peer.launch(engine, port)
    folder = Path(tempfile.mkdtemp(prefix=f"galerne-{peer.name}-"))
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
        _wait_ready(peer, launch, target, process, log)
        yield target, process.pid, launch
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(peer: Peer, launch: Launch, target: Target, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise LoadtestError(f"{peer.name} ended with code {process.returncode}:\n{_tail(log)}")
        if _answers(launch, target):
            return
        time.sleep(_POLL_S)
    raise LoadtestError(f"{peer.name} was not ready after {START_TIMEOUT_S:g} s:\n{_tail(log)}")


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
    """Asked, then made to: the whole group, for a peer's workers are processes of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _two_free_ports() -> int:
    """A free port whose next one is free too, for metrics."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
