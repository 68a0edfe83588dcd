"""The gateway's connection to the Redis that gateways share, and whether it answers.

Promises: a call takes at most `CALL_S`; after one that failed nobody waits for another, every call fails at once, until
`probe` finds the store again. No password of the URL is ever shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog

from serving.admission.quota_store import StoreDown

CALL_S = 1.0
# Beyond it calls wait for one another, within CALL_S. A call takes a fraction of a millisecond and a new connection
# several: a burst is through a few sooner than through many new ones.
CONNECTIONS = 16

log = structlog.get_logger("galerne.limits")
T = TypeVar("T")


class RedisLink:
    """One pool of connections."""

    def __init__(
        self, url: str, on_change: Callable[[bool], None] = lambda _: None, password: str | None = None
    ) -> None:
        """`on_change(up)` is called when the store is lost or found; `password` serves where the URL has none."""
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        pool = BlockingConnectionPool.from_url(
            url,
            # The URL's own goes before it.
            password=password,
            max_connections=CONNECTIONS,
            timeout=CALL_S,
            socket_timeout=CALL_S,
            socket_connect_timeout=CALL_S,
            # A connection that the server has closed meanwhile is replaced; what may have been done is not done again.
            retry=Retry(NoBackoff(), 0),
            health_check_interval=30,
        )
        self.redis: Any = Redis(connection_pool=pool)
        self.where = urlsplit(url).hostname or ""
        self.up = True
        self._on_change = on_change

    def __repr__(self) -> str:
        return f"RedisLink({self.where!r}, up={self.up})"

    async def call(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """`work(redis)` within the time; StoreDown where it fails, or where the last one did."""
        if not self.up:
            raise StoreDown
        return await self._try(work)

    async def probe(self) -> bool:
        """Whether the store answers now."""

        async def ping(redis: Any) -> None:
            await redis.ping()

        try:
            await self._try(ping)
        except StoreDown:
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        await self.redis.aclose(close_connection_pool=True)

    async def _try(self, work: Callable[[Any], Awaitable[T]]) -> T:
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(CALL_S):
                result = await work(self.redis)
        except (RedisError, OSError, TimeoutError) as error:
            if self.up:
                # The kind alone: a message may hold the address with its password.
                log.warning("the store of limits does not answer", host=self.where, kind=type(error).__name__)
            self._set(up=False)
            raise StoreDown(asked=True) from error
        self._set(up=True)
        return result

    def _set(self, *, up: bool) -> None:
        if up != self.up:
            self.up = up
            self._on_change(up)
            if up:
                log.info("the store of limits answers again", host=self.where)
