"""The holds of a gateway's models, one for each: what concerns all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from serving.admission.hold import HoldMetrics, ModelHold
from serving.admission.ticket import CallLater, on_the_loop
from serving.config import ModelConfig, TenantConfig


class Hold:
    """The holds of all models of a gateway."""

    def __init__(
        self,
        models: Iterable[ModelConfig],
        tenants: Iterable[TenantConfig] = (),
        *,
        clock: Callable[[], float],
        on_need: Callable[[str], None],
        metrics: HoldMetrics,
        call_later: CallLater = on_the_loop,
    ) -> None:
        """`on_need(model)` is called while somebody waits for a model that sleeps."""
        self._holds = {
            m.id: ModelHold(m, clock=clock, on_need=on_need, metrics=metrics, call_later=call_later) for m in models
        }
        self.update(tenants)

    def __getitem__(self, model: str) -> ModelHold:
        """The hold of a model; KeyError where there is no such model."""
        return self._holds[model]

    def items(self) -> Iterable[tuple[str, ModelHold]]:
        """Every model with its hold."""
        return self._holds.items()

    def update(self, tenants: Iterable[TenantConfig]) -> None:
        """Take the tenants' weights, priorities and bounds, now or after a reload."""
        granted = {tenant.id: tenant for tenant in tenants}
        for hold in self._holds.values():
            hold.grant(granted)

    def divide(self, gateways: int) -> None:
        """Take how many gateways, this one included, give to the same engines."""
        for hold in self._holds.values():
            hold.divide(gateways)
