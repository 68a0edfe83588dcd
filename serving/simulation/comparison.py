"""Every policy on every trace at every start delay: the rows of the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from serving.autoscaling.settings import Settings
from serving.config import ModelConfig
from serving.simulation.cluster import Cluster
from serving.simulation.engine import Engine, Targets
from serving.simulation.meter import SCRAPE_S
from serving.simulation.oracle import GOAL, Plan, Search, demand, fewest, smoothed
from serving.simulation.replay import Bench, Outcome, lowest, replay
from serving.simulation.scalers import Hpa, Keda, Ours, RayDefault, Scaler
from serving.simulation.traces import Trace

POLICIES: Final = ("ours", "ray-default", "hpa-waiting", "keda-default", "static", "oracle")
START_DELAYS_S: Final = (5.0, 45.0, 120.0)
# What nobody may go beyond: so many times the replicas that demand takes at its highest.
MOST_FACTOR: Final = 6.0
LEAST_MOST: Final = 8
CEILING_FACTOR: Final = 20
# The first replicas: what the first minutes take.
_FIRST_S: Final = 300.0
_DEMAND_WINDOW_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one trace at one start delay. Simulated."""

    trace: str
    policy: str
    start_delay_s: float
    outcome: Outcome
    ratio_to_oracle: float | None = None
    ratio_to_static: float | None = None
    # What is particular to the policy: the constant number, the oracle's plan.
    detail: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        outcome = self.outcome
        return {
            "trace": self.trace,
            "policy": self.policy,
            "start_delay_s": self.start_delay_s,
            "slo_attainment": round(outcome.attainment, 5),
            "gpu_hours": round(outcome.gpu_hours, 3),
            "goodput_rps": round(outcome.goodput_rps, 3),
            "ratio_to_oracle": _rounded(self.ratio_to_oracle),
            "ratio_to_static": _rounded(self.ratio_to_static),
            "peak_replicas": outcome.peak_replicas,
            "oscillation_per_h": round(outcome.oscillation_per_h, 2),
            "time_to_capacity_s": round(outcome.time_to_capacity_s, 1),
            "worst_tenant_attainment": _rounded(outcome.worst_tenant),
            "rejected": outcome.rejected,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole result. Simulated."""

    rows: tuple[Row, ...]
    engine: str
    targets: Targets
    traces: tuple[Trace, ...]
    # By trace: attainment with far more replicas than demand takes, all ready from the start.
    ceilings: dict[str, float]
    took_s: float
    demands: dict[str, Any] = field(default_factory=dict, repr=False)

    def document(self) -> dict[str, Any]:
        """The one JSON object of `--json`."""
        targets = self.targets
        return {
            "simulated": True,
            "engine": self.engine,
            "slo": {
                "ttft_s": targets.ttft_s,
                "ttft_on_top": "the prompt's own unloaded prefill" if targets.own_prefill else "",
                "itl_mean_s": targets.itl_s,
                "share_of": "all arrivals; rejected and unanswered requests missed",
            },
            "traces": [
                {
                    "name": trace.name,
                    "requests": len(trace),
                    "duration_s": round(trace.duration_s, 3),
                    "prompt_tokens_mean": round(float(trace.prompt_tokens.mean()), 1),
                    "output_tokens_mean": round(float(trace.output_tokens.mean()), 1),
                    "ceiling_attainment": round(self.ceilings[trace.name], 5),
                    "notes": list(trace.notes),
                }
                for trace in self.traces
            ],
            "rows": [row.document() for row in self.rows],
            "took_s": round(self.took_s, 1),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def settings(engine: Engine, targets: Targets, least: int, most: int) -> Settings:
    """Of a model that is served by this engine, as its configuration would give them."""
    model = ModelConfig.model_validate(
        {
            "id": "simulated",
            "source": "fake:simulated",
            "replicas": {"min": least, "max": most},
            "slo": {"ttft_p95_s": targets.ttft_s, "itl_p95_s": targets.itl_s},
            "autoscaling": {"capacity": engine.capacity.model_dump()},
        }
    )
    return Settings.of(model)


def bench(
    trace: Trace, engine: Engine, targets: Targets, *, delay_s: float, least: int = 1, most: int | None = None
) -> Bench:
    """A trace with its bounds and its first replicas."""
    made = Bench(trace, engine, targets, delay_s, least, most or 1, 1)
    wanted = smoothed(demand(made), 60.0)
    if most is None:
        most = max(LEAST_MOST, math.ceil(MOST_FACTOR * float(wanted.max())))
    first = math.ceil(1.2 * float(wanted[: round(_FIRST_S / SCRAPE_S)].max()))
    return replace(made, most=max(most, least), initial=min(max(first, least, 1), most))


def compare(
    traces: Sequence[Trace],
    engine: Engine,
    targets: Targets,
    *,
    policies: Sequence[str] = POLICIES,
    delays_s: Sequence[float] = START_DELAYS_S,
    least: int = 1,
    most: int | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> Comparison:
    """Plays everything. The oracle and the constant number are found once and then searched near."""
    began_s = time.monotonic()
    rows: list[Row] = []
    ceilings: dict[str, float] = {}
    demands: dict[str, Any] = {}
    for trace in traces:
        first = bench(trace, engine, targets, delay_s=delays_s[0], least=least, most=most)
        needed = np.ceil(smoothed(demand(first), _DEMAND_WINDOW_S))
        demands[trace.name] = needed
        ceilings[trace.name] = ceiling(first)
        progress(f"{trace.name}: {len(trace):,} requests, ceiling {ceilings[trace.name]:.4f}")
        fixed = fewest(first) if {"static"} & set(policies) else None
        near: Plan | None = None
        for delay_s in delays_s:
            here = replace(first, start_delay_s=delay_s)
            found = Search(here, progress=progress).cheapest(near) if {"oracle"} & set(policies) else None
            near = found[0] if found else near
            cell: list[Row] = []
            for policy in policies:
                if policy == "oracle":
                    if found:
                        cell.append(Row(trace.name, policy, delay_s, found[1], detail=str(found[0])))
                elif policy == "static":
                    if fixed:
                        cell.append(Row(trace.name, policy, delay_s, fixed[1], detail=f"{fixed[0]} replicas"))
                else:
                    outcome = replay(here, scaler(policy, here), needed)
                    cell.append(Row(trace.name, policy, delay_s, outcome))
                if cell and cell[-1].policy == policy:
                    done = cell[-1].outcome
                    progress(
                        f"{trace.name}, start {delay_s:g} s, {policy}: {done.attainment:.4f}, {done.gpu_hours:.2f} h"
                    )
            oracle_h = found[1].gpu_hours if found else None
            static_h = fixed[1].gpu_hours if fixed else None
            rows += [
                replace(
                    row,
                    ratio_to_oracle=row.outcome.gpu_hours / oracle_h if oracle_h else None,
                    ratio_to_static=row.outcome.gpu_hours / static_h if static_h else None,
                )
                for row in cell
            ]
    return Comparison(
        rows=tuple(rows),
        engine=engine.name,
        targets=targets,
        traces=tuple(traces),
        ceilings=ceilings,
        took_s=time.monotonic() - began_s,
        demands=demands,
    )


def scaler(policy: str, here: Bench) -> Scaler:
    """The scaler of a name that decides while the trace plays."""
    if policy == "ours":
        return Ours(settings(here.engine, here.targets, here.least, here.most))
    makers: dict[str, Callable[[int, int], Scaler]] = {
        "ray-default": RayDefault,
        "hpa-waiting": Hpa,
        "keda-default": Keda,
    }
    return makers[policy](here.least, here.most)


def ceiling(here: Bench) -> float:
    """Attainment with replicas in plenty: what no scaling can better."""
    plenty = max(CEILING_FACTOR, math.ceil(CEILING_FACTOR * float(smoothed(demand(here), 60.0).max())))
    cluster = Cluster(
        here.trace, here.engine, here.targets, start_delay_s=here.start_delay_s, most=plenty, initial=plenty
    )
    cluster.advance(math.inf)
    return float(cluster.served_well().mean())


def worst_of(rows: Sequence[Row]) -> float | None:
    """The worst tenant of all rows."""
    return lowest([row.outcome.worst_tenant for row in rows])


GOAL_ATTAINMENT: Final = GOAL
