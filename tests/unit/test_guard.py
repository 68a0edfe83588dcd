"""What is left of a cluster when `galerne serve` is killed: its guard ends it. Real processes, a real SIGKILL."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from serving.cluster import guard
from serving.cluster.processes import started_ticks

WITHIN_S = 60.0

# As `galerne serve` does it: its guard first, then what it guards. Ray's agents have another parent than Ray itself, are
# in a session of their own and end by themselves only after a minute; the last of them takes no notice of SIGTERM.
SERVING = """
import os, subprocess, sys, time
from pathlib import Path
from serving.cluster import guard, processes
processes.become_reaper()
kept = guard.started([Path(sys.argv[1]) / "cluster.json"])
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
agents = (
    "import subprocess, sys, time\\n"
    "one = subprocess.Popen(['sleep', '600'], start_new_session=True)\\n"
    f"two = subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True, stdout=subprocess.PIPE)\\n"
    "two.stdout.readline()\\n"
    "print('up', flush=True)\\n"
    "time.sleep(600)\\n"
)
ray = subprocess.Popen([sys.executable, "-c", agents], start_new_session=True, stdout=subprocess.PIPE)
ray.stdout.readline()
print("up", flush=True)
if sys.argv[2] == "stop":
    processes.end_descendants(os.getpid())
else:
    time.sleep(600)
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never came: {what}"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "cluster.json").write_text("{}")
    return tmp_path


def serving(state: Path, then: str) -> subprocess.Popen[str]:
    with (state / "terminal").open("w") as terminal:
        return subprocess.Popen(
            [sys.executable, "-c", SERVING, str(state), then], stdout=subprocess.PIPE, stderr=terminal, text=True
        )


def wait_for_a_look(caused: list[psutil.Process]) -> None:
    """Until the guard has looked at the processes since everything was up: between two of its waits lies a look."""
    (watching,) = (p for p in caused if guard.__name__ in p.cmdline())
    waits = watching.num_ctx_switches().voluntary
    until(lambda: watching.num_ctx_switches().voluntary >= waits + 2, "two waits of the guard")


def test_everything_is_ended_when_the_serving_process_is_killed(state: Path) -> None:
    process = serving(state, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    caused = psutil.Process(process.pid).children(recursive=True)
    # The guard, Ray, two agents.
    assert len(caused) == 4
    before = guard.known_of({p.pid for p in caused})
    wait_for_a_look(caused)
    process.kill()
    process.communicate()
    until(lambda: all(map(gone, caused)), "the end of every process")
    assert guard.alive(before) == set()
    assert not (state / "cluster.json").exists()
    assert guard.LEFT in (state / "terminal").read_text()


def test_a_service_that_stops_by_itself_takes_its_guard_with_it_and_nothing_is_said(state: Path) -> None:
    process = serving(state, "stop")
    process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0
    assert (state / "cluster.json").exists()
    assert (state / "terminal").read_text() == ""


def test_a_number_that_is_somebody_elses_now_is_left_alone() -> None:
    other = subprocess.Popen(["sleep", "600"])
    try:
        ticks = started_ticks(other.pid)
        assert ticks is not None
        # The process that had this number before started earlier.
        guard.end({other.pid: ticks - 1})
        assert other.poll() is None
        guard.end({other.pid: ticks})
        assert other.wait(WITHIN_S) != 0
    finally:
        other.kill()
        other.wait()
