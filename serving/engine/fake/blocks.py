"""KV blocks of the fake engine, with prefix caching as vLLM does it.

A block keeps its content hash after its last user has gone and can be taken up again by a prompt with the
same prefix, until it is handed out anew: least recently freed first, a sequence's tail before its head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """A fixed number of blocks; counts users of each. Callers check `free` before they take."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._users = [0] * blocks
        self._hash: list[int | None] = [None] * blocks
        self._cached: dict[int, int] = {}
        # Blocks without users, oldest first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))

    @property
    def free(self) -> int:
        """Blocks without users, cached content or not."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return 1.0 - len(self._free) / self.total

    def match(self, hashes: Sequence[int]) -> list[int]:
        """Blocks that hold the longest cached prefix of these chained hashes."""
        found = []
        for content in hashes:
            block = self._cached.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks have no user now: taking them up costs free blocks."""
        return sum(1 for block in blocks if not self._users[block])

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a user to each of these cached blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._free[block]
            self._users[block] += 1

    def take(self, number: int) -> list[int]:
        """Hands out blocks, forgetting what they held; KeyError where fewer are free."""
        taken = []
        for _ in range(number):
            block, _none = self._free.popitem(last=False)
            old = self._hash[block]
            if old is not None:
                self._hash[block] = None
                if self._cached.get(old) == block:
                    del self._cached[old]
            self._users[block] = 1
            taken.append(block)
        return taken

    def remember(self, block: int, content: int) -> None:
        """Makes a full block findable by the hash of its content; the first of equal blocks is kept."""
        if self._hash[block] is None:
            self._hash[block] = content
            self._cached.setdefault(content, block)

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one user from each block of a sequence, in the sequence's order."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
