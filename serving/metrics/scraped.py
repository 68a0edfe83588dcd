"""The table's metrics that are read from live state when Prometheus asks, not recorded as things happen."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.metrics.table import NO_TENANT, spec


class EjectedReplicas(Protocol):
    """The health of all models."""

    def ejected(self) -> Iterable[tuple[str, int]]:
        """Each model with the number of its ejected replicas."""


class Loads(Protocol):
    """What the metrics read of the replica set at scrape time."""

    def ready(self, model: str) -> int:
        """Replicas that take requests."""

    def snapshot(self) -> Mapping[str, Mapping[str, int]]:
        """Requests in flight by model and replica."""

    def blocks(self) -> Mapping[str, int]:
        """Blocks in each model's prefix index."""


class HeldRequests(Protocol):
    """What the metrics read of a model's hold at scrape time."""

    @property
    def held_bytes(self) -> int: ...

    def held(self) -> Mapping[str, int]:
        """Waiting requests by tenant."""

    def oldest_s(self) -> float:
        """How long the oldest has waited."""

    def shares(self) -> Iterable[tuple[str, float, float, float]]:
        """Of each tenant: service given; and while it waits how far it is ahead, and its part of its bound."""

    def budget(self) -> tuple[tuple[float, float | None], tuple[int, int]]:
        """In flight and the most of it: tokens, sequences."""


class Holds(Protocol):
    """The holds of all models."""

    def items(self) -> Iterable[tuple[str, HeldRequests]]:
        """Every model with its hold."""


class Backlog(Protocol):
    """The ledger as the metrics see it."""

    @property
    def spilled(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def behind(self) -> int: ...
    @property
    def lag_s(self) -> float: ...


class Gaps(Collector):
    """The one histogram that is observed per chunk: counts by bisection, no lock (one event loop writes).

    The library's own histogram scans its buckets one by one and takes a lock for each value it writes.
    """

    def __init__(self) -> None:
        self._row = spec("galerne_inter_chunk_seconds")
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float) -> None:
        counts = self._counts.get(model)
        if counts is None:
            counts = self._counts[model] = [0] * (len(self._row.buckets) + 1)
            self._sums[model] = 0.0
        counts[bisect_left(self._row.buckets, seconds)] += 1
        self._sums[model] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._row.name, self._row.help, labels=self._row.labels)
        bounds = [*(str(float(bound)) for bound in self._row.buckets), "+Inf"]
        for model, counts in tuple(self._counts.items()):
            family.add_metric([model], list(zip(bounds, accumulate(counts), strict=True)), self._sums[model])
        yield family


class ReplicaCollector(Collector):
    def __init__(self, loads: Loads) -> None:
        self._loads = loads

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ready, load = _family("galerne_replicas_ready"), _family("galerne_replica_in_flight")
        for model, replicas in self._loads.snapshot().items():
            ready.add_metric([model], self._loads.ready(model))
            for replica, in_flight in replicas.items():
                load.add_metric([model, replica], in_flight)
        blocks = _family("galerne_route_index_blocks")
        for model, count in self._loads.blocks().items():
            blocks.add_metric([model], count)
        yield ready
        yield load
        yield blocks


class EjectedCollector(Collector):
    def __init__(self, health: EjectedReplicas) -> None:
        self._health = health

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = _family("galerne_replicas_ejected")
        for model, count in self._health.ejected():
            family.add_metric([model], count)
        yield family


class HoldCollector(Collector):
    def __init__(self, holds: Holds) -> None:
        self._holds = holds
        # Of each model and tenant, the most that was exported.
        self._given: dict[tuple[str, str], float] = {}

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        held, oldest, size = (
            _family(n) for n in ("galerne_requests_held", "galerne_held_oldest_seconds", "galerne_held_bytes")
        )
        for model, hold in self._holds.items():
            by_tenant = hold.held()
            # A model nobody waits for has a sample too: no sample and none waiting are different things.
            for tenant, count in (by_tenant or {NO_TENANT: 0}).items():
                held.add_metric([model, tenant], count)
            oldest.add_metric([model], hold.oldest_s())
            size.add_metric([model], hold.held_bytes)
        yield held
        yield oldest
        yield size
        yield from self._fairness()

    def _fairness(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        row = spec("galerne_service_tokens")
        service = CounterMetricFamily(row.name, row.help, labels=row.labels)
        lag, bound = _family("galerne_queue_lag_tokens"), _family("galerne_queue_bound_part")
        names = ("tokens", "tokens_limit", "sequences", "sequences_limit")
        budget = [_family(f"galerne_in_flight_{name}") for name in names]
        for model, hold in self._holds.items():
            for tenant, given, ahead, part in hold.shares():
                # A counter never falls: what an estimate charged too much may be given back.
                most = self._given[model, tenant] = max(given, self._given.get((model, tenant), 0.0))
                service.add_metric([model, tenant], most)
                lag.add_metric([model, tenant], ahead)
                bound.add_metric([model, tenant], part)
            (tokens, most_tokens), (sequences, most_sequences) = hold.budget()
            values = (tokens, math.inf if most_tokens is None else most_tokens, sequences, most_sequences)
            for family, value in zip(budget, values, strict=True):
                family.add_metric([model], value)
        yield service
        yield lag
        yield bound
        yield from budget


class LedgerCollector(Collector):
    def __init__(self, state: Callable[[], Backlog]) -> None:
        self._state = state

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        state, row = self._state(), spec("galerne_ledger_rows")
        rows = CounterMetricFamily(row.name, row.help, labels=row.labels)
        rows.add_metric(["spilled"], state.spilled)
        rows.add_metric(["dropped"], state.dropped)
        yield rows
        for name, value in (("galerne_ledger_rows_behind", state.behind), ("galerne_ledger_lag_seconds", state.lag_s)):
            family = _family(name)
            family.add_metric([], value)
            yield family


def _family(name: str) -> GaugeMetricFamily:
    row = spec(name)
    return GaugeMetricFamily(row.name, row.help, labels=row.labels)
