"""The fake engine as an engine replica runs it: the life of a real one, simulated tokens, no process of its own."""

from __future__ import annotations

from serving.config import FakeEngineConfig, ModelConfig
from serving.engine.fake.app import build_app
from serving.engine.private_server import PrivateServer
from serving.errors import EngineError


class FakeEngine:
    """Starts the simulated engine and its port, reports its health, drains and ends it."""

    def __init__(self, model: ModelConfig, host: str, token: str) -> None:
        self._app = build_app(model.fake or FakeEngineConfig(), model.id, task=model.task)
        self._server = PrivateServer(self._app, host=host, token=token)
        self._drain_timeout_s = model.drain_timeout_s
        self.host = host

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._server.port

    async def start(self) -> None:
        """Begin the simulated start."""
        await self._app.start()
        await self._server.start()

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
