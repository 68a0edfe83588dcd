"""Which replica holds which prefix, as far as this gateway knows: a mirror of every replica's KV cache.

A prompt is a chain of block hashes (`Prefix`); for each replica the hashes of what it has computed are kept, least
recently used out first, within as many tokens as its KV cache holds. A block's holders are the bits of one number, so
the longest prefix on every replica at once costs one look-up and one `and` a block, however many replicas there are.

Memory: `most_blocks` (of all replicas together) at about 240 bytes each; the bench prints what it really is. Where
replicas could hold more, each keeps its share of the bound. What a replica has evicted by other gateways' requests is
not seen: the mirror then promises more than there is, which costs a computation and never an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt as routing sees it: `hashes[i]` names its tokens up to `ends[i]`; `ends` may be longer than `hashes`.

    `tokens` is the whole prompt's length, what stands behind the last hash included.
    """

    hashes: tuple[int, ...]
    ends: Sequence[int]
    tokens: int


class Held(NamedTuple):
    """So many tokens of a prompt are on the replicas whose bits are set."""

    tokens: int
    replicas: int


class PrefixIndex:
    """The mirrors of one model's replicas, by slot: a small number that is a replica's until it leaves."""

    def __init__(self, most_blocks: int) -> None:
        self._most_blocks = most_blocks
        self._replicas: dict[int, int] = {}
        self._mirrors: dict[int, _Mirror] = {}
        self._free: list[int] = []

    @property
    def blocks(self) -> int:
        """Blocks kept, a block once for each replica that holds it."""
        return sum(len(mirror.blocks) for mirror in self._mirrors.values())

    def join(self, capacity_tokens: int) -> int:
        """A new replica's slot."""
        slot = self._free.pop() if self._free else len(self._mirrors)
        self._mirrors[slot] = _Mirror(1 << slot, capacity_tokens)
        return slot

    def resize(self, slot: int, capacity_tokens: int) -> None:
        """A replica's KV cache was found to hold so much."""
        mirror = self._mirrors[slot]
        mirror.capacity_tokens = capacity_tokens
        self._evict(mirror)

    def leave(self, slot: int) -> None:
        """A replica has gone, and what it held with it."""
        mirror = self._mirrors.pop(slot)
        for block in mirror.blocks:
            self._clear(block, mirror.bit)
        self._free.append(slot)

    def match(self, prefix: Prefix) -> list[Held]:
        """Who holds how much of the prompt, most first; each replica that holds any of it stands in one entry."""
        hashes, ends, holders = prefix.hashes, prefix.ends, self._replicas.get
        alive = holders(hashes[0], 0) if hashes else 0
        found = []
        # Whoever holds a block holds those before it: they are used whenever it is, and later (`touch`). So where the
        # holders change next is found by halving.
        known, most = 0, len(hashes)
        while alive:
            first, last, left = known + 1, most, 0
            while first < last:
                middle = (first + last) >> 1
                held = holders(hashes[middle], 0) & alive
                if held == alive:
                    first = middle + 1
                else:
                    last, left = middle, held
            if first < most:
                found.append(Held(ends[first - 1], alive & ~left))
            else:
                found.append(Held(min(ends[most - 1], prefix.tokens), alive))
            known, alive = first, left
        found.reverse()
        return found

    def touch(self, slot: int, prefix: Prefix) -> None:
        """The replica has the whole prompt in its cache now, used most recently: its head last, as engines free it."""
        mirror, replicas, ends = self._mirrors[slot], self._replicas, prefix.ends
        blocks, bit, hashes = mirror.blocks, mirror.bit, prefix.hashes
        for i in range(len(hashes) - 1, -1, -1):
            name = hashes[i]
            if name in blocks:
                blocks.move_to_end(name)
                continue
            size = ends[i] - ends[i - 1] if i else ends[0]
            blocks[name] = size
            mirror.tokens += size
            holders = replicas.get(name)
            replicas[name] = bit if holders is None else holders | bit
        self._evict(mirror)

    def forget(self, slot: int, prefix: Prefix, kept_tokens: int = 0) -> None:
        """The replica has not computed the prompt after all, beyond its first `kept_tokens`."""
        mirror = self._mirrors[slot]
        for name, end in zip(prefix.hashes, prefix.ends, strict=False):
            if end > kept_tokens and (size := mirror.blocks.pop(name, None)) is not None:
                mirror.tokens -= size
                self._clear(name, mirror.bit)

    def _evict(self, mirror: _Mirror) -> None:
        blocks = mirror.blocks
        most = max(1, self._most_blocks // len(self._mirrors))
        while blocks and (mirror.tokens > mirror.capacity_tokens or len(blocks) > most):
            name, size = blocks.popitem(last=False)
            mirror.tokens -= size
            self._clear(name, mirror.bit)

    def _clear(self, name: int, bit: int) -> None:
        left = self._replicas[name] & ~bit
        if left:
            self._replicas[name] = left
        else:
            del self._replicas[name]


class _Mirror:
    """What one replica holds: block hash to tokens, least recently used first."""

    __slots__ = ("bit", "blocks", "capacity_tokens", "tokens")

    def __init__(self, bit: int, capacity_tokens: int) -> None:
        self.bit = bit
        self.capacity_tokens = capacity_tokens
        self.blocks: OrderedDict[int, int] = OrderedDict()
        self.tokens = 0
