"""What a gateway may give of engines that others give to as well: parts, borrowing, and never much more than there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission.gateway_part import AT_ONCE, BELOW, BORROW_STEP, GatewayPart

WHOLE = 240.0


def parts(gateways: int) -> GatewayPart:
    part = GatewayPart()
    part.divide(gateways)
    return part


def test_alone_it_has_all_and_of_several_its_part() -> None:
    assert parts(1).of(WHOLE) == WHOLE
    assert parts(3).of(WHOLE) == WHOLE / 3


def test_it_borrows_what_others_leave_step_by_step_and_gives_it_back_at_once() -> None:
    part, own, seen = parts(2), 0.0, []
    for _ in range(12):
        part.heard(20.0, own, WHOLE, wanted=False)
        seen.append(own := part.of(WHOLE))
    step = BORROW_STEP * WHOLE / 2
    assert seen[:3] == [WHOLE / 2, WHOLE / 2 + step, WHOLE / 2 + 2 * step]
    assert seen[-1] == WHOLE - 20.0
    part.heard(20.0, own, WHOLE, wanted=True)
    assert part.of(WHOLE) == WHOLE / 2


def test_a_step_is_at_least_one() -> None:
    part = parts(2)
    part.heard(0.0, 4.0, 8.0, wanted=False)
    assert part.of(8.0) == 5.0


def test_what_was_borrowed_is_not_kept_for_later() -> None:
    part = parts(2)
    part.heard(0.0, WHOLE, WHOLE, wanted=False)
    assert part.of(WHOLE) == WHOLE
    part.heard(0.0, 0.0, WHOLE, wanted=False)
    assert part.of(WHOLE) == WHOLE / 2
    part.heard(0.0, WHOLE, WHOLE, wanted=False)
    part.alone()
    assert part.of(WHOLE) == WHOLE / 2


def test_where_others_have_borrowed_its_part_it_takes_what_they_give_back() -> None:
    part = parts(2)
    part.heard(WHOLE, 0.0, WHOLE, wanted=False)
    assert part.of(WHOLE) == AT_ONCE * WHOLE / 2
    part.heard(WHOLE - 60.0, 0.0, WHOLE, wanted=False)
    assert part.of(WHOLE) == 60.0


def test_it_wants_its_part_where_somebody_waits_below_it() -> None:
    part = parts(2)
    assert part.wants(0.0, WHOLE, somebody_waits=True)
    assert not part.wants(0.0, WHOLE, somebody_waits=False)
    assert not part.wants(BELOW * WHOLE / 2, WHOLE, somebody_waits=True)


class Full:
    """A gateway where as many wait as there is room for; what it has in flight ends after a while."""

    def __init__(self, gateways: int) -> None:
        self.part = parts(gateways)
        self.in_flight = 0.0
        self.waits = False

    def tell(self) -> tuple[float, bool]:
        return self.in_flight, self.part.wants(self.in_flight, WHOLE, somebody_waits=self.waits)

    def turn(self, told: list[tuple[float, bool]], ends: float) -> None:
        others = sum(sequences for sequences, _ in told)
        self.part.heard(others, self.in_flight, WHOLE, wanted=any(w for _, w in told))
        self.in_flight -= ends * self.in_flight
        if self.waits:
            self.in_flight = max(self.in_flight, self.part.of(WHOLE))


@given(
    busy=st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=2, max_size=4),
    ends=st.floats(0.01, 0.2),
)
def test_engines_never_get_much_more_than_they_compute(busy: list[list[bool]], ends: float) -> None:
    """Whoever becomes busy when: what all have in flight is at most all there is, and what each may take at once."""
    gateways = [Full(len(busy)) for _ in busy]
    for turn in range(len(busy[0])):
        told = [g.tell() for g in gateways]
        for i, gateway in enumerate(gateways):
            gateway.waits = busy[i][turn]
            gateway.turn(told[:i] + told[i + 1 :], ends)
        # All may borrow the same for a turn, each of them a step.
        assert sum(g.in_flight for g in gateways) <= WHOLE * (1 + AT_ONCE + BORROW_STEP) + 1e-6


def test_those_who_stay_busy_end_with_equal_parts() -> None:
    first, second = Full(2), Full(2)
    for turn in range(200):
        told = [first.tell(), second.tell()]
        first.waits, second.waits = True, turn >= 50
        first.turn(told[1:], 0.05)
        second.turn(told[:1], 0.05)
        if turn == 49:
            assert first.in_flight == pytest.approx(WHOLE)
    assert first.in_flight == pytest.approx(WHOLE / 2, rel=0.06)
    assert second.in_flight == pytest.approx(WHOLE / 2, rel=0.06)
