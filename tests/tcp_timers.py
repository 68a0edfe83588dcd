"""What the kernel's own list of connections says of their timers."""

from __future__ import annotations

import os
import time
from pathlib import Path

KEEP_ALIVE = 2  # the timer's kind in /proc/net/tcp
WAIT_S = 10.0


def keep_alive_due_s(local_port: int, remote_port: int) -> float:
    """Seconds until the kernel probes a connection of this machine, seen from the end at `local_port`; inf: never.

    A timer of another kind, such as that of data on its way, is waited out.
    """
    deadline_s = time.monotonic() + WAIT_S
    while (found := _keep_alive(local_port, remote_port)) is None and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return float("inf") if found is None else found


def _keep_alive(local_port: int, remote_port: int) -> float | None:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, _, timer, *_ = line.split()
        if (_port(local), _port(remote)) == (local_port, remote_port):
            kind, due = timer.split(":")
            if int(kind, 16) == KEEP_ALIVE:
                return int(due, 16) / os.sysconf("SC_CLK_TCK")
    return None


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)
