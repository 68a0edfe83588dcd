"""`python -m serving.engine.fake`: the fake engine alone on a port, a direct target for load tests."""

from __future__ import annotations

import argparse
import sys

import uvicorn
from pydantic import ValidationError

from serving.config import FakeEngineConfig
from serving.engine.fake import build_app

# Load tests open thousands of connections at once.
BACKLOG = 4096
# Streams still running after it are cut when the server is told to stop.
SHUTDOWN_S = 1


def main() -> None:
    """Reads the command line and serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m serving.engine.fake", description=__doc__)
    parser.add_argument("--model", required=True, help="name the model is served under")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--task", choices=("generate", "embed"), default="generate")
    parser.add_argument("--config-json", default="{}", help="fields of `fake` in the configuration, as JSON")
    arguments = parser.parse_args()
    try:
        config = FakeEngineConfig.model_validate_json(arguments.config_json)
    except ValidationError as error:
        sys.exit(f"--config-json: {error}")
    uvicorn.run(
        build_app(config, arguments.model, task=arguments.task),
        host=arguments.host,
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


if __name__ == "__main__":
    main()
