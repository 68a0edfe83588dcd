"""How much of what engines compute is one gateway's to give, where several give to the same engines. Pure.

Of `n` gateways each has an nth. What others leave of theirs it borrows, a step beyond what it has each time it hears of
them: two that fill at the same moment, each having heard of the other that it is idle, would else give twice what there
is. Nothing is borrowed while another has less than its part and somebody waiting there; and where others have borrowed
of this one's part it takes what they give back, as their sequences end, so engines are never given much more than they
compute. A little it may take at once, so that whoever sends little at an idle gateway does not wait for them.
"""

from __future__ import annotations

# Of its own part so much more is taken of what others leave, each time they are heard.
BORROW_STEP = 0.1
# Of its own part so much may always be taken.
AT_ONCE = 1 / 16
# With less than so much of its part in flight a gateway has less than its part: the last of it comes and goes.
BELOW = 0.95


class GatewayPart:
    """One gateway's part of one quantity: a model's slots, or the tokens of its KV caches."""

    __slots__ = ("_gateways", "_others", "_reach", "_shared")

    def __init__(self) -> None:
        self._gateways = 1
        self._shared = False
        self._others = 0.0
        # As far as may be borrowed.
        self._reach = 0.0

    def divide(self, gateways: int) -> None:
        """Take how many gateways, this one included, give to the same engines."""
        self._gateways = max(1, gateways)

    def heard(self, others: float, own: float, whole: float, *, wanted: bool) -> None:
        """Take what others have in flight and this one has, and whether another wants what it has not of its part."""
        self._shared = True
        self._others = others
        self._reach = 0.0 if wanted else own + max(1.0, BORROW_STEP * whole / self._gateways)

    def alone(self) -> None:
        """Nothing is known of other gateways any more."""
        self._shared = False

    def wants(self, own: float, whole: float, *, somebody_waits: bool) -> bool:
        """Whether this gateway has less than its part, and use for more."""
        return somebody_waits and own < BELOW * whole / self._gateways

    def of(self, whole: float) -> float:
        """The most that this gateway may have in flight."""
        part = whole / self._gateways
        if not self._shared:
            return part
        left = whole - self._others
        if left < part:
            return max(left, AT_ONCE * part)
        return min(left, max(part, self._reach))
