"""The fake engine as an engine replica runs it: same life as a real one, simulated tokens."""

from __future__ import annotations

from typing import Any

from serving.config import FakeEngineConfig, ModelConfig
from serving.engine.fake.app import FakeApp, build_app
from serving.errors import EngineError


class FakeEngine:
    """Starts the simulated engine and reports its health."""

    def __init__(self, config: FakeEngineConfig, model: ModelConfig) -> None:
        self._app = build_app(config, model.id, task=model.task)

    async def start(self) -> FakeApp:
        """Begin the simulated start."""
        await self._app.start()
        return self._app

    def attach(self, server: Any) -> None:
        """The fake engine does not stop its server."""

    async def check_health(self) -> None:
        """Raise EngineError once it has been closed."""
        if not self._app.healthy:
            raise EngineError("the fake engine is not healthy")

    async def shutdown(self) -> None:
        """Abort what runs."""
        await self._app.aclose()
