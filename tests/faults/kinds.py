"""Every kind of process that a cluster of one machine has: how to find one, and what its end may cost clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

from tests.faults.cluster import Cluster
from tests.faults.traffic import Outcome

Find = Callable[[Cluster], list[psutil.Process]]
# A process that is away for a moment: longer than the probes, shorter than what Ray waits for.
STOPPED_S: Final = 8.0
NOTHING: Final[frozenset[Outcome]] = frozenset({"completed"})
# What a client may meet when what stands in its request's way dies: all of it visible to it.
BROKEN: Final[frozenset[Outcome]] = frozenset({"completed", "lost", "failed", "refused"})


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of process.

    `killed`, `stopped`: what may come of requests while one is killed, and while one is stopped. `replaced`: another one
    comes. `stopped_s` None: it is stopped until it is replaced. `has_requests`: those it has are lost with it, and their
    rows of the ledger may be.
    """

    name: str
    find: Find
    killed: frozenset[Outcome] = NOTHING
    stopped: frozenset[Outcome] = NOTHING
    replaced: bool = True
    stopped_s: float | None = STOPPED_S
    has_requests: bool = False


def titled(title: str) -> Find:
    """Processes whose name begins so, or whose command line holds it."""

    def find(cluster: Cluster) -> list[psutil.Process]:
        return [p for p in cluster.running.processes() if title in _words(p)]

    return find


def _words(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return ""


def latest(title: str) -> Find:
    """The one of the latest generation; those of earlier ones end with their streams."""

    def find(cluster: Cluster) -> list[psutil.Process]:
        return sorted(titled(title)(cluster), key=lambda process: process.create_time())[-1:]

    return find


KINDS: Final = (
    Kind("serve controller", titled("ray::ServeController")),
    Kind("fallback proxy", titled("ray::ProxyActor")),
    Kind("HAProxy manager", titled("ray::HAProxyManager")),
    Kind("HAProxy keeper", latest("bin/galerne-haproxy -db")),
    Kind("HAProxy", latest("bin/haproxy -db"), killed=BROKEN, stopped=BROKEN, stopped_s=None),
    Kind("gateway", titled("ServeReplica:galerne:gateway"), killed=BROKEN, has_requests=True),
    Kind("engine replica", titled("ServeReplica:galerne:engine-chat"), killed=BROKEN, stopped=BROKEN),
    Kind("ledger writer", titled("serving.metering.writer")),
    # The next question starts another one.
    Kind("ledger reader", titled("serving.metering.reader"), replaced=False),
    Kind("dashboard", titled("dashboard/dashboard.py"), replaced=False),
    Kind("autoscaler monitor", titled("autoscaler/_private/monitor.py"), replaced=False),
    Kind("log monitor", titled("log_monitor.py"), replaced=False),
)
# Without one of these Ray ends what it started on the machine, and `galerne serve` with it; a stop is survived.
VITAL: Final = (
    Kind("raylet", titled("raylet/raylet"), killed=BROKEN, replaced=False, has_requests=True),
    Kind("control store (GCS)", titled("gcs_server"), killed=BROKEN, replaced=False, has_requests=True),
    Kind("dashboard agent", titled("ray::DashboardAgent"), killed=BROKEN, replaced=False, has_requests=True),
    Kind("runtime env agent", titled("ray::RuntimeEnvAgent"), killed=BROKEN, replaced=False, has_requests=True),
    Kind(
        "galerne serve",
        lambda cluster: [psutil.Process(cluster.running.process.pid)],
        killed=BROKEN,
        replaced=False,
        has_requests=True,
    ),
)
ENGINE_KINDS: Final = (
    Kind("engine host", titled("galerne engine chat"), killed=BROKEN, stopped=BROKEN),
    Kind("engine core", titled("VLLM::EngineCore"), killed=BROKEN, stopped=BROKEN),
    Kind("tensor-parallel worker", titled("VLLM::Worker"), killed=BROKEN, stopped=BROKEN),
)
