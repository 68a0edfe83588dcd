"""One replica of a model as a Ray Serve deployment: an engine, its private HTTP server, its life."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from serving.cluster.ray import HOST, PID, PORT, bind_loopback, node_ip
from serving.config import FakeEngineConfig, ModelConfig
from serving.engine.private_server import App, PrivateServer
from serving.engine.start_turn import start_turn


class Engine(Protocol):
    """What a replica needs of an engine, real or fake."""

    async def start(self) -> App:
        """Come up and return the OpenAI app."""

    def attach(self, server: Any) -> None:
        """Learn the HTTP server around the app."""

    async def check_health(self) -> None:
        """Raise EngineError when requests can no longer be answered."""

    async def shutdown(self) -> None:
        """End every process of the engine."""


class EngineReplica:
    """Runs an engine and publishes where its app listens; the gateway speaks to it there, not through Ray."""

    # Serve awaits an async constructor: an engine starts on the replica's own event loop.
    async def __init__(  # type: ignore[misc]
        self, model: ModelConfig, token: str, *, position: int, loopback: bool, gpu: bool
    ) -> None:
        self._model = model
        if loopback:
            bind_loopback()
        in_turn = contextlib.nullcontext() if gpu or model.is_fake else _turn(position)
        async with in_turn:
            self._engine: Engine = _engine(model, gpu=gpu)
            app = await self._engine.start()
        self._server = PrivateServer(app, host="127.0.0.1" if loopback else node_ip(), token=token)
        self._engine.attach(self._server.server)
        await self._server.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Published by Serve with the replica: the gateway's way to it."""
        return {HOST: self._server.host, PORT: self._server.port, PID: os.getpid()}

    async def check_health(self) -> None:
        """Called by Serve; an exception gets the replica replaced."""
        await self._engine.check_health()
        self._server.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes: streams in flight finish first, within the model's bound."""
        server = getattr(self, "_server", None)
        if server is not None:
            await server.drain(self._model.drain_timeout_s)
            await server.stop()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.shutdown()


def _turn(position: int) -> AbstractAsyncContextManager[None]:
    from serving.engine.sources import cache_root

    return start_turn(cache_root(os.environ) / "locks", position, len(os.sched_getaffinity(0)))


def _engine(model: ModelConfig, *, gpu: bool) -> Engine:
    if model.is_fake:
        from serving.engine.fake.replica import FakeEngine

        return FakeEngine(model.fake or FakeEngineConfig(), model)
    from serving.engine.sources import cache_root, prepare
    from serving.engine.vllm_engine import VllmEngine

    return VllmEngine(model, prepare(model.source, cache_root(os.environ)).path, gpu=gpu)
