"""Starts of replicas that failed, told from the replica that could not start to the controller that asked for it.

Serve tries again by itself and shows a policy only what runs, and the replica's process is gone before anybody could
scrape it. Ray's own key-value store is what both can reach; a count a deployment is all that stands in it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache

import structlog
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list, _internal_kv_put

NAMESPACE = "galerne"
PREFIX = "failed-starts:"
PERIOD_S = 5.0

log = structlog.get_logger("galerne.starts")


def count(model: str) -> None:
    """Add one; never raises, because the start's own error is what is to be seen."""
    try:
        key = PREFIX + model
        before = _internal_kv_get(key, namespace=NAMESPACE)
        # Two replicas of a model that fail in the same instant may count as one.
        _internal_kv_put(key, str(int(before or b"0") + 1), overwrite=True, namespace=NAMESPACE)
    except Exception as error:
        log.warning("a failed start is not counted", model=model, error=str(error))


class FailedStarts:
    """The counts as they last were; read by a thread, because Ray's store may keep a reader waiting."""

    def __init__(self) -> None:
        self._counts: Mapping[str, int] = {}
        self._told = False
        threading.Thread(target=self._read, name="failed-starts", daemon=True).start()

    def __call__(self, model: str) -> int:
        """Failed starts of a model since the cluster began, as far as they are known; returns at once."""
        return self._counts.get(model, 0)

    def look(self) -> None:
        """Read once; that it cannot be read is told once, until it can be again."""
        try:
            self._counts = {
                key.decode().removeprefix(PREFIX): int(_internal_kv_get(key, namespace=NAMESPACE) or b"0")
                for key in _internal_kv_list(PREFIX, namespace=NAMESPACE)
            }
            self._told = False
        except Exception as error:
            if not self._told:
                log.warning("failed starts cannot be read", error=str(error))
            self._told = True

    def _read(self) -> None:
        pause = threading.Event()
        while True:
            self.look()
            pause.wait(PERIOD_S)


@cache
def reader() -> FailedStarts:
    """The reader of this process."""
    return FailedStarts()
