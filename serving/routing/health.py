"""What a gateway knows of how its replicas behave, by model: who is out, and how many requests may try twice.

The relay tells what it meets and asks whom to leave out; the probes tell what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import structlog

from serving.config import ModelConfig
from serving.routing.ejection import Ejections, Reason
from serving.routing.replicas import Endpoint
from serving.routing.retry_budget import RetryBudget

log = structlog.get_logger("galerne.gateway")


class HealthMetrics(Protocol):
    """What is told of replicas that are left out."""

    def ejected(self, model: str, replica: str, reason: str) -> None:
        """A replica is judged: failures, stalled or probes."""


class ModelHealth:
    """One model's."""

    __slots__ = ("budget", "ejections", "endpoints", "stall_s")

    def __init__(
        self,
        model: ModelConfig,
        clock: Callable[[], float],
        metrics: HealthMetrics,
        on_out: Callable[[str, int], None],
    ) -> None:
        def on_ejected(replica: str, reason: Reason) -> None:
            log.warning("replica ejected", model=model.id, replica=replica, reason=reason)
            metrics.ejected(model.id, replica, reason)

        self.budget = RetryBudget(model.faults.retry_share)
        self.ejections = Ejections(
            model.faults.ejected_share, clock, on_ejected, lambda out: on_out(model.id, len(out))
        )
        self.endpoints: tuple[Endpoint, ...] = ()
        self.stall_s = model.faults.stall_s

    @property
    def listed(self) -> frozenset[str]:
        """The replicas that the cluster lists."""
        return frozenset(endpoint.replica_id for endpoint in self.endpoints)


class Health:
    """All models'. Used from one event loop only."""

    def __init__(
        self,
        models: Iterable[ModelConfig],
        clock: Callable[[], float],
        metrics: HealthMetrics,
        on_out: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        """`on_out(model, replicas)` is told how many of a model's replicas are out when that changes."""
        self._models = {model.id: ModelHealth(model, clock, metrics, on_out) for model in models}

    def __getitem__(self, model: str) -> ModelHealth:
        """A model's; KeyError where there is no such model."""
        return self._models[model]

    def items(self) -> Iterator[tuple[str, ModelHealth]]:
        """Every model with its own."""
        return iter(self._models.items())

    def ejected(self) -> Iterator[tuple[str, int]]:
        """Each model with the number of its ejected replicas."""
        return ((model, len(health.ejections.out)) for model, health in self._models.items())

    def update(self, model: str, endpoints: tuple[Endpoint, ...]) -> None:
        """Take the cluster's list of a model's replicas."""
        health = self._models[model]
        health.endpoints = endpoints
        health.ejections.update([e.replica_id for e in endpoints])
