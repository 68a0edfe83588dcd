"""The simulator against a cluster that really ran: the same requests at the same times, and how far apart they are.

A load test's file holds when each request was due, how long its prompt and answer were, and when its tokens came. The
same arrivals are played against as many simulated replicas with the fake engine's configured speeds. What differs is
then the simulator's own error together with what it does not model: gateway, network, and a machine that is shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from loadtest import run_file
from loadtest.errors import LoadtestError
from loadtest.records import Outcome, Record
from serving.autoscaling.capacity import of_fake
from serving.config import FakeEngineConfig, ModelConfig
from serving.errors import SimulationError
from serving.simulation.cluster import Cluster
from serving.simulation.engine import Engine, Floats, Targets
from serving.simulation.traces import Trace

QUANTILES: Final = (0.5, 0.9, 0.95, 0.99)
_K: Final = 1000.0


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure as measured and as simulated."""

    name: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative to what was measured; absolute for shares."""
        difference = self.simulated - self.measured
        return difference if self.name.startswith("attainment") or self.measured == 0 else difference / self.measured


def engine_of(fake: FakeEngineConfig) -> Engine:
    """The fake engine as the simulator knows engines."""
    capacity = of_fake(fake)
    return Engine(
        name="fake engine",
        rate=capacity.prefill_tokens_per_s,
        overhead_s=0.0,
        attention_s=0.0,
        step_s=capacity.decode_ms / _K,
        step_s_per_sequence=capacity.decode_ms_per_sequence / _K,
        step_s_per_token=0.0,
        max_sequences=fake.batch_slots,
        kv_tokens=float(capacity.kv_tokens or math.inf),
        chunk_tokens=fake.prefill_chunk_tokens,
    )


def validate(path: Path, model: ModelConfig, targets: Targets) -> list[Compared]:
    """Compares a run's requests of a model with their simulation. Raises SimulationError where there are none."""
    try:
        run = run_file.load(path)
    except LoadtestError as error:
        raise SimulationError(str(error)) from error
    records = [record for record in run.records if _usable(record) and record.model == model.id]
    if not records:
        raise SimulationError(f"{path}: no completed request of model {model.id} with its token counts")
    records.sort(key=lambda record: record.scheduled_s)
    trace = Trace(
        name=run.name,
        at_s=np.array([record.scheduled_s for record in records]),
        prompt_tokens=np.array([max(record.prompt_tokens or 1, 1) for record in records], dtype=np.int32),
        output_tokens=np.array([max(record.completion_tokens or 1, 1) for record in records], dtype=np.int32),
        duration_s=records[-1].scheduled_s + 1.0,
    )
    replicas = max(model.replicas.min, 1)
    cluster = Cluster(
        trace, engine_of(model.fake or FakeEngineConfig()), targets, start_delay_s=0.0, most=replicas, initial=replicas
    )
    cluster.advance(math.inf)
    state = cluster.state
    counted = np.array([not record.warm_up for record in records])
    gaps = np.maximum(state.output - 1, 1)
    return list(
        _compared(
            records=[record for record in records if not record.warm_up],
            ttft_s=(state.first_s - state.at_s)[counted],
            itl_s=((state.last_s - state.first_s) / gaps)[counted],
            own_s=np.asarray(state.own_s, dtype=np.float64)[counted],
            targets=targets,
        )
    )


def _usable(record: Record) -> bool:
    return bool(record.outcome is Outcome.COMPLETED and record.chunks_s and record.completion_tokens)


def _compared(
    *, records: Sequence[Record], ttft_s: Floats, itl_s: Floats, own_s: Floats, targets: Targets
) -> Sequence[Compared]:
    real_ttft = np.array([record.chunks_s[0] - record.scheduled_s for record in records])
    real_itl = np.array(
        [(record.chunks_s[-1] - record.chunks_s[0]) / max((record.completion_tokens or 1) - 1, 1) for record in records]
    )
    many = np.array([(record.completion_tokens or 1) > 1 for record in records])
    rows = []
    for name, real, ours in (("TTFT", real_ttft, ttft_s), ("mean ITL", real_itl[many], itl_s[many])):
        rows += [
            Compared(f"{name} p{level * 100:g}, s", float(np.quantile(real, level)), float(np.quantile(ours, level)))
            for level in QUANTILES
        ]
        rows.append(Compared(f"{name} mean, s", float(real.mean()), float(ours.mean())))

    def well(ttft: Any, itl: Any) -> float:
        limit_s = targets.ttft_s + (own_s if targets.own_prefill else 0.0)
        return float(((ttft <= limit_s) & (itl <= targets.itl_s)).mean())

    rows.append(Compared("attainment", well(real_ttft, real_itl), well(ttft_s, itl_s)))
    return rows
