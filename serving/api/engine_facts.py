"""Asks each new engine replica once how much its KV cache holds: routing mirrors caches and must know their size.

vLLM says so in its metrics (`vllm:cache_config_info`). They are long, so this is asked at a replica's coming and never
again, and only where prompts are compared and the configuration does not say. An engine that does not tell is taken to
be like the last one that did.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

import structlog

from serving.api.upstream import Pool, UpstreamError
from serving.routing.replicas import Endpoint, ReplicaSet

TIMEOUT_S: Final = 10.0
MOST_BYTES: Final = 8 * 1024 * 1024
_INFO: Final = re.compile(rb"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL: Final = re.compile(rb'\b(num_gpu_blocks|block_size)="(\d{1,12})"')
OK: Final = 200

log = structlog.get_logger("galerne.gateway")


class EngineFacts:
    """Questions under way, one a new replica."""

    def __init__(self, pool: Pool, replicas: ReplicaSet) -> None:
        self._pool = pool
        self._replicas = replicas
        self._asking: set[asyncio.Task[None]] = set()

    def ask(self, model: str, endpoint: Endpoint) -> None:
        """Ask a replica that has come; off the event loop nobody can be asked, and defaults stand."""
        if not self._replicas.wants_kv_tokens(model):
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        task = loop.create_task(self._ask(model, endpoint))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def close(self) -> None:
        """Give up what is under way."""
        for task in self._asking:
            task.cancel()

    async def _ask(self, model: str, endpoint: Endpoint) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, text = await self._pool.get(endpoint, "/metrics", most_bytes=MOST_BYTES)
        except (UpstreamError, TimeoutError):
            status, text = 0, b""
        found = kv_tokens(text) if status == OK else None
        if found is None:
            log.info("a replica does not say how much its cache holds", model=model, replica=endpoint.replica_id)
        else:
            self._replicas.learned_kv_tokens(model, endpoint, found)


def kv_tokens(metrics: bytes) -> int | None:
    """Tokens of KV cache, from an engine's metrics; None where they do not say."""
    line = _INFO.search(metrics)
    sizes = dict(_LABEL.findall(line.group(1))) if line else {}
    if sizes.keys() != {b"num_gpu_blocks", b"block_size"}:
        return None
    return int(sizes[b"num_gpu_blocks"]) * int(sizes[b"block_size"]) or None
