"""One replica of a model as a Ray Serve deployment: an engine, its private HTTP port, its life."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from serving.cluster import failed_starts
from serving.cluster.placement import cluster_address, own_placement_group
from serving.cluster.ray import CAPACITY, HOST, PID, PORT, START_S, TOKEN_IDS, bind_loopback, node_ip
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

    @property
    def phases_s(self) -> Mapping[str, float]:
        """How long the phases of its start took, once started: load, compile, warm_up."""

    @property
    def capacity(self) -> Mapping[str, int]:
        """What it computes at a time, once started, as far as it says: sequences, kv_tokens."""

    @property
    def token_ids(self) -> int:
        """How many token ids its model has, once started: they are 0 and up."""

    async def start(self) -> None:
        """Come up; raises EngineError with what is wrong."""

    async def check_health(self) -> None:
        """Raise EngineError when requests can no longer be answered."""

    async def stop(self) -> None:
        """Let streams in flight finish within the model's bound, then end every process."""


class EngineReplica:
    """Runs an engine and publishes where its app listens; the gateway speaks to it there, not through Ray."""

    # Serve awaits an async constructor: an engine starts on the replica's own event loop.
    async def __init__(  # type: ignore[misc]
        self, model: ModelConfig, token: str, *, loopback: bool, gpu: bool, traces_url: str | None = None
    ) -> None:
        began_s = time.monotonic()
        if loopback:
            bind_loopback()
        host = "127.0.0.1" if loopback else node_ip()
        self._engine: Engine
        if model.is_fake:
            self._engine = FakeEngine(model, host, token)
        else:
            self._engine = HostedEngine(model, host, lambda: _spec(model, host, token, traces_url, gpu=gpu))
        try:
            await self._engine.start()
        except Exception:
            failed_starts.count(model.id)
            raise
        self._start_s = time.monotonic() - began_s

    def record_replica_metadata(self) -> dict[str, Any]:
        """Published by Serve with the replica: the gateway's way to it, how long it took to start, what it takes."""
        return {
            HOST: self._engine.host,
            PORT: self._engine.port,
            PID: os.getpid(),
            START_S: self._start_s,
            CAPACITY: dict(self._engine.capacity),
            TOKEN_IDS: self._engine.token_ids,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Reported by Serve to its controller: `deployments.scaling` exports it."""
        return {f"{phase}_start_s": seconds for phase, seconds in self._engine.phases_s.items()}

    async def wake(self) -> None:
        """Answered by being there: a gateway calls it where no replica runs."""

    async def check_health(self) -> None:
        """Called by Serve; an exception gets the replica replaced."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.stop()


def _spec(model: ModelConfig, host: str, token: str, traces_url: str | None, *, gpu: bool) -> HostSpec:
    from serving.engine.sources import cache_root, prepare
    from serving.engine.sources.adapters import prepare_adapter

    placement = None
    if gpu and model.parallel.workers > 1:
        placement = RayPlacement(address=cluster_address(), group=own_placement_group())
    cache = cache_root(os.environ)
    weights = prepare(model.source, cache).path
    return HostSpec(
        model=model,
        weights=weights,
        adapters={adapter.id: prepare_adapter(adapter.source, cache) for adapter in model.adapters},
        host=host,
        token=token,
        gpu=gpu,
        placement=placement,
        otlp_traces_url=traces_url,
    )
