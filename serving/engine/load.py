"""What an engine's port says of its load, in one header of every answer, and to each gateway what others have there.

A gateway knows its own requests and sees nothing of other gateways'. The port sees all of them: with each request a
gateway says who it is and what it takes the prompt for, and with each head of an answer the port says what all others
have under way, in those same measures. So nothing has to be subtracted that was counted at two places and two moments,
and a prompt counts for everybody as what its own gateway expects of it. What comes from no gateway counts as others'.

On the wire: `x-galerne-gateway: name,prompt tokens,uncached tokens`, of a probe the name alone; `x-galerne-load:
running,waiting,KV use in thousandths,others' requests,their prompt tokens,their waiting tokens`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

LOAD_HEADER: Final = b"x-galerne-load"
GATEWAY_HEADER: Final = b"x-galerne-gateway"
_FIELDS: Final = 6


class EngineLoad(NamedTuple):
    """The engine's own word: sequences in its batch and before it, and the share of its KV cache in use, 0 to 1."""

    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0


class Share(NamedTuple):
    """Requests at one port: how many, tokens of their prompts, and of those what is still to be computed."""

    in_flight: int = 0
    tokens: int = 0
    waiting_tokens: int = 0


class Said(NamedTuple):
    """What a port has said to one gateway."""

    engine: EngineLoad
    others: Share


def read(value: bytes) -> Said | None:
    """The header's value; None where it is none. Further fields of a later version are passed over."""
    try:
        running, waiting, permille, in_flight, tokens, waiting_tokens = map(int, value.split(b",")[:_FIELDS])
    except ValueError:
        return None
    if min(running, waiting, permille, in_flight, tokens, waiting_tokens) < 0:
        return None
    return Said(EngineLoad(running, waiting, permille / 1000), Share(in_flight, tokens, waiting_tokens))


def written(said: Said) -> bytes:
    """The header's value."""
    engine, others = said
    return b"%d,%d,%d,%d,%d,%d" % (engine.running, engine.waiting, round(1000 * engine.kv_use), *others)


def signed(gateway: bytes, tokens: int, uncached: int) -> bytes:
    """What a gateway says with a request: its name, the prompt's tokens, and how many it takes for uncached."""
    return b"%b,%d,%d" % (gateway, tokens, uncached)


class Visit:
    """One request at the port, from its coming to its end."""

    __slots__ = ("_open", "_shares", "_tokens", "gateway", "waiting_tokens")

    def __init__(self, shares: Shares, gateway: bytes, tokens: int, waiting_tokens: int) -> None:
        self._shares = shares
        self.gateway = gateway
        self._tokens = tokens
        # 0 once the first byte of its answer has gone out: then its prompt is computed.
        self.waiting_tokens = waiting_tokens
        self._open = True
        shares.add(gateway, Share(1, tokens, waiting_tokens))

    def answered(self) -> None:
        """The first byte of the answer goes out."""
        self._shares.add(self.gateway, Share(0, 0, -self.waiting_tokens))
        self.waiting_tokens = 0

    def end(self) -> None:
        """It is over; a second time changes nothing."""
        if self._open:
            self._open = False
            self._shares.add(self.gateway, Share(-1, -self._tokens, -self.waiting_tokens))
            self.waiting_tokens = 0


class Shares:
    """Whose requests are at one port. Used from one event loop only; holds no more names than requests."""

    def __init__(self) -> None:
        self._all = Share()
        self._by_gateway: dict[bytes, Share] = {}

    def begin(self, header: bytes = b"") -> Visit:
        """A request has come, signed or not; numbers that are none count as nothing."""
        gateway, _, numbers = header.partition(b",")
        try:
            tokens, waiting_tokens = (max(0, int(number)) for number in numbers.split(b","))
        except ValueError:
            tokens = waiting_tokens = 0
        return Visit(self, gateway, tokens, waiting_tokens)

    def others(self, header: bytes = b"") -> Share:
        """What all have there but the gateway of this signature; without one, what all have."""
        gateway = header.partition(b",")[0]
        mine = self._by_gateway.get(gateway) if gateway else None
        return self._all if mine is None else _less(self._all, mine)

    def add(self, gateway: bytes, change: Share) -> None:
        """Enter a change; of visits alone."""
        self._all = _more(self._all, change)
        found = _more(self._by_gateway.get(gateway, Share()), change)
        if found.in_flight:
            self._by_gateway[gateway] = found
        else:
            del self._by_gateway[gateway]


def _more(one: Share, other: Share) -> Share:
    return Share(one[0] + other[0], one[1] + other[1], one[2] + other[2])


def _less(one: Share, other: Share) -> Share:
    return Share(one[0] - other[0], one[1] - other[1], one[2] - other[2])
