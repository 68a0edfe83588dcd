"""The replica's side of an engine that lives in a process of its own (serving.engine.host)."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from serving.config import ModelConfig
from serving.engine import compile_cache, on_cpu
from serving.engine.host_spec import HostSpec
from serving.errors import EngineError

# What an engine's spans are found under.
ENGINE_SERVICE = "galerne-engine"
PROGRAM = ("-m", "serving.engine.host")
HEALTH_TIMEOUT_S = 8.0
# Beyond the drain, for the core to end; then the process is killed.
STOP_MARGIN_S = 10.0


class HostedEngine:
    """Starts an engine's process, watches it, drains and ends it."""

    def __init__(
        self, model: ModelConfig, host: str, spec: Callable[[], HostSpec], program: Sequence[str] = PROGRAM
    ) -> None:
        """`spec` is asked for when the engine starts: it may prepare weights first."""
        self._model = model
        self._spec = spec
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.host = host
        self.port = 0
        self.phases_s: Mapping[str, float] = {}
        self.capacity: Mapping[str, int] = {}
        self.token_ids = 0

    async def start(self) -> None:
        """Return when the engine has answered its first request; raises EngineError with what is wrong."""
        began_s = time.monotonic()
        spec = await asyncio.to_thread(self._spec)
        readable, writable = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - this interpreter; it does not wait
                [sys.executable, *self._program, str(writable)],
                stdin=subprocess.PIPE,
                bufsize=0,
                pass_fds=(writable,),
                env=os.environ | _environment(spec),
                start_new_session=True,
            )
        finally:
            os.close(writable)
        self._process = process
        try:
            with os.fdopen(readable) as replies:
                self.port = await self._reply(process, spec, replies)
        except BaseException:
            _end(process)
            raise
        # What the process does not account for: weights that had to be fetched, its own start.
        beyond_s = max(0.0, time.monotonic() - began_s - sum(self.phases_s.values()))
        self.phases_s = {**self.phases_s, "load": self.phases_s.get("load", 0.0) + beyond_s}

    async def _reply(self, process: subprocess.Popen[bytes], spec: HostSpec, replies: TextIO) -> int:
        if process.stdin is not None:
            # The pipe stays open: its end tells the process that this replica is gone.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(spec.model_dump_json().encode() + b"\n")
        waiting = asyncio.create_task(asyncio.to_thread(replies.readline))
        done, _ = await asyncio.wait({waiting}, timeout=self._model.start_timeout_s)
        if not done:
            process.kill()  # which ends the thread's reading
            await waiting
            raise EngineError(
                f"model {self._model.id!r} did not start within {self._model.start_timeout_s:.0f} s (start_timeout_s)"
            )
        line = waiting.result()
        reply: dict[str, Any] = (
            json.loads(line) if line else {"error": f"the engine's process ended with {process.wait()}"}
        )
        if "error" in reply:
            raise EngineError(f"vLLM cannot start model {self._model.id!r}: {reply['error']}")
        self.phases_s = {str(phase): float(seconds) for phase, seconds in reply.get("phases_s", {}).items()}
        self.capacity = {str(of): int(count) for of, count in reply.get("capacity", {}).items()}
        self.token_ids = int(reply["token_ids"])
        return int(reply["port"])

    async def check_health(self) -> None:
        """Raise EngineError when the process or its core has died, or does not answer in time."""
        if self._process is None or self._process.poll() is not None:
            raise EngineError(f"the engine process of model {self._model.id!r} has ended")
        await asyncio.to_thread(self._ask_health)

    async def stop(self) -> None:
        """Let streams in flight finish within the model's bound, then end the process."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, self._model.drain_timeout_s + STOP_MARGIN_S)
        _end(self._process)

    def _ask_health(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        try:
            with urllib.request.urlopen(f"http://{host}:{self.port}/health", timeout=HEALTH_TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            raise EngineError(f"the engine of model {self._model.id!r} reports {error.code}") from None
        except OSError as error:
            raise EngineError(f"the engine of model {self._model.id!r} does not answer: {error}") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _environment(spec: HostSpec) -> dict[str, str]:
    found = compile_cache.environment(os.environ)
    if spec.otlp_traces_url is not None:
        # vLLM speaks gRPC unless it is told.
        found |= {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": ENGINE_SERVICE}
    return found if spec.gpu else found | cpu_environment(spec.model)


def cpu_environment(model: ModelConfig) -> dict[str, str]:
    """What the process of a model's engine on processors finds in its environment; EngineError without PyTorch."""
    torch = importlib.util.find_spec("torch")  # found, not imported
    if torch is None or torch.origin is None:
        raise EngineError("PyTorch is not installed: `make install` installs the engine")
    return on_cpu.environment(os.environ, on_cpu.threads(model), Path(torch.origin).parent.parent)
