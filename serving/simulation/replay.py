"""Plays a trace against a scaler and measures what came of it; simulated, every figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.simulation.cluster import Cluster
from serving.simulation.engine import Engine, Floats, Targets
from serving.simulation.meter import SCRAPE_S, Meter
from serving.simulation.scalers import Scaler
from serving.simulation.traces import Trace

# A client with fewer requests says nothing about a share of a hundredth.
_LEAST_OF_TENANT: Final = 200
_HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Bench:
    """What all scalers of a comparison share."""

    trace: Trace
    engine: Engine
    targets: Targets
    start_delay_s: float
    least: int
    most: int
    # Warm replicas at the trace's start: as if the service had run before.
    initial: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scaler achieved. `series`: after each scrape the target and what was ready."""

    attainment: float
    gpu_hours: float
    goodput_rps: float
    rejected: int
    peak_replicas: int
    # Changes of direction an hour.
    oscillation_per_h: float
    # How long on average demand was above what was ready, until it no longer was.
    time_to_capacity_s: float
    worst_tenant: float | None
    series: NDArray[np.int32]
    well: NDArray[np.bool_]


def replay(bench: Bench, scaler: Scaler, needed: Floats | None = None) -> Outcome:
    """The whole trace; `needed`: replicas that demand takes, per scrape, for the time to capacity."""
    cluster = Cluster(
        bench.trace,
        bench.engine,
        bench.targets,
        start_delay_s=bench.start_delay_s,
        most=bench.most,
        initial=bench.initial,
    )
    end_s = bench.trace.duration_s
    meter = Meter(starts_at_s=bench.trace.starts_at_s)
    steps = max(1, math.ceil(end_s / SCRAPE_S))
    series = np.zeros((steps, 2), dtype=np.int32)
    for step in range(steps):
        cluster.advance(step * SCRAPE_S)
        meter.scrape(cluster)
        cluster.scale(min(max(scaler.target(cluster, meter), bench.least), bench.most))
        series[step] = cluster.target, cluster.ready
    cluster.advance(end_s)
    return _outcome(bench, cluster, series, needed)


def scheduled(bench: Bench, levels: Floats, goal: float = 0.0) -> Outcome | None:
    """The whole trace on a schedule of replicas for each scrape; None where it is sure to miss the goal."""
    trace = bench.trace
    cluster = Cluster(
        trace,
        bench.engine,
        bench.targets,
        start_delay_s=bench.start_delay_s,
        most=bench.most,
        initial=bench.initial,
    )
    steps = max(1, math.ceil(trace.duration_s / SCRAPE_S))
    places = np.minimum(np.arange(steps), len(levels) - 1)
    whole = np.clip(np.asarray(levels)[places], bench.least, bench.most).astype(np.int64)
    series = cluster.follow(whole, SCRAPE_S, trace.duration_s, (1 - goal) * len(trace))
    return None if series is None else _outcome(bench, cluster, series, None)


def _outcome(bench: Bench, cluster: Cluster, series: NDArray[np.int32], needed: Floats | None) -> Outcome:
    end_s = bench.trace.duration_s
    billed_s = cluster.billed_s()
    # What is under way at the end is answered; replicas that nobody waits for any more are not billed for it.
    if cluster.ready == 0:
        cluster.scale(max(cluster.target, 1))
    cluster.advance(math.inf)
    well = cluster.served_well()
    return Outcome(
        attainment=float(well.mean()),
        gpu_hours=billed_s / _HOUR_S,
        goodput_rps=float(well.sum()) / end_s,
        rejected=int(cluster.rejected),
        peak_replicas=int(series[:, 0].max()),
        oscillation_per_h=_reversals(series[:, 0]) / (end_s / _HOUR_S),
        time_to_capacity_s=_episode_s(series[:, 1], needed),
        worst_tenant=_worst(bench.trace, well),
        series=series,
        well=well,
    )


def _reversals(target: NDArray[np.int32]) -> int:
    steps = np.sign(np.diff(target))
    steps = steps[steps != 0]
    return int((np.diff(steps) != 0).sum())


def _episode_s(ready: NDArray[np.int32], needed: Floats | None) -> float:
    if needed is None:
        return 0.0
    short = ready[: len(needed)] < needed[: len(ready)]
    episodes = int((np.diff(short.astype(np.int8), prepend=0) == 1).sum())
    return float(short.sum()) * SCRAPE_S / episodes if episodes else 0.0


def _worst(trace: Trace, well: NDArray[np.bool_]) -> float | None:
    if trace.client is None:
        return None
    number = np.bincount(trace.client, minlength=len(trace.clients))
    good = np.bincount(trace.client, weights=well, minlength=len(trace.clients))
    counted = number >= _LEAST_OF_TENANT
    return float((good[counted] / number[counted]).min()) if counted.any() else None


def lowest(values: Sequence[float | None]) -> float | None:
    """The lowest of those that are known."""
    return min((value for value in values if value is not None), default=None)
