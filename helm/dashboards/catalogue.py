"""Every dashboard, in the order of their use."""

from __future__ import annotations

from typing import Final

from helm.dashboards import autoscaler, gateway, model, overview, tenant
from helm.dashboards.panels import Dashboard

DASHBOARDS: Final[tuple[Dashboard, ...]] = (
    overview.DASHBOARD,
    model.DASHBOARD,
    tenant.DASHBOARD,
    autoscaler.DASHBOARD,
    gateway.DASHBOARD,
)
