"""What `galerne simulate autoscale` does, from names to a comparison; every failure is one SimulationError."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from loadtest.errors import LoadtestError
from loadtest.profiles.model import load_profile
from serving.errors import SimulationError
from serving.simulation.catalogue import find
from serving.simulation.comparison import POLICIES, START_DELAYS_S, Comparison, compare
from serving.simulation.engine import Engine, Targets
from serving.simulation.traces import Trace


@dataclass(frozen=True, slots=True)
class Asked:
    """The command's options."""

    traces: tuple[str, ...]
    policies: tuple[str, ...]
    start_delays_s: tuple[float, ...]
    rate_scale: float
    from_s: float
    until_s: float
    profile: str
    ttft_s: float
    itl_s: float
    max_requests: int
    max_replicas: int | None


def run(asked: Asked, progress: Callable[[str], None]) -> Comparison:
    """Reads, plays and compares. Raises SimulationError with what is wrong."""
    policies = tuple(dict.fromkeys(asked.policies)) or POLICIES
    if unknown := [name for name in policies if name not in POLICIES]:
        raise SimulationError(f"no policy {', '.join(unknown)}; allowed: {', '.join(POLICIES)}")
    delays_s = tuple(dict.fromkeys(asked.start_delays_s)) or START_DELAYS_S
    if not all(0 <= delay_s < math.inf for delay_s in delays_s):
        raise SimulationError("a start delay is a number of seconds, 0 or more")
    try:
        engine = Engine.of(load_profile(asked.profile))
        traces = _distinct(
            [
                find(
                    name,
                    scale=asked.rate_scale,
                    from_s=asked.from_s,
                    until_s=asked.until_s,
                    most=asked.max_requests,
                )
                for name in asked.traces
            ]
        )
    except LoadtestError as error:
        raise SimulationError(str(error)) from error
    for trace in traces:
        for note in trace.notes:
            progress(f"{trace.name}: {note}")
    return compare(
        traces,
        engine,
        Targets(asked.ttft_s, asked.itl_s),
        policies=policies,
        delays_s=delays_s,
        most=asked.max_replicas,
        progress=progress,
    )


def _distinct(traces: list[Trace]) -> list[Trace]:
    """Two of one name are told apart by number."""
    seen: dict[str, int] = {}
    named = []
    for trace in traces:
        seen[trace.name] = seen.get(trace.name, 0) + 1
        count = seen[trace.name]
        named.append(trace if count == 1 else replace(trace, name=f"{trace.name} ({count})"))
    return named
