"""Whom the cluster serves: tenants, with their keys and what they may ask for."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field

from serving.config.base import NAME, Frozen, PositiveInt, Seconds
from serving.config.keys import KeyConfig
from serving.config.limits import TenantLimitsConfig
from serving.config.quotas import QuotaConfig

# Of whom all wait, those of the first go first.
Priority = Literal["interactive", "standard", "batch"]
PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)


class TenantQueueConfig(Frozen):
    """A tenant's requests that wait for one model in one gateway, within the model's own `hold`."""

    # So many at most, then 429; absent: as many as the hold has room for.
    requests: PositiveInt | None = None
    # So long at most; absent: the hold's.
    wait_s: Seconds | None = None


class TenantConfig(Frozen):
    """One organisation: its keys and the models it may use."""

    id: Annotated[str, Field(pattern=NAME)]
    # None where its people sign in with tokens (`oidc`) alone.
    keys: tuple[KeyConfig, ...] = ()
    # Model ids; absent: every model.
    models: tuple[str, ...] | None = None
    # Tighter bounds on a single request than the cluster's.
    limits: TenantLimitsConfig | None = None
    # The operator's own notes, such as {residency: fr}; nothing is decided by them.
    labels: dict[str, Annotated[str, Field(max_length=256)]] = Field(default_factory=dict, max_length=32)
    # Service beside other tenants when engines are full: one of weight 2 gets twice what one of weight 1 gets.
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    # Who waits goes in this order; a class that waits still gets a tenth of what those above it get.
    priority: Priority = "standard"
    queue: TenantQueueConfig = TenantQueueConfig()
    quota: QuotaConfig = QuotaConfig()
