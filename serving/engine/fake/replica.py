"""The fake engine as an engine replica runs it: the life of a real one, simulated tokens, no process of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from serving.config import FakeEngineConfig, ModelConfig
from serving.engine.fake.app import build_app
from serving.engine.private_server import PrivateServer
from serving.errors import EngineError

POLL_S = 0.05


class FakeEngine:
    """Starts the simulated engine and its port, reports its health, drains and ends it."""

    def __init__(self, model: ModelConfig, host: str, token: str) -> None:
        config = model.fake or FakeEngineConfig()
        self._app = build_app(config, model.id, task=model.task, adapters=(a.id for a in model.adapters))
        # As a real engine says it of itself.
        self.capacity = {"sequences": config.batch_slots, "kv_tokens": config.kv_blocks * config.block_tokens}
        self.token_ids = config.token_ids
        self._server = PrivateServer(self._app, host=host, token=token, load=self._app.load)
        self._drain_timeout_s = model.drain_timeout_s
        self.host = host
        self._start_s = 0.0

    @property
    def phases_s(self) -> Mapping[str, float]:
        """The simulated start, once it is over; it compiles nothing."""
        return {"load": self._start_s}

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._server.port

    async def start(self) -> None:
        """Return when the simulated start (`faults.slow_start_s`) is over, as a real engine's does."""
        began_s = time.monotonic()
        await self._app.start()
        await self._server.start()
        while not self._app.healthy:
            await asyncio.sleep(POLL_S)
        self._start_s = time.monotonic() - began_s

    async def check_health(self) -> None:
        """Raise EngineError once it has been closed."""
        if not self._app.healthy:
            raise EngineError("the fake engine is not healthy")
        self._server.check_health()

    async def stop(self) -> None:
        """Let streams in flight finish within the model's bound, abort the others."""
        await self._server.drain(self._drain_timeout_s)
        await self._server.stop()
        await self._app.aclose()
