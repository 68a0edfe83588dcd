"""The live replicas of every model, with the requests this gateway has in flight on each.

The cluster layer pushes endpoint lists as replicas come and go; a request holds a lease on one replica
until it ends. A replica that has left keeps counting its leases until they end, so nothing leaks and
nothing goes below zero when it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from serving.routing.policies import less_loaded_of_two


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine replica's own OpenAI app listens."""

    replica_id: str
    host: str
    port: int


class Replica:
    """One endpoint and the requests in flight on it from this gateway."""

    __slots__ = ("endpoint", "in_flight")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.in_flight = 0


class Lease:
    """One request's hold on a replica; released exactly once, at the end of its `with` block."""

    __slots__ = ("_replica",)

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        replica.in_flight += 1

    @property
    def endpoint(self) -> Endpoint:
        """The leased replica's address."""
        return self._replica.endpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replica.in_flight -= 1


class ReplicaSet:
    """Replicas by model id. Used from one event loop only."""

    def __init__(self, models: Iterable[str], rng: Random) -> None:
        self._rng = rng
        self._replicas: dict[str, dict[str, Replica]] = {model: {} for model in models}
        self.known = False  # whether the cluster has reported at all

    def update(self, model: str, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        """Take the cluster's current list for a model; returns the endpoints that left."""
        self.known = True
        before = self._replicas[model]
        after: dict[str, Replica] = {}
        for endpoint in endpoints:
            kept = before.get(endpoint.replica_id)
            after[endpoint.replica_id] = kept if kept is not None and kept.endpoint == endpoint else Replica(endpoint)
        self._replicas[model] = after
        return tuple(r.endpoint for i, r in before.items() if after.get(i) is not r)

    def lease(self, model: str, exclude: frozenset[str] = frozenset()) -> Lease | None:
        """A lease on the chosen replica, none of `exclude`; None where no replica is left."""
        candidates = [r for i, r in self._replicas[model].items() if i not in exclude]
        if not candidates:
            return None
        return Lease(candidates[less_loaded_of_two([r.in_flight for r in candidates], self._rng)])

    def ready(self, model: str) -> int:
        """Replicas of the model that take requests."""
        return len(self._replicas[model])

    def snapshot(self) -> Mapping[str, Mapping[str, int]]:
        """Requests in flight by model and replica id."""
        return {m: {i: r.in_flight for i, r in rs.items()} for m, rs in self._replicas.items()}
