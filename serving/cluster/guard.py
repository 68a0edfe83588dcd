"""Ends what is left of a cluster whose `galerne serve` was killed, and says so.

A process that gets SIGKILL cleans nothing up. Ray's own processes find out by themselves: most within seconds, its
agents after a minute, and until then their ports are taken. So `galerne serve` has a child that does nothing but wait
for its end: it reads a pipe whose other end only the serving process holds. Once a second it notes which processes
descend from that one, because after its end nobody's parent tells any more. It imports nothing but the standard library
and the list of processes, and costs some milliseconds of processor a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from serving.cluster import processes

LOOK_EVERY_S = 1.0
# What a process has to end by itself after SIGTERM: the ledger's writer writes what it holds.
TERM_WAIT_S = 3.0
POLL_S = 0.05
LEFT = (
    "galerne: the serving process was killed. Every process that it had started is ended now, and their ports are "
    "free. Nothing starts the service again by itself: run it under a supervisor, for example systemd "
    "(deployments/systemd/galerne.service)."
)

# A process and when it started: its number may be somebody else's later.
Known = Mapping[int, int]


def started(files: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start the guard of this process; `files` are removed where it has to act.

    It ends by SIGTERM, as every other descendant does when the service stops.
    """
    return subprocess.Popen(  # noqa: S603 - this interpreter, a constant program
        [sys.executable, "-m", __spec__.name, *map(str, files)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # Ctrl-C is for the serving process, which ends the guard last.
        start_new_session=True,
    )


def known_of(pids: set[int]) -> dict[int, int]:
    """The processes among these that run, with their starts."""
    return {pid: ticks for pid in pids if (ticks := processes.started_ticks(pid)) is not None}


def alive(known: Known) -> set[int]:
    """Those of them that still run, and everything that descends from them."""
    found = {pid for pid, ticks in known.items() if processes.started_ticks(pid) == ticks}
    return found.union(*(processes.descendants(pid) for pid in found))


def end(known: Known, clock: Callable[[], float] = time.monotonic) -> None:
    """SIGTERM, then SIGKILL, until nothing of it runs."""
    left = known_of(alive(known))
    _signal(left, signal.SIGTERM)
    deadline_s = clock() + TERM_WAIT_S
    while (left := known_of(alive({**known, **left}))) and clock() < deadline_s:
        time.sleep(POLL_S)
    while left := known_of(alive(left)):
        _signal(left, signal.SIGKILL)
        time.sleep(POLL_S)


def main(files: Sequence[Path]) -> None:
    """Wait for the parent's end."""
    parent = os.getppid()
    while True:
        known = known_of(processes.descendants(parent) - {os.getpid()})
        if select.select([0], [], [], LOOK_EVERY_S)[0]:
            break
    end(known)
    for file in files:
        file.unlink(missing_ok=True)
    # The terminal may be gone with the parent.
    with contextlib.suppress(OSError):
        print(LEFT, file=sys.stderr, flush=True)


def _signal(pids: Known, number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
