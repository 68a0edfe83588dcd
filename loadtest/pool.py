"""Connections kept for reuse: a free one, else a new one, else a turn in the queue."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from loadtest.client import StreamClient
from loadtest.errors import LoadtestError

# A connection idle for longer is not used again: servers close idle ones (uvicorn after 5 s), and a request sent
# into that moment would fail without any fault of the target's.
MAX_IDLE_S = 4.0

_NS = 1e9


class ConnectionPool:
    """Connections of one tenant to one address, each for one request at a time."""

    def __init__(
        self, host: str, port: int, *, max_connections: int, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Nothing is connected yet. Raises LoadtestError for a bound below 1."""
        if max_connections < 1:
            raise LoadtestError(f"max_connections is {max_connections}; one connection is the least")
        self._host = host
        self._port = port
        self._max = max_connections
        self._clock_ns = clock_ns
        # The last one given back is taken first: the others grow old and are closed.
        self._idle: deque[tuple[StreamClient, int]] = deque()
        self._lent = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        # Requests that found all connections taken: the client's limit, not the target's.
        self.waited = 0

    async def take(self) -> StreamClient:
        """A connection for one request, open or still to be opened by its first request; first come, first served."""
        if self._lent < self._max:
            self._lent += 1
            return self._free()
        self.waited += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            # The place of whoever gave one back is handed over with the turn.
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            raise
        return self._free()

    def give_back(self, client: StreamClient) -> None:
        """End of a request; a connection that is still open is kept."""
        if client.is_open:
            self._idle.append((client, self._clock_ns()))
        self._pass_on()

    def close(self) -> None:
        """Close all idle connections, without waiting for it."""
        while self._idle:
            self._idle.pop()[0].drop()

    def _pass_on(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._lent -= 1

    def _free(self) -> StreamClient:
        oldest_ns = self._clock_ns() - int(MAX_IDLE_S * _NS)
        while self._idle and self._idle[0][1] < oldest_ns:
            self._idle.popleft()[0].drop()
        while self._idle:
            client, _ = self._idle.pop()
            if client.is_open:
                return client
        return StreamClient(self._host, self._port, clock_ns=self._clock_ns)
