"""The gateway as a Ray Serve ingress deployment behind Ray's HAProxy."""

from __future__ import annotations

import asyncio
import os
import time

import structlog
from prometheus_client import start_http_server

from serving.api.app import Gateway
from serving.cluster.names import APP, deployment_name
from serving.cluster.ray import METRICS_PORT, PID, ReplicaWatch, RunningReplica, bind_loopback, node_ip
from serving.config import GalerneConfig
from serving.metrics.gateway import GatewayMetrics

METRICS_PORTS = 16  # gateway replicas of one node take the first free port of this many

log = structlog.get_logger("galerne.gateway")


class GatewayReplica:
    """Builds the ASGI app and feeds it the running engine replicas."""

    def __init__(self, config: GalerneConfig, token: str, loopback: bool, *engines: object) -> None:
        del engines  # bound only so that Serve deploys them with the gateway
        if loopback:
            bind_loopback()
        self._config = config
        self._metrics = GatewayMetrics(time.monotonic)
        self._gateway = Gateway(config, engine_token=token, metrics=self._metrics, echo_request_id=False)
        self._metrics_port = _serve_metrics(
            self._metrics, "127.0.0.1" if loopback else node_ip(), config.gateway.metrics_port
        )
        self._watch: ReplicaWatch | None = None

    async def __serve_build_asgi_app__(self) -> Gateway:
        """Called by Serve on the replica's event loop; what is returned answers HTTP."""
        self._watch = ReplicaWatch(
            APP,
            {model.id: deployment_name(model.id) for model in self._config.models},
            self._update,
            asyncio.get_running_loop(),
            client_id=f"galerne-gateway-{os.getpid()}",
        )
        return self._gateway

    def record_replica_metadata(self) -> dict[str, int]:
        """Published by Serve with the replica: what scrapers and `galerne status` look for."""
        return {PID: os.getpid(), METRICS_PORT: self._metrics_port}

    def _update(self, model: str, replicas: tuple[RunningReplica, ...]) -> None:
        found = (replica.endpoint() for replica in replicas)
        self._gateway.update_replicas(model, tuple(e for e in found if e is not None))


def _serve_metrics(metrics: GatewayMetrics, host: str, first_port: int) -> int:
    for port in range(first_port, first_port + METRICS_PORTS):
        try:
            start_http_server(port, host, registry=metrics.registry)
        except OSError:
            continue
        return port
    log.warning("no free metrics port: this gateway replica is not scraped", first=first_port)
    return 0
