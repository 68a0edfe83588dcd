"""Names of the Serve application and its deployments, without importing Ray."""

from __future__ import annotations

import re

APP = "galerne"
GATEWAY = "gateway"


def deployment_name(model_id: str) -> str:
    """Deployment of a model: Serve takes letters, digits, '-' and '_'; '/' and '.' become '-'."""
    return "engine-" + re.sub(r"[^A-Za-z0-9_-]", "-", model_id)
