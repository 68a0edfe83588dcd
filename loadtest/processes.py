"""What processes cost: CPU seconds and resident memory of named groups, and of this client itself.

Linux accounts CPU time in ticks of 10 ms; a run of some seconds is told to better than a percent.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtest.errors import LoadtestError

CLIENT = "client"
# All processors of the machine, whoever used them.
MACHINE = "machine"

_IDLE_FIELDS = ("idle", "iowait", "steal", "guest", "guest_nice")


@dataclass(frozen=True, slots=True)
class Usage:
    """A reading: CPU seconds since each group started, resident bytes now."""

    cpu_s: Mapping[str, float]
    rss_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a benchmark ran."""

    cores: int
    cpu_model: str
    memory_gib: float
    python: str


def this_machine() -> Machine:
    """The machine under this process; `cores` are those it may use."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        cpu_model=_cpu_model(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        python=platform.python_version(),
    )


def parse_groups(text: str) -> dict[str, tuple[str, ...]]:
    """`engine=12+13,gateway=14,haproxy=haproxy` as groups of members, each a pid or a process name.

    Raises LoadtestError for a group that is not NAME=MEMBER[+MEMBER…].
    """
    groups: dict[str, tuple[str, ...]] = {}
    for part in filter(None, text.split(",")):
        name, _, members = part.partition("=")
        held = tuple(filter(None, members.split("+")))
        if not name or not held:
            raise LoadtestError(
                f"{part!r} is no process group; write NAME=PID or NAME=PID+PID or NAME=PROCESS-NAME"
            )
        groups[name] = held
    return groups


class ProcessGroups:
    """Reads named groups of processes, each with the children it had at the start, and this process."""

    def __init__(self, groups: Mapping[str, tuple[str, ...]]) -> None:
        """Find every process. Raises LoadtestError for a pid or a name that does not run."""
        self._groups = {name: _with_children(name, members) for name, members in groups.items()}
        self._groups[CLIENT] = [psutil.Process()]

    def read(self) -> Usage:
        """A reading now. Raises LoadtestError when a process of a group has ended."""
        cpu_s: dict[str, float] = {MACHINE: _machine_busy_s()}
        rss_bytes: dict[str, int] = {}
        for name, processes in self._groups.items():
            try:
                times = [process.cpu_times() for process in processes]
                rss_bytes[name] = sum(process.memory_info().rss for process in processes)
            except psutil.NoSuchProcess as gone:
                raise LoadtestError(
                    f"process {gone.pid} of group {name!r} ended during the benchmark"
                ) from gone
            cpu_s[name] = sum(t.user + t.system for t in times)
        return Usage(cpu_s=cpu_s, rss_bytes=rss_bytes)


def _with_children(group: str, members: tuple[str, ...]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for member in members:
        roots = _named(member) if not member.isdigit() else _by_pid(int(member))
        if not roots:
            raise LoadtestError(
                f"no process {member!r} for group {group!r}; give the pid or name of one that runs"
            )
        for root in roots:
            found[root.pid] = root
            found.update({child.pid: child for child in root.children(recursive=True)})
    return list(found.values())


def _by_pid(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []


def _named(name: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["name"]) if process.info["name"] == name]


def _machine_busy_s() -> float:
    # guest time is contained in user time already.
    times = psutil.cpu_times()
    return float(sum(value for name, value in times._asdict().items() if name not in _IDLE_FIELDS))


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
