"""The processes of a cluster on one machine: found by descent, ended for certain.

Ray, vLLM and HAProxy start processes that outlive a parent that dies badly. The serving process makes itself
their reaper (orphans come back to it, not to init), so that at the end nothing is left: no process, no port.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

# Set where engines compute on the processors that everything else runs on.
ENV_TAKES_TURNS = "GALERNE_TAKES_TURNS"
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TERM_WAIT_S = 5.0
POLL_S = 0.05


def become_reaper() -> None:
    """Orphaned descendants become children of this process (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for this signal when the thread that started this process ends; holds across exec (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def takes_turns(proc: Path = Path("/proc")) -> None:
    """Have this process wait for its turn instead of interrupting what computes; holds across exec (Linux).

    The threads of an engine on processors wait for one another at every layer: what interrupts one stops all. A process
    of the kernel's batch class runs as soon as a processor is idle, else when a thread has had its slice (some
    milliseconds), and then handles everything that has come meanwhile at once.
    """
    for thread in (proc / "self" / "task").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or the container forbids it
            os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))


def descendants(root: int, proc: Path = Path("/proc")) -> set[int]:
    """Process ids of every living descendant of `root`."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue  # ended while we looked
        # The command, in parentheses, may hold anything; the fields after it are plain.
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    queue = [root]
    while queue:
        for child in children.get(queue.pop(), ()):
            found.add(child)
            queue.append(child)
    return found


def reap_orphans(own: Collection[int], proc: Path = Path("/proc")) -> None:
    """Take note of ended children that this process did not start itself; `own` are those that it did.

    A reaper that does not would collect one zombie for every process whose parent died.
    """
    for entry in proc.iterdir():
        if not entry.name.isdigit() or int(entry.name) in own:
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state == "Z" and int(parent) == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)


def children(root: int, proc: Path = Path("/proc")) -> frozenset[int]:
    """Process ids of the direct children of `root`, ended ones included."""
    found = set()
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == root:
                    found.add(int(entry.name))
    return frozenset(found)


def started_ticks(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When the process started, in the kernel's ticks; None where it has ended or is a zombie."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def named(pids: Iterable[int], names: Collection[str], proc: Path = Path("/proc")) -> dict[int, str]:
    """Those of the processes that run a program of one of these names, as the kernel calls it."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            if (name := (proc / str(pid) / "comm").read_text().strip()) in names:
                found[pid] = name
    return found


def end_descendants(root: int, clock: Callable[[], float] = time.monotonic) -> int:
    """SIGTERM, then SIGKILL, until `root` has no descendant; returns how many had to be killed."""
    _signal_all(descendants(root), signal.SIGTERM)
    deadline_s = clock() + TERM_WAIT_S
    while (left := descendants(root)) and clock() < deadline_s:
        _reap()
        time.sleep(POLL_S)
    killed = len(left)
    while left := descendants(root):
        _signal_all(left, signal.SIGKILL)
        time.sleep(POLL_S)
        _reap()
    _reap()
    return killed


def port_is_free(host: str, port: int) -> bool:
    """Whether a server can bind the port; lingering connections of a former one do not count."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str, first: int, tries: int = 100) -> int:
    """The first free port from `first` on, which is then promised to this process until it ends.

    Between the choice and the bind lie seconds, in which another `galerne serve` would choose the same. Raises OSError
    where none of `tries` is free.
    """
    for port in range(first, first + tries):
        if port_is_free(host, port) and _promised(port):
            return port
    raise OSError(f"no free port on {host} from {first} to {first + tries - 1}")


def _promised(port: int) -> bool:
    """Take the name of the port among Galerne's commands; False where another has it."""
    # An abstract address: it belongs to the same network namespace as the port, and goes with the process.
    promise = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        promise.bind(f"\0galerne-port-{port}")
    except OSError:
        promise.close()
        return False
    # The kernel's handle alone: it is closed with the process, and nobody else closes it.
    promise.detach()
    return True


def _signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
