"""vLLM's own word on its load: the last statistics of its scheduler, through its interface for loggers of them.

vLLM hands them to every logger once a pass, in the process of its API: reading them asks nobody for anything. The
logger here has the methods of vLLM's `StatLoggerBase` and is none, so that nothing of vLLM is imported; a contract test
holds it against vLLM's source.
"""

from __future__ import annotations

from typing import Any

from serving.engine.load import EngineLoad


class VllmLoad:
    """The load of one engine, over all its cores (there are several with data parallelism)."""

    def __init__(self) -> None:
        self._by_core: dict[int, EngineLoad] = {}

    def logger(self, _config: Any, core: int = 0) -> _Logger:
        """What vLLM takes for a factory of loggers, called once a core."""
        return _Logger(self._by_core, core)

    def now(self) -> EngineLoad:
        """As of the last pass; nothing before the first."""
        cores = self._by_core.values()
        if not cores:
            return EngineLoad()
        return EngineLoad(
            sum(core.running for core in cores),
            sum(core.waiting for core in cores),
            sum(core.kv_use for core in cores) / len(cores),
        )


class _Logger:
    """One core's."""

    def __init__(self, by_core: dict[int, EngineLoad], core: int) -> None:
        self._by_core = by_core
        self._core = core

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,  # noqa: ARG002 - vLLM passes it
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Once a pass; None where the scheduler said nothing."""
        if scheduler_stats is not None:
            self._by_core[self._core] = EngineLoad(
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                scheduler_stats.kv_cache_usage,
            )

    def log_engine_initialized(self) -> None:
        """Nothing to write."""

    def log(self) -> None:
        """Nothing to write."""
