"""Opens connections that want nothing and keeps them open: a process of its own, so that its work is nobody else's.

    python -m tests.faults.flood PORT COUNT KEY|- SOURCE

Connections that the other side closes are opened anew, so many a second. Says `ready` when each has been tried once, and
counts at the end of its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

OPENED_PER_S = 2000
REOPENED_PER_S = 200
HEAD = "{method} {path} HTTP/1.1\r\nhost: x\r\n{key}{length}\r\n"
WHOLE = '{"model":"chat","messages":[{"role":"user","content":"hello"}],"max_tokens":2}'


def openings(key: str) -> list[tuple[str, bytes, bool]]:
    """(name, what is sent, whether that direction is closed then); nothing follows but silence or a byte at times."""
    authorization = f"authorization: Bearer {key}\r\n" if key else ""

    def request(method: str, path: str, length: str) -> bytes:
        return HEAD.format(method=method, path=path, key=authorization, length=length).encode()

    chunked, sized = "transfer-encoding: chunked\r\n", "content-length: 1000\r\n"
    return [
        ("silent", b"", False),
        ("slow headers", b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: ", False),
        ("unfinished chunks", request("GET", "/v1/models", chunked), False),
        ("unfinished body", request("POST", "/v1/chat/completions", sized) + b"{", False),
        ("unfinished health", request("GET", "/health/live", sized) + b"{", False),
        ("idle", request("GET", "/v1/models", ""), False),
        (
            "half closed",
            request("POST", "/v1/chat/completions", f"content-length: {len(WHOLE)}\r\n") + WHOLE.encode(),
            True,
        ),
        ("half closed, unfinished", request("POST", "/v1/chat/completions", sized) + b"{", True),
    ]


class Flood:
    """So many connections."""

    def __init__(self, port: int, key: str, source: str) -> None:
        self._port, self._source = port, source
        self._openings = openings(key)
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.refused = 0
        self.held = self.most_held = 0
        self._tickets: asyncio.Queue[None] = asyncio.Queue(REOPENED_PER_S)

    async def tickets(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for _ in range(REOPENED_PER_S // 10):
                with contextlib.suppress(asyncio.QueueFull):
                    self._tickets.put_nowait(None)

    async def hold(self, number: int) -> None:
        while True:
            await self.once(*self._openings[number % len(self._openings)])
            await self._tickets.get()

    async def once(self, name: str, opening: bytes, half: bool) -> None:
        """One connection, from its first byte to its end."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._source, 0))
        except OSError:
            self.refused += 1
            return
        self.opened[name] += 1
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        try:
            writer.write(opening)
            if half:
                writer.write_eof()
            slow = name == "slow headers"
            while True:
                try:
                    async with asyncio.timeout(3 if slow else None):
                        if not await reader.read(65536):
                            return
                except TimeoutError:
                    writer.write(b"a")
        except OSError:
            pass
        finally:
            self.held -= 1
            self.closed[name] += 1
            writer.transport.abort()


async def run(port: int, count: int, key: str, source: str) -> None:
    flood = Flood(port, key, source)
    tasks = [asyncio.create_task(flood.tickets())]
    for number in range(count):
        tasks.append(asyncio.create_task(flood.hold(number)))
        if number % (OPENED_PER_S // 20) == 0:
            await asyncio.sleep(0.05)
    while sum(flood.opened.values()) + flood.refused < count:
        await asyncio.sleep(0.05)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    counts = {"opened": flood.opened, "closed": flood.closed, "refused": flood.refused}
    print(json.dumps(counts | {"held": flood.held, "most_held": flood.most_held}), flush=True)
    for task in tasks:
        task.cancel()


def yielding() -> None:
    """Take only the processor time that nobody else wants: a flood comes from another machine."""
    os.setsid()
    os.nice(19)
    with contextlib.suppress(OSError):  # where the kernel groups by session
        Path("/proc/self/autogroup").write_text("19")


if __name__ == "__main__":
    yielding()
    asyncio.run(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].strip("-") and sys.argv[3], sys.argv[4]))
