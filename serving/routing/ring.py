"""A consistent-hashing ring: a key's place stays the same while replicas come and go elsewhere on it.

Each replica stands at `POINTS` places, so that the keys of one that leaves spread over all others. Building costs a
sort of them all, at every change of replicas; a look-up is one bisection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final

POINTS: Final = 64
_POINT_BYTES: Final = 8


class Ring:
    """Replicas by number, placed by their names: the same in every gateway."""

    def __init__(self, names: Iterable[str]) -> None:
        placed = sorted((_place(f"{name}#{i}"), number) for number, name in enumerate(names) for i in range(POINTS))
        self._places = [place for place, _ in placed]
        self._numbers = [number for _, number in placed]

    def walk(self, key: str) -> Iterator[int]:
        """Numbers from the key's place on, once around."""
        start = bisect_right(self._places, _place(key))
        yield from self._numbers[start:]
        yield from self._numbers[:start]


def _place(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=_POINT_BYTES).digest())
