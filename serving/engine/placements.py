"""What gateways tell one another at an engine's port: the prompts that each has sent there, as chains of block hashes.

A gateway that knows its own placements alone computes anew what another one's requests have put into a cache. So each
posts to every port, some times a second, what it has placed there since, and takes along what others have: the port is
where they meet anyway, and keeps what was posted last, unread. One that has just started learns the latest of it.

A message is a row of unsigned 64-bit numbers, little-endian: a cursor, then chains, each its length and its hashes. The
cursor of an answer is to be posted next time; that of an earlier life of the port counts as none.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Iterable
from typing import Final

EXCHANGE: Final = "/galerne/exchange"
# Of one message; what is beyond it waits for the next.
MOST_BYTES: Final = 32 * 1024
# Of what a port keeps: the latest 2,900 prompts of 32 KiB, or more of shorter ones.
KEPT_BYTES: Final = 1024 * 1024
NUMBER_BYTES: Final = 8

Chain = tuple[int, ...]


def packed(cursor: int, chains: Iterable[Chain]) -> bytes:
    """A message."""
    numbers = array("Q", (cursor,))
    for chain in chains:
        numbers.append(len(chain))
        numbers.extend(chain)
    return _swapped(numbers).tobytes()


def packed_bytes(chain: Chain) -> int:
    """What a chain takes in a message."""
    return NUMBER_BYTES * (1 + len(chain))


def unpacked(message: bytes) -> tuple[int, list[Chain]]:
    """Cursor and chains, but for one that is cut off; raises ValueError where it is no message."""
    if not is_message(message):
        raise ValueError("not a message of an exchange")
    numbers = array("Q")
    numbers.frombytes(message)
    row = tuple(_swapped(numbers))
    at, chains = 1, []
    while at < len(row) and (end := at + 1 + row[at]) <= len(row):
        chains.append(row[at + 1 : end])
        at = end
    return row[0], chains


def is_message(data: bytes | bytearray) -> bool:
    """Whether it is whole numbers, and has a cursor."""
    return len(data) >= NUMBER_BYTES and len(data) % NUMBER_BYTES == 0


def _swapped(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


class Placements:
    """What was posted at one port, the oldest forgotten first. Used from one event loop only."""

    def __init__(self) -> None:
        self._posts: deque[tuple[bytes, bytes]] = deque()
        self._bytes = 0
        # How many posts have been forgotten: the number of the oldest that is kept.
        self._first = 0

    def exchange(self, gateway: bytes, message: bytes) -> bytes:
        """Take a gateway's message and answer with what others have posted since its cursor."""
        cursor = int.from_bytes(message[:NUMBER_BYTES], "little")
        newest = self._first + len(self._posts)
        at = max(self._first, cursor if cursor <= newest else 0)
        found: list[bytes] = []
        size = 0
        while at < newest:
            poster, post = self._posts[at - self._first]
            if poster != gateway:
                if found and size + len(post) > MOST_BYTES:
                    break
                found.append(post)
                size += len(post)
            at += 1
        self._keep(gateway, message[NUMBER_BYTES:])
        return b"".join((at.to_bytes(NUMBER_BYTES, "little"), *found))

    def _keep(self, gateway: bytes, post: bytes) -> None:
        if not post:
            return
        self._posts.append((gateway, post))
        self._bytes += len(post)
        while self._bytes > KEPT_BYTES:
            self._bytes -= len(self._posts.popleft()[1])
            self._first += 1
