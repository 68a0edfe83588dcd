"""What runs in a replica's process leaves that process's log handlers alone.

Ray Serve keeps its log file in a buffering handler. A controller that comes back asks every replica for the path of that
file, and stops each one whose handler was closed.
"""

from __future__ import annotations

import logging
import logging.handlers
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.config import ModelConfig
from serving.engine.fake.replica import FakeEngine

SERVE_LOGGER = "ray.serve"
# Everything that a replica's process imports.
IMPORTS = """
import logging, logging.handlers, sys
buffered = logging.handlers.MemoryHandler(1, target=logging.FileHandler(sys.argv[1]))
logging.getLogger("ray.serve").addHandler(buffered)
import deployments.app, deployments.engine, deployments.gateway, deployments.scaling
import serving.engine.sources, serving.engine.sources.adapters, serving.tracing
assert buffered.target is not None, "an import closed the process's log handlers"
# Its logger closes them when it is imported: vLLM has a process of its own.
assert "vllm" not in sys.modules
"""


@pytest.fixture
def buffered(tmp_path: Path) -> Iterator[logging.handlers.MemoryHandler]:
    """The process's log, as Ray Serve sets it up in each of its actors."""
    file = logging.FileHandler(tmp_path / "replica.log")
    handler = logging.handlers.MemoryHandler(1, target=file)
    logger = logging.getLogger(SERVE_LOGGER)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    handler.close()
    file.close()


async def test_an_engines_server_leaves_the_handlers(buffered: logging.handlers.MemoryHandler) -> None:
    model = ModelConfig.model_validate({"id": "m", "source": "fake:m"})
    engine = FakeEngine(model, "127.0.0.1", "token")
    await engine.start()
    assert buffered.target is not None
    await engine.stop()
    assert buffered.target is not None


def test_what_a_replica_imports_leaves_the_handlers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTS, str(tmp_path / "replica.log")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
