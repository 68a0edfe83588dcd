"""What gateways post at a port: messages, whose posts reach whom, and that a port keeps only so much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.placements import KEPT_BYTES, MOST_BYTES, Chain, Placements, packed, packed_bytes, unpacked

NUMBER = st.integers(0, 2**64 - 1)


@given(NUMBER, st.lists(st.lists(NUMBER, max_size=5).map(tuple), max_size=5))
def test_what_is_packed_is_unpacked(cursor: int, chains: list[Chain]) -> None:
    message = packed(cursor, chains)
    assert unpacked(message) == (cursor, chains)
    assert len(message) == 8 + sum(map(packed_bytes, chains))


def test_what_is_no_message_is_refused_and_a_cut_chain_left_out() -> None:
    whole = packed(3, [(1, 2), (4, 5)])
    assert unpacked(whole[:-8]) == (3, [(1, 2)])
    for data in (b"", whole[:-1], b"1234"):
        with pytest.raises(ValueError, match="not a message"):
            unpacked(data)


class Gateway:
    def __init__(self, port: Placements, name: bytes) -> None:
        self.port, self.name, self.cursor = port, name, 0

    def exchange(self, *chains: Chain) -> list[Chain]:
        self.cursor, found = unpacked(self.port.exchange(self.name, packed(self.cursor, chains)))
        return found


def test_each_gets_what_others_have_posted_once() -> None:
    port = Placements()
    one, two = Gateway(port, b"one"), Gateway(port, b"two")
    assert one.exchange((1, 2), (3,)) == []
    assert two.exchange((4,)) == [(1, 2), (3,)]
    assert one.exchange() == [(4,)]
    assert (one.exchange(), two.exchange()) == ([], [])
    assert Gateway(port, b"three").exchange() == [(1, 2), (3,), (4,)], "who starts learns what is kept"


def test_a_cursor_of_an_earlier_life_of_the_port_counts_as_none() -> None:
    port = Placements()
    Gateway(port, b"one").exchange((1,))
    late = Gateway(port, b"two")
    late.cursor = 99
    assert late.exchange() == [(1,)]


def test_a_port_keeps_the_latest_and_an_answer_is_bounded() -> None:
    port = Placements()
    one, two = Gateway(port, b"one"), Gateway(port, b"two")
    posts = KEPT_BYTES // MOST_BYTES + 8
    for i in range(posts):
        one.exchange((i,) * (MOST_BYTES // 8 - 1))
    found, rounds = [], 0
    while got := two.exchange():
        assert sum(map(packed_bytes, got)) <= MOST_BYTES
        found += [chain[0] for chain in got]
        rounds += 1
    assert found == list(range(8, posts))
    assert rounds == len(found)
