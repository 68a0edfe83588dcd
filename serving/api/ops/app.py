"""Answers the ops page's four paths from memory: nobody else is waited for, and the event loop is not held up."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any, Final

from serving.api.ops.cluster import NO_CLUSTER, Cluster, Facts
from serving.api.ops.state import Counted, Counts, Ejected, Holds, Loads, Own, counted, document
from serving.config import GalerneConfig
from serving.errors import MethodNotAllowed

PAGE: Final = "/ops"
STATE: Final = "/ops/state"
_FILES: Final = {
    PAGE: ("page.html", b"text/html; charset=utf-8"),
    "/ops/page.js": ("page.js", b"text/javascript; charset=utf-8"),
    "/ops/page.css": ("page.css", b"text/css; charset=utf-8"),
}
PATHS: Final = frozenset({*_FILES, STATE})
# A page refreshes every few seconds; however many are open, the state is put together once in two seconds
# at most: it reads every series of the gateway's counters, as a scrape does.
KEPT_S: Final = 2.0

Headers = tuple[tuple[bytes, bytes], ...]

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_SAFETY: Final[Headers] = (
    (b"content-security-policy", POLICY.encode()),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes


class Ops:
    """The page of one gateway."""

    def __init__(
        self,
        config: GalerneConfig,
        own: Own,
        cluster: Cluster | None,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._own = own
        self._cluster = cluster
        self._clock = clock
        self._wall = wall
        self._started_s = clock()
        self._making = asyncio.Lock()
        self._kept: tuple[float, Answer] | None = None

    @classmethod
    def of(
        cls,
        config: GalerneConfig,
        loads: Loads,
        holds: Holds,
        health: Ejected,
        counts: Counts,
        in_flight: Callable[[], int],
        clock: Callable[[], float],
    ) -> Ops:
        """The page of a configuration."""
        settings = config.prometheus
        cluster = (
            None if settings is None else Cluster(settings.url, settings.query_timeout_s, clock, release=config.release)
        )
        own = Own(loads, holds, health, counts, in_flight)
        return cls(config, own, cluster, clock=clock)

    def follow(self, config: GalerneConfig) -> None:
        """Tell of this configuration's tenants from now on."""
        self._config = config
        self._kept = None

    async def answer(self, path: str, method: str, enter: Callable[[], object]) -> Answer:
        """The answer of one of PATHS; raises MethodNotAllowed, and what `enter` raises for who is no administrator."""
        if path == STATE:
            enter()
        if method != "GET":
            raise MethodNotAllowed(f"{path} takes GET.", allow=("GET",))
        return await self._state() if path == STATE else _file(path)

    async def _state(self) -> Answer:
        async with self._making:
            now_s = self._clock()
            if self._kept is None or now_s - self._kept[0] >= KEPT_S:
                sums = await asyncio.to_thread(counted, self._own.counts)
                self._kept = (now_s, _answer(b"application/json", _encoded(self._document(now_s, sums))))
            return self._kept[1]

    def _document(self, now_s: float, sums: Counted) -> dict[str, Any]:
        facts: Facts = NO_CLUSTER if self._cluster is None else self._cluster.facts()
        found = document(self._config, self._own, sums, facts)
        found["at"] = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds")
        found["gateway"] |= {"process": os.getpid(), "up_s": round(now_s - self._started_s)}
        found["prometheus"] = {
            "configured": self._cluster is not None,
            "age_s": None if facts.asked_at_s is None else round(now_s - facts.asked_at_s, 1),
            "problem": facts.problem,
        }
        return found


@cache
def _file(path: str) -> Answer:
    name, kind = _FILES[path]
    return _answer(kind, (files("serving.api.ops") / "page" / name).read_bytes())


def _answer(kind: bytes, body: bytes) -> Answer:
    return Answer(200, ((b"content-type", kind), (b"content-length", str(len(body)).encode()), *_SAFETY), body)


def _encoded(found: dict[str, Any]) -> bytes:
    # No browser reads NaN; `document` leaves none, and this makes sure.
    return json.dumps(found, allow_nan=False, separators=(",", ":")).encode()
