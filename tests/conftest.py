"""What several kinds of test share: gateways that must leave nothing behind, and the event loop of production."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from tests.gateway_rig import Rig, StartRig, leak_check

# Modules about sockets, which asyncio and uvloop treat differently in detail.
BOTH_LOOPS = frozenset({"test_upstream.py"})


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The gateway runs on uvloop, so do its tests."""
    if item.path.name in BOTH_LOOPS:
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    if item.path.name.startswith("test_gateway"):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
async def start_gateway() -> AsyncIterator[StartRig]:
    """Starts a gateway before given engines; at the end nothing of it may be left: requests, tasks, sockets."""
    rigs: list[Rig] = []
    async with leak_check():

        async def start(*engines: object, **settings: object) -> Rig:
            rig = await Rig.start(*engines, **settings)  # type: ignore[arg-type]
            rigs.append(rig)
            return rig

        yield start
        for rig in rigs:
            await rig.close()
