"""Gives vLLM's workers a method that tells how long they compiled: only they know, and their log says it to nobody.

vLLM mixes this class into its worker's (`worker_extension_cls`), in whatever process and on whatever node that runs.
"""

from __future__ import annotations

from typing import Any

# By name, as vLLM imports it in the worker.
EXTENSION = "serving.engine.worker_times.WorkerTimes"
METHOD = "galerne_compile_s"


class WorkerTimes:
    """Mixed into a worker; no name of it may be one of the worker's own."""

    vllm_config: Any

    def galerne_compile_s(self) -> float:
        """Seconds that torch.compile took in this worker; 0 where nothing is compiled."""
        compiled = self.vllm_config.compilation_config
        return float(compiled.compilation_time) + float(compiled.encoder_compilation_time)
