"""The replica's side of an engine that lives in a process of its own (serving.engine.host)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from serving.config import ModelConfig
from serving.engine import on_cpu
from serving.engine.host_spec import HostSpec
from serving.errors import EngineError

HEALTH_TIMEOUT_S = 8.0
# Beyond the drain, for the core to end; then the process is killed.
STOP_MARGIN_S = 10.0


class HostedEngine:
    """Starts an engine's process, watches it, drains and ends it."""

    def __init__(self, model: ModelConfig, host: str, spec: Callable[[], HostSpec]) -> None:
        """`spec` is asked for when the engine starts: it may prepare weights first."""
        self._model = model
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self.host = host
        self.port = 0

    async def start(self) -> None:
        """Return when the engine has answered its first request; raises EngineError with what is wrong."""
        spec = await asyncio.to_thread(self._spec)
        readable, writable = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - this interpreter; it does not wait
                [sys.executable, "-m", "serving.engine.host", str(writable)],
                stdin=subprocess.PIPE,
                pass_fds=(writable,),
                env=os.environ | _environment(spec),
                start_new_session=True,
            )
        finally:
            os.close(writable)
        with os.fdopen(readable) as replies:
            self._tell(self._process, spec)
            try:
                async with asyncio.timeout(self._model.start_timeout_s):
                    line = await asyncio.to_thread(replies.readline)
            except TimeoutError:
                self._process.kill()
                raise EngineError(
                    f"model {self._model.id!r} did not start within {self._model.start_timeout_s:.0f} s "
                    "(start_timeout_s)"
                ) from None
        reply = json.loads(line) if line else {"error": f"the engine's process ended with {self._process.wait()}"}
        if "error" in reply:
            raise EngineError(f"vLLM cannot start model {self._model.id!r}: {reply['error']}")
        self.port = int(reply["port"])

    async def check_health(self) -> None:
        """Raise EngineError when the process or its core has died, or does not answer in time."""
        if self._process is None or self._process.poll() is not None:
            raise EngineError(f"the engine process of model {self._model.id!r} has ended")
        await asyncio.to_thread(self._ask_health)

    async def stop(self) -> None:
        """Let streams in flight finish within the model's bound, then end the process."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, self._model.drain_timeout_s + STOP_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _tell(process: subprocess.Popen[bytes], spec: HostSpec) -> None:
        # The pipe stays open: its end tells the process that this replica is gone.
        if process.stdin is not None:
            process.stdin.write(spec.model_dump_json().encode() + b"\n")
            process.stdin.flush()

    def _ask_health(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        try:
            with urllib.request.urlopen(f"http://{host}:{self.port}/health", timeout=HEALTH_TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            raise EngineError(f"the engine of model {self._model.id!r} reports {error.code}") from None
        except OSError as error:
            raise EngineError(f"the engine of model {self._model.id!r} does not answer: {error}") from None


def _environment(spec: HostSpec) -> dict[str, str]:
    if spec.gpu:
        return {}
    torch = importlib.util.find_spec("torch")  # found, not imported
    if torch is None or torch.origin is None:
        raise EngineError("PyTorch is not installed: `make install` installs the engine")
    return on_cpu.environment(os.environ, on_cpu.threads(spec.model), Path(torch.origin).parent.parent)
