"""Several gateways before the same replicas: each tells the others what it has placed where, at the replicas' ports.

Some times a second every replica's port is posted what this gateway has sent there since, and answers with what others
have (serving.engine.placements) and with its load. What a port does not take is posted again; what is lost with it
costs a prompt computed twice, never an answer. One gateway alone posts nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from serving.api.upstream import Pool, UpstreamError
from serving.engine.placements import EXCHANGE, MOST_BYTES, packed, packed_bytes, unpacked
from serving.routing.replicas import Endpoint, ReplicaSet

INTERVAL_S: Final = 0.25
# With more replicas than make so many posts a second they are posted to less often: a hundred are at that interval.
MOST_PER_S: Final = 400
TIMEOUT_S: Final = 0.5
OK: Final = 200


class Peers:
    """The exchange of one gateway with the others. Used from one event loop only."""

    def __init__(self, pool: Pool, replicas: ReplicaSet, *, engine_token: str) -> None:
        self._pool = pool
        self._replicas = replicas
        self._token = engine_token
        self._cursors: dict[Endpoint, int] = {}

    async def run(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Exchange until cancelled."""
        while True:
            await sleep(max(INTERVAL_S, len(self._cursors) / MOST_PER_S))
            await self.exchange()

    async def exchange(self) -> None:
        """One round, with every replica that is not a model's only one."""
        known = self._cursors
        self._cursors = {endpoint: known.get(endpoint, 0) for endpoint in self._replicas.shared()}
        await asyncio.gather(*map(self._exchange, tuple(self._cursors)))

    async def _exchange(self, endpoint: Endpoint) -> None:
        chains, size = [], 0
        placed = self._replicas.placed(endpoint)
        while placed and size + packed_bytes(placed[0]) <= MOST_BYTES:
            size += packed_bytes(placed[0])
            chains.append(placed.popleft())
        message = packed(self._cursors[endpoint], chains)
        taken = False
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, answer = await self._pool.post(
                    endpoint, EXCHANGE, self._token, message, most_bytes=2 * MOST_BYTES
                )
            taken = status == OK
        except (UpstreamError, TimeoutError):
            pass
        if not taken:
            # Put back; where there are too many meanwhile, the latest stay away.
            placed.extendleft(reversed(chains))
            return
        try:
            cursor, others = unpacked(answer)
        except ValueError:
            return
        if endpoint in self._cursors:
            self._cursors[endpoint] = cursor
        self._replicas.learn(endpoint, others)
