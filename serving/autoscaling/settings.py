"""What the configuration says about one model's scale, as the policy takes it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import Self

from serving.autoscaling.capacity import Capacity
from serving.config import AutoscalingConfig, ModelConfig, ScheduledFloor, zone


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about one model's scale."""

    minimum: int
    maximum: int
    capacity: Capacity | None
    stale_after_s: float = 30.0
    idle_s: float = 600.0
    # Share of requests that may miss their targets.
    may_miss: float = 0.01
    forecast: bool = True
    schedule: tuple[ScheduledFloor, ...] = ()
    zone: tzinfo = UTC
    # Something else decides, and is believed while its number is no older; None: nothing else does.
    external_stale_s: float | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """From a model's configuration. Without `replicas.max` there is nothing to scale: it is `min`, at least one."""
        section = model.autoscaling or AutoscalingConfig()
        least = model.replicas.min
        return cls(
            minimum=least,
            maximum=max(least, 1) if model.replicas.max is None else model.replicas.max,
            capacity=Capacity.of(model),
            stale_after_s=section.stale_after_s,
            idle_s=section.idle_s,
            may_miss=1 - section.attainment,
            forecast=section.forecast,
            schedule=section.schedule,
            zone=zone(section.timezone),
            external_stale_s=None if section.external is None else section.external.stale_after_s,
        )
