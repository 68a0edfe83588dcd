"""The end of a service whose Ray has ended: in order, and with a word on who starts it again.

Gateways and engines outlive Ray's own processes for a while and answer, but nothing is replaced any more, and the
serving process would wait for ever, or be ended by Ray without a word. (What is left when the serving process itself is
killed: `serving.cluster.guard`.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from serving.cluster import processes

HAPROXY = "haproxy"
# Ray's processes that the serving process starts and without which nothing is replaced.
RAY_PROCESSES = frozenset({"raylet", "gcs_server"})
# For the requests under way, as when the service is stopped.
LAST_REQUESTS_S = 15
POLL_S = 0.25
LOST = (
    "Ray's {gone} has ended, so nothing that fails is replaced any more (see {log}). The service ends now: requests "
    "under way have {seconds} s. It does not start again by itself: a supervisor does that "
    "(deployments/systemd/galerne.service)."
)
STOPPED = "Stopped: no process and no port is left."


def end_without_ray(stopping: threading.Event, log: Path, files: Iterable[Path], console: Console) -> None:
    """From now on, end this process with status 1 when one of Ray's processes has ended, unless `stopping` is set.

    On a thread of its own, because whoever asks Ray something waits then too. `files` are removed; `log` is where Ray
    says why.
    """
    own = processes.named(processes.children(os.getpid()), RAY_PROCESSES)

    def wait() -> None:
        while all(map(_runs, own)):
            time.sleep(POLL_S)
        if stopping.is_set():
            return
        gone = " and ".join(name for pid, name in own.items() if not _runs(pid))
        said = LOST.format(gone=gone, log=log, seconds=LAST_REQUESTS_S)
        console.print(said, style="bold red", markup=False, highlight=False, soft_wrap=True)
        _finish_requests()
        processes.end_descendants(os.getpid())
        remove(files)
        console.print(STOPPED)
        # The main thread may wait for Ray.
        os._exit(1)

    threading.Thread(target=wait, name="ray-processes", daemon=True).start()


def remove(files: Iterable[Path]) -> None:
    """Remove what told others that the service runs."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _finish_requests() -> None:
    """HAProxy closes its listener and ends with the last request under way."""
    fronts = processes.named(processes.descendants(os.getpid()), {HAPROXY})
    for pid in fronts:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    until_s = time.monotonic() + LAST_REQUESTS_S
    while any(map(_runs, fronts)) and time.monotonic() < until_s:
        time.sleep(POLL_S)


def _runs(pid: int) -> bool:
    return processes.started_ticks(pid) is not None
