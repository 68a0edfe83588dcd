"""One replica of a model as a Ray Serve deployment: an engine, its private HTTP port, its life."""

from __future__ import annotations

import os
from typing import Any, Protocol

from serving.cluster.placement import cluster_address, own_placement_group
from serving.cluster.ray import HOST, PID, PORT, bind_loopback, node_ip
from serving.config import ModelConfig
from serving.engine.fake.replica import FakeEngine
from serving.engine.host_spec import HostSpec, RayPlacement
from serving.engine.hosted import HostedEngine


class Engine(Protocol):
    """What a replica needs of an engine, real or fake."""

    host: str

    @property
    def port(self) -> int:
        """Where its OpenAI app listens, once started."""

    async def start(self) -> None:
        """Come up; raises EngineError with what is wrong."""

    async def check_health(self) -> None:
        """Raise EngineError when requests can no longer be answered."""

    async def stop(self) -> None:
        """Let streams in flight finish within the model's bound, then end every process."""


class EngineReplica:
    """Runs an engine and publishes where its app listens; the gateway speaks to it there, not through Ray."""

    # Serve awaits an async constructor: an engine starts on the replica's own event loop.
    async def __init__(self, model: ModelConfig, token: str, *, loopback: bool, gpu: bool) -> None:  # type: ignore[misc]
        if loopback:
            bind_loopback()
        host = "127.0.0.1" if loopback else node_ip()
        self._engine: Engine
        if model.is_fake:
            self._engine = FakeEngine(model, host, token)
        else:
            self._engine = HostedEngine(model, host, lambda: _spec(model, host, token, gpu=gpu))
        await self._engine.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Published by Serve with the replica: the gateway's way to it."""
        return {HOST: self._engine.host, PORT: self._engine.port, PID: os.getpid()}

    async def check_health(self) -> None:
        """Called by Serve; an exception gets the replica replaced."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.stop()


def _spec(model: ModelConfig, host: str, token: str, *, gpu: bool) -> HostSpec:
    from serving.engine.sources import cache_root, prepare

    placement = None
    if gpu and model.parallel.workers > 1:
        placement = RayPlacement(address=cluster_address(), group=own_placement_group())
    weights = prepare(model.source, cache_root(os.environ)).path
    return HostSpec(model=model, weights=weights, host=host, token=token, gpu=gpu, placement=placement)
