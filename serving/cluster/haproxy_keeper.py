"""The process that Ray starts in HAProxy's place and takes for it: it starts HAProxy, and keeps it.

Promises: a HAProxy that is killed, or answers nobody any more, is started again at once with the same configuration,
and Ray does not notice. The death of Ray's actor ends no connection: HAProxy goes on, and the actor's successor takes
its listeners over. When Ray's node is gone, HAProxy goes too.

Ray knows this process's id and looks for it at the admin socket, so that socket is ours: what is asked there is handed
to HAProxy's own socket beside it, and HAProxy's id in the answer is replaced by this one. Of several generations, which
reloads leave behind until their streams have ended, each has a keeper of its own.

Only the standard library is imported: this runs at every reload.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from serving.cluster.processes import die_with_parent

# Beside Ray's socket. Not longer than Ray's name for its own: a socket's path ends at 97 characters.
OWN_SOCKET = "own.sock"
RECORD = "kept"
# HAProxy's option: take over from these processes.
TAKES_OVER = "-sf"
SOCKET_LINE = re.compile(r"(?m)^(\s*stats socket )(\S+)")
PID_LINE = re.compile(rb"(?m)^Pid: \d+$")
READY_POLL_S = 0.02
# A connection to HAProxy's socket, and an answer: HAProxy gives one in a millisecond.
ANSWER_S = 5.0
# Whoever asks while HAProxy is being started again waits so long.
RESTART_WAIT_S = 3.0
COMMAND_BYTES = 65536
# HAProxy is asked so often whether it answers. One that is stopped or hangs is ended after so many questions in vain;
# late enough for a machine that does something else for seconds, because every stream is lost with it.
PROBE_S = 2.0
PROBES = 3
NODE_POLL_S = 0.2
# What still runs when Ray's node has gone: longer than `galerne serve` leaves to answers under way, in that case.
GONE_S = 30.0
# HAProxy that ends so often in so short a time will not stay: then Ray decides.
MOST_STARTS, STARTS_WITHIN_S = 5, 10.0
SIGNALLED = 128


@dataclass(frozen=True, slots=True)
class Kept:
    """Who serves: a keeper and its HAProxy."""

    keeper: int
    haproxy: int

    @classmethod
    def read(cls, path: Path) -> Kept | None:
        """None where nobody has served yet."""
        try:
            keeper, haproxy = path.read_text().split()
            return cls(int(keeper), int(haproxy))
        except (OSError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Replace it in one step."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(f"{self.keeper} {self.haproxy}")
        temporary.replace(path)


def divided(config: str) -> tuple[str, Path]:
    """The configuration with HAProxy's socket beside the one that Ray asks at; raises ValueError where it has none."""
    match = SOCKET_LINE.search(config)
    if match is None:
        raise ValueError("the HAProxy configuration has no stats socket: is Ray another version?")
    asked = Path(match[2])
    return f"{config[: match.start(2)]}{asked.with_name(OWN_SOCKET)}{config[match.end(2) :]}", asked


def leads_somewhere(config: str) -> bool:
    """Whether the configuration names gateways."""
    return "use_backend " in config


def without_takeover(arguments: Sequence[str]) -> tuple[list[str], list[int]]:
    """HAProxy's arguments without those of a takeover (`-sf PID…`, `-x SOCKET`), and the processes these name."""
    kept: list[str] = []
    named: list[int] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "-x":
            left.pop(0)
        elif argument == TAKES_OVER:
            while left and left[0].isdigit():
                named.append(int(left.pop(0)))
        else:
            kept.append(argument)
    return kept, named


def runs(pid: int, configs: Sequence[Path], proc: Path = Path("/proc")) -> bool:
    """Whether this process was started with one of these configurations, and is no other one that has its id now."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(str(config).encode() in words for config in configs)


def ask(path: Path, command: bytes, timeout_s: float = ANSWER_S) -> bytes:
    """HAProxy's answer to a command; raises OSError where it gives none in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        connection.sendall(command)
        answer = bytearray()
        while part := connection.recv(COMMAND_BYTES):
            answer += part
    return bytes(answer)


def running(path: Path, timeout_s: float = ANSWER_S) -> int | None:
    """The id of the HAProxy that answers there; None where none does."""
    try:
        match = PID_LINE.search(ask(path, b"show info\n", timeout_s))
    except OSError:
        return None
    return None if match is None else int(match[0].split()[1])


