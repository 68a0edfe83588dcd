"""What processes cost: CPU seconds and resident memory of named groups, and the whole machine's CPU seconds.

Linux accounts CPU time in ticks of 10 ms; a run of some seconds is told to better than a percent.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtest.errors import LoadtestError

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
    """`engine=12+13,gateway=14,haproxy=15/haproxy` as groups of members.

    A member is a pid (with its descendants), PID/NAME (its descendants of this process name), PID/!NAME (itself and
    its descendants but those of this name and theirs), or NAME (all processes of this name on the machine). Raises
    LoadtestError for what is not GROUP=MEMBER[+MEMBER…].
    """
    groups: dict[str, tuple[str, ...]] = {}
    for part in filter(None, text.split(",")):
        name, _, members = part.partition("=")
        held = tuple(filter(None, members.split("+")))
        if not name or not held:
            raise LoadtestError(
                f"{part!r} is no process group; write GROUP=PID, GROUP=PID+PID, GROUP=PID/NAME, GROUP=PID/!NAME or "
                "GROUP=NAME"
            )
        groups[name] = held
    return groups


class ProcessGroups:
    """Reads named groups of processes. Members come and go (a proxy that reloads is a new process): each
    reading looks for them anew, and what an ended one used before stays counted."""

    def __init__(self, groups: Mapping[str, tuple[str, ...]]) -> None:
        """Find every process. Raises LoadtestError for a member that does not run."""
        self._groups = groups
        self._used_s: dict[str, dict[psutil.Process, float]] = {name: {} for name in groups}
        self.read()

    def read(self) -> Usage:
        """A reading now. Raises LoadtestError when nothing is left of a member."""
        cpu_s: dict[str, float] = {MACHINE: _machine_busy_s()}
        rss_bytes: dict[str, int] = {}
        for group, members in self._groups.items():
            used_s = self._used_s[group]
            rss_bytes[group] = 0
            for process in {found for member in members for found in _processes(group, member)}:
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    used_s[process] = times.user + times.system
                    rss_bytes[group] += process.memory_info().rss
            cpu_s[group] = sum(used_s.values())
        return Usage(cpu_s=cpu_s, rss_bytes=rss_bytes)


def _processes(group: str, member: str) -> list[psutil.Process]:
    """The processes that a member stands for: see `parse_groups`."""
    root, _, name = member.partition("/")
    if not root.isdigit():
        found = _named(psutil.process_iter(), member)
    else:
        try:
            parent = psutil.Process(int(root))
            children = parent.children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        else:
            found = [parent, *children]
            if name.startswith("!"):
                left_out = _with_children(_named(children, name[1:]))
                found = [process for process in found if process not in left_out]
            elif name:
                found = _named(children, name)
    if not found:
        raise LoadtestError(f"no process {member!r} of group {group!r} runs (any more); see --pids")
    return found


def _named(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.name() == name:
                found.append(process)
    return found


def _with_children(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    found = set()
    for process in processes:
        found.add(process)
        with suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    return found


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
