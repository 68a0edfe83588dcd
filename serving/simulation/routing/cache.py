"""The KV cache of a simulated replica: a fixed number of blocks, prefixes findable until their room is needed.

As vLLM does it: a running request pins its blocks; when it ends they stay findable and are handed out anew least
recently freed first, a prompt's tail before its head. Answers take room while they run and leave nothing: the trace
names the blocks of prompts alone, so what a real engine would keep and find of answers is left out on both sides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """Blocks by name; one request's share is a `Hold`."""

    def __init__(self, blocks: int) -> None:
        self._total = blocks
        # Requests that use a block, by its name; those that none uses, least recently freed first.
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nameless = 0

    @property
    def held(self) -> int:
        """Blocks that hold something."""
        return len(self._users) + self._nameless

    @property
    def pinned(self) -> int:
        """Blocks that running requests hold."""
        return len(self._users) - len(self._idle) + self._nameless

    def match(self, names: Sequence[int]) -> int:
        """How many blocks of the longest prefix are there."""
        users = self._users
        for i, name in enumerate(names):
            if name not in users:
                return i
        return len(names)

    def admit(self, names: Sequence[int], hits: int, blocks: int) -> Hold | None:
        """Room for a request of so many blocks whose first `hits` are there; None where there is none."""
        taken_up = sum(1 for name in names[:hits] if not self._users[name])
        if self.pinned + taken_up + blocks - hits > self._total:
            return None
        for name in names[:hits]:
            if not self._users[name]:
                del self._idle[name]
            self._users[name] += 1
        self._nameless += blocks - hits
        while len(self._users) + self._nameless > self._total:
            oldest, _ = self._idle.popitem(last=False)
            del self._users[oldest]
        return Hold(list(names[:hits]), blocks - hits)

    def computed(self, hold: Hold, names: Sequence[int]) -> None:
        """A prompt is computed: its blocks can be found. Of equal blocks the first is kept."""
        for name in names[len(hold.named) :]:
            if name in self._users:
                break  # somebody computed the same meanwhile: this request's own copies stay nameless
            self._users[name] = 1
            hold.named.append(name)
            hold.nameless -= 1
            self._nameless -= 1

    def release(self, hold: Hold) -> None:
        """A request has ended."""
        self._nameless -= hold.nameless
        for name in reversed(hold.named):
            self._users[name] -= 1
            if not self._users[name]:
                self._idle[name] = None


class Hold:
    """The blocks of one running request."""

    __slots__ = ("named", "nameless")

    def __init__(self, named: list[int], nameless: int) -> None:
        self.named = named
        self.nameless = nameless