@dataclass(frozen=True, slots=True)
class Node:
    """Ray's process of this node; its id alone could be another's by now."""

    pid: int
    since: str

    @classmethod
    def of(cls, pid: int, proc: Path = Path("/proc")) -> Node | None:
        """None where it has ended."""
        try:
            fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else cls(pid, fields[19])

    @property
    def alive(self) -> bool:
        return Node.of(self.pid) == self


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Keeper:
    """Starts HAProxy, and again when it dies; ends with it when it is to end."""

    def __init__(self, command: Sequence[str], configs: Sequence[Path], asked: Path) -> None:
        """`command`: HAProxy with Ray's arguments and our configuration; `configs`: Ray's and ours; `asked`: where Ray
        asks.
        """
        self._configs = configs
        self._asked = asked
        self._own = asked.with_name(OWN_SOCKET)
        self._record = asked.with_name(RECORD)
        self._command, self._named = without_takeover(command)
        self._process: subprocess.Popen[bytes] | None = None
        # It is to end: nothing is started again.
        self._leaving: signal.Signals | None = None
        self._actor = os.getppid()
        self._node = Node.of(_parent(self._actor))

    def run(self) -> int:
        """Return HAProxy's exit status when it has ended and is not to run any more."""
        # Ray's node ends the process group of an actor that has died.
        with contextlib.suppress(PermissionError):  # it leads one already
            os.setsid()
        signal.signal(signal.SIGUSR1, self._on_leave)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_leave)
        signal.signal(signal.SIGHUP, self._on_orphaned)
        die_with_parent(signal.SIGHUP)
        if os.getppid() != self._actor:
            self._on_orphaned()
        process = self._start(*self._takeover())
        while running(self._own) != process.pid:
            if process.poll() is not None:
                return _status(process)
            time.sleep(READY_POLL_S)
        Kept(os.getpid(), process.pid).write(self._record)
        self._answer_ray()
        threading.Thread(target=self._probe, daemon=True).start()
        starts = [time.monotonic()]
        while True:
            # In good order it ends only where somebody told it to.
            if process.wait() == 0 or self._leaving is not None or not self._is_current():
                return _status(process)
            starts = [moment for moment in starts if moment > time.monotonic() - STARTS_WITHIN_S]
            if len(starts) >= MOST_STARTS:
                return _status(process)
            starts.append(time.monotonic())
            process = self._start()
            Kept(os.getpid(), process.pid).write(self._record)

    def _start(self, *takeover: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*self._command, *takeover])  # noqa: S603 - the packaged binary
        self._process = process
        if self._leaving is not None:  # asked for while there was no process to tell
            process.send_signal(self._leaving)
        return process

    def _takeover(self) -> list[str]:
        """Arguments by which a HAProxy that serves hands its listeners over: one that Ray names, or one left behind."""
        kept = Kept.read(self._record)
        left = [] if kept is None else [pid for pid in (kept.keeper, kept.haproxy) if runs(pid, self._configs)]
        serving = running(self._own)
        if serving is not None:
            named = dict.fromkeys([*self._named, *left, serving])
            return [TAKES_OVER, *map(str, named), "-x", str(self._own)]
        # It answers nobody, and would go on taking connections beside its successor.
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return []

    def _is_current(self) -> bool:
        kept = Kept.read(self._record)
        return kept is not None and kept.keeper == os.getpid()

    # -- signals

    def _on_leave(self, number: int, _: FrameType | None = None) -> None:
        """SIGUSR1: no new connections, end when those that are there have ended. SIGTERM: end."""
        self._leave(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)

    def _leave(self, how: signal.Signals) -> None:
        self._leaving = how
        if self._process is not None:
            self._process.send_signal(how)

    def _on_orphaned(self, *_: object) -> None:
        """Ray's actor has died: its successor will take over, unless the whole node has gone."""
        threading.Thread(target=self._orphaned, daemon=True).start()

    def _orphaned(self) -> None:
        while self._node is not None and self._node.alive:
            time.sleep(NODE_POLL_S)
        self._leave(signal.SIGUSR1)
        time.sleep(GONE_S)
        self._leave(signal.SIGTERM)

    # -- the admin socket

    def _answer_ray(self) -> None:
        """Take the place at which Ray asks, from whoever had it."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        temporary = self._asked.with_name(f"k{os.getpid()}")
        temporary.unlink(missing_ok=True)
        before = os.umask(0o177)
        listener.bind(str(temporary))
        os.umask(before)
        listener.listen()
        temporary.replace(self._asked)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(ANSWER_S)
            command = b""
            while not command.endswith(b"\n") and len(command) < COMMAND_BYTES:
                part = connection.recv(COMMAND_BYTES)
                if not part:
                    break
                command += part
            connection.sendall(PID_LINE.sub(b"Pid: %d" % os.getpid(), self._patiently(command)))

    def _patiently(self, command: bytes) -> bytes:
        """HAProxy's answer, also where it dies meanwhile and is started again."""
        deadline_s = time.monotonic() + RESTART_WAIT_S
        answer = b""
        # A living one sends a line at least.
        while not answer and time.monotonic() < deadline_s:
            try:
                answer = ask(self._own, command)
            except (ConnectionError, FileNotFoundError):
                time.sleep(READY_POLL_S)
        return answer

    def _probe(self) -> None:
        silent = 0
        while self._leaving is None:
            time.sleep(PROBE_S)
            process = self._process
            silent = 0 if running(self._own) is not None else silent + 1
            if silent >= PROBES and process is not None and self._leaving is None and self._is_current():
                silent = 0
                process.kill()


def _status(process: subprocess.Popen[bytes]) -> int:
    code = process.wait()
    return code if code >= 0 else SIGNALLED - code
