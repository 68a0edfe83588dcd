"""Where the cluster's own measurements are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.config.base import Frozen, Seconds


class PrometheusConfig(Frozen):
    """Where the signals of autoscaling are read."""

    # Base address, for example http://127.0.0.1:9090.
    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    query_timeout_s: Seconds = 3.0
    # Where the process that decides (Ray Serve's controller) exports its decisions.
    scaler_port: Annotated[int, Field(ge=1, le=65535)] = 9390
