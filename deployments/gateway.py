"""The gateway as a Ray Serve ingress deployment behind Ray's HAProxy."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import start_http_server
from ray.serve.handle import DeploymentHandle

from serving.admission import heap
from serving.api.app import Gateway
from serving.api.reload import Reloader
from serving.cluster import processes
from serving.cluster.environment import ENV_LIMITS_FILE
from serving.cluster.names import APP, GATEWAY, deployment_name
from serving.cluster.ray import (
    CAPACITY,
    HOST,
    METRICS_PORT,
    PID,
    START_S,
    TOKEN_IDS,
    ReplicaWatch,
    RunningReplica,
    Waker,
    bind_loopback,
    node_ip,
)
from serving.config import ENV_LIMITS_STORE_PASSWORD, GalerneConfig, Source
from serving.metering.ledger import Ledger
from serving.metering.settings import settings
from serving.metrics import targets
from serving.metrics.gateway import GatewayMetrics

# Key of the gateways among the watched deployments: no model's id is empty.
GATEWAYS = ""
METRICS_PORTS = 16  # gateway replicas of one node take the first free port of this many

log = structlog.get_logger("galerne.gateway")


class GatewayReplica:
    """Builds the ASGI app and feeds it the running engine replicas."""

    def __init__(
        self,
        config: GalerneConfig,
        token: str,
        loopback: bool,
        gpus: dict[str, float],
        source: Source | None,
        *engines: DeploymentHandle,
    ) -> None:
        """`engines`: the models' deployments, in the configuration's order; `gpus`: what a replica of each takes.

        `source`: the file whose tenants are followed.
        """
        if loopback:
            bind_loopback()
        heap.tune()
        self._config = config
        self._metrics = GatewayMetrics(time.monotonic)
        self._metrics.gpus(gpus)
        self._wakers = {
            model.id: Waker(engine)
            for model, engine in zip(config.models, engines, strict=True)
            if model.replicas.min == 0
        }
        self._ledger = Ledger(settings(config.ledger, os.environ), f"{time.time_ns():x}{secrets.token_hex(4)}")
        self._gateway = Gateway(
            config,
            engine_token=token,
            metrics=self._metrics,
            echo_request_id=False,
            wake=self._wake,
            ledger=self._ledger,
            limits_file=Path(os.environ[ENV_LIMITS_FILE]) if ENV_LIMITS_FILE in os.environ else None,
            limits_password=os.environ.get(ENV_LIMITS_STORE_PASSWORD),
        )
        self._reloader = None if source is None else Reloader(source, config, self._gateway.reload, self._metrics)
        if self._reloader is not None:
            self._reloader.start()
        self._background: list[asyncio.Task[None]] = []
        self._host = "127.0.0.1" if loopback else node_ip()
        # By deployment, a new list at every change: another thread reads them.
        self._targets: dict[str, list[dict[str, Any]]] = {}
        self._metrics_port = _serve_metrics(self._metrics, self._host, config.gateway.metrics_port, self._rows)
        self._watch: ReplicaWatch | None = None

    async def __serve_build_asgi_app__(self) -> Gateway:
        """Called by Serve on the replica's event loop; what is returned answers HTTP."""
        self._watch = ReplicaWatch(
            APP,
            {model.id: deployment_name(model.id) for model in self._config.models} | {GATEWAYS: GATEWAY},
            self._update,
            asyncio.get_running_loop(),
            client_id=f"galerne-gateway-{os.getpid()}",
        )
        self._ledger.start()
        self._gateway.start()
        if self._reloader is not None:
            self._background = [asyncio.create_task(self._reloader.run(), name="reload")]
        if processes.ENV_TAKES_TURNS in os.environ:
            processes.takes_turns()
        # Modules and configuration stay for good: no collection walks them again while streams wait for it.
        gc.collect()
        gc.freeze()
        return self._gateway

    async def __del__(self) -> None:
        """Called by Serve when the replica goes, its requests having ended: rows, budgets and spans are written."""
        gateway = getattr(self, "_gateway", None)
        if gateway is not None:
            await gateway.finish()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Published by Serve with the replica: what scrapers and `galerne status` look for."""
        return {PID: os.getpid(), HOST: self._host, METRICS_PORT: self._metrics_port}

    def _rows(self) -> list[dict[str, Any]]:
        return [row for rows in list(self._targets.values()) for row in rows]

    def _update(self, model: str, replicas: tuple[RunningReplica, ...]) -> None:
        release = self._config.release
        if model == GATEWAYS:
            known = (r.metadata for r in replicas if HOST in r.metadata and r.metadata.get(METRICS_PORT))
            self._gateway.divide(len(replicas))
            self._targets[model] = [targets.gateway_row(str(m[HOST]), int(m[METRICS_PORT]), release) for m in known]
            return
        for replica in replicas:
            if START_S in replica.metadata:
                self._gateway.hold[model].measured(float(replica.metadata[START_S]))
            if CAPACITY in replica.metadata:
                self._gateway.hold[model].learn(replica.metadata[CAPACITY])
        said = (int(replica.metadata[TOKEN_IDS]) for replica in replicas if TOKEN_IDS in replica.metadata)
        self._gateway.vocabularies.learn(model, said)
        endpoints = tuple(e for replica in replicas if (e := replica.endpoint()) is not None)
        self._targets[model] = [targets.engine_row(e.host, e.port, model, e.replica_id, release) for e in endpoints]
        self._gateway.update_replicas(model, endpoints)

    def _wake(self, model: str) -> None:
        if model in self._wakers:
            log.info("waking", model=model)
            self._wakers[model].wake()


def _serve_metrics(
    metrics: GatewayMetrics, host: str, first_port: int, rows: Callable[[], list[dict[str, Any]]]
) -> int:
    for port in range(first_port, first_port + METRICS_PORTS):
        try:
            server, _ = start_http_server(port, host, registry=metrics.registry)
        except OSError:
            continue
        server.set_app(targets.app(metrics.registry, rows))
        return port
    log.warning("no free metrics port: this gateway replica is not scraped", first=first_port)
    return 0
