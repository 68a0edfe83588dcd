"""The mirror of the replicas' caches: against a plain model of it, and within its bounds."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from serving.routing.prefix_index import Held, Prefix, PrefixIndex

BLOCK = 10


def prefix(*hashes: int, tail: int = 0) -> Prefix:
    return Prefix(hashes, range(BLOCK, 10_000, BLOCK), len(hashes) * BLOCK + tail)


def test_the_longest_prefix_of_each_replica_is_found() -> None:
    index = PrefixIndex(1000)
    slots = [index.join(1000) for _ in range(4)]
    index.touch(slots[0], prefix(1, 2, 3))
    index.touch(slots[1], prefix(1, 2))
    index.touch(slots[2], prefix(1, 9))
    assert index.match(prefix(1, 2, 3, 4)) == [Held(30, 0b001), Held(20, 0b010), Held(10, 0b100)]
    assert index.match(prefix(7)) == []
    assert index.match(Prefix((), range(0), 5)) == []
    assert index.match(Prefix((1, 2, 3), range(BLOCK, 40, BLOCK), 27))[0] == Held(27, 0b001), "never more than there is"


def test_a_prompts_tail_goes_first() -> None:
    index = PrefixIndex(1000)
    slot = index.join(4 * BLOCK)
    index.touch(slot, prefix(1, 2, 3))
    index.touch(slot, prefix(5, 6))
    assert index.match(prefix(1, 2, 3)) == [Held(20, 1)]
    assert index.match(prefix(5, 6)) == [Held(20, 1)]


def test_a_replica_that_goes_takes_its_blocks_along_and_its_slot_is_used_again() -> None:
    index = PrefixIndex(1000)
    first, second = index.join(100), index.join(100)
    for slot in (first, second):
        index.touch(slot, prefix(1, 2))
    index.leave(first)
    assert index.match(prefix(1, 2)) == [Held(20, 1 << second)]
    again = index.join(100)
    assert again == first
    assert index.match(prefix(1, 2)) == [Held(20, 1 << second)]
    index.leave(second)
    index.leave(again)
    assert index.blocks == 0
    assert index.match(prefix(1, 2)) == []


def test_what_was_not_computed_is_forgotten_but_for_what_was_there() -> None:
    index = PrefixIndex(1000)
    slot = index.join(100)
    index.touch(slot, prefix(1, 2))
    index.touch(slot, prefix(1, 2, 3, 4))
    index.forget(slot, prefix(1, 2, 3, 4), kept_tokens=20)
    assert index.match(prefix(1, 2, 3, 4)) == [Held(20, 1)]


def test_all_replicas_together_stay_within_the_bound() -> None:
    index = PrefixIndex(100)
    slots = [index.join(10**9) for _ in range(10)]
    for i in range(2000):
        index.touch(slots[i % 10], prefix(*range(i * 7, i * 7 + 7)))
        assert index.blocks <= 100


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=6)), min_size=1, max_size=60
    ),
    st.integers(1, 8),
)
def test_the_index_is_so_many_plain_caches(steps: list[tuple[int, list[int]]], blocks: int) -> None:
    """Each replica's mirror is an LRU of its own, whatever the others hold."""
    index = PrefixIndex(10_000)
    slots = [index.join(blocks * BLOCK) for _ in range(3)]
    plain: list[OrderedDict[int, None]] = [OrderedDict() for _ in slots]
    for replica, path in steps:
        # A chain: the name of a block is the whole path to it.
        names = tuple(hash(tuple(path[: i + 1])) for i in range(len(path)))
        for name in reversed(names):
            plain[replica][name] = None
            plain[replica].move_to_end(name)
        while len(plain[replica]) > blocks:
            plain[replica].popitem(last=False)
        index.touch(slots[replica], prefix(*names))
        found = index.match(prefix(*names))
        for i, slot in enumerate(slots):
            known = next((n for n, name in enumerate(names) if name not in plain[i]), len(names))
            assert [held.tokens for held in found if held.replicas >> slot & 1] == ([known * BLOCK] if known else [])
    assert index.blocks == sum(len(cache) for cache in plain)
