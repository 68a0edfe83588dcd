"""Where traces of requests go; without this section nothing is traced and nothing for it is imported."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.config.base import Frozen, Seconds

TRACES_PATH = "/v1/traces"


class TracingConfig(Frozen):
    """OpenTelemetry over OTLP/HTTP, from gateways and engines alike."""

    # A collector: its base address (http://collector:4318), or the whole address of its traces. No credentials: they go
    # into the variable OTEL_EXPORTER_OTLP_HEADERS, which no log shows.
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s@/?#]+(/[^\s@?#]*)?$")]
    # Share of requests that are traced. The gateway alone decides; a client cannot ask for more.
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    # An export that takes longer is given up, and its spans with it.
    timeout_s: Seconds = 10.0

    @property
    def traces_url(self) -> str:
        """Where spans are posted."""
        _, _, rest = self.otlp_endpoint.partition("://")
        base = self.otlp_endpoint.rstrip("/")
        return self.otlp_endpoint if rest.rstrip("/").partition("/")[2] else base + TRACES_PATH
