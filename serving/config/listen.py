"""The front: where clients connect, and the gateways behind that address."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from serving.config.base import Frozen, Misplaced, PositiveInt, Seconds
from serving.config.cors import CorsConfig
from serving.config.faults import GatewayFaultsConfig
from serving.config.keys import Networks

# IPv4 and names, or IPv6 without a zone.
HOST = r"^([A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)$"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class ListenConfig(Frozen):
    """Where clients connect. Loopback by default: exposing a cluster is a decision."""

    # An address or a host's name: it becomes part of a line of HAProxy's configuration.
    host: Annotated[str, Field(pattern=HOST, max_length=253)] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    # Proxies of yours in front (ingress, load balancer): what they say of a client's address is believed.
    trusted_proxies: Networks = ()
    # Connections that one other address (of IPv6: one /64) may have open at the front, idle ones included. None: a
    # quarter of those that it takes. Trusted proxies are not counted: many clients stand behind one.
    connections_per_source: PositiveInt | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK


class GatewayReplicasConfig(Frozen):
    """Gateways that follow their load."""

    min: PositiveInt = 1
    max: PositiveInt
    # Requests in flight on each that are aimed for.
    in_flight: PositiveInt = 256

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise Misplaced(f"max ({self.max}) is below min ({self.min})", "max")
        return self


class GatewayConfig(Frozen):
    """The gateway deployment: light, CPU only, one event loop a replica."""

    # A number, or bounds within which Ray Serve's own autoscaling follows the requests in flight.
    replicas: PositiveInt | GatewayReplicasConfig = 1
    cpus: Annotated[float, Field(ge=0)] = 0.5
    # Beyond it new requests get 503: an event loop that holds more only gets slower for all.
    max_ongoing_requests: PositiveInt = 4096
    # Bytes of the bodies of all requests that are being read or have no answer yet. Beyond it, and beyond a tenant's
    # part of it, new ones get 503 before their body is read: bodies are most of what a gateway's memory holds.
    max_ongoing_body_bytes: PositiveInt = 512 * 1024 * 1024
    connect_timeout_s: Seconds = 2.0
    # Until the first byte of an engine's answer. Long: a queued prompt answers only when its turn comes.
    response_timeout_s: Seconds = 600.0
    # A client must deliver its whole body within it (slow bodies hold memory).
    body_timeout_s: Seconds = 30.0
    faults: GatewayFaultsConfig = GatewayFaultsConfig()
    # Pages of other origins that may call from a browser; absent: none may.
    cors: CorsConfig | None = None
    # Prometheus metrics of a gateway replica: the first free port from here on.
    metrics_port: Annotated[int, Field(ge=1, le=65000)] = 9400

    @property
    def bounds(self) -> GatewayReplicasConfig:
        """Least and most replicas; the same where their number is fixed."""
        if isinstance(self.replicas, int):
            return GatewayReplicasConfig(min=self.replicas, max=self.replicas)
        return self.replicas
