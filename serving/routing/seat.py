"""One replica as a model's router sees it: this gateway's requests there, others' as its port said, its own word.

What a port has said counts in full until it says anew or is forgotten: nobody knows which of others' requests have
ended since. It comes with every head of an answer and with every probe.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import Final

from serving.engine.load import Said, Share

NOBODY: Final = Share()
# Prompts placed that other gateways have not been told of: some seconds' of a busy replica.
MOST_UNTOLD: Final = 2048


class Seat:
    """A replica's loads, and what it is taken to hold."""

    __slots__ = (
        "adapters",
        "in_flight",
        "in_flight_tokens",
        "name",
        "others",
        "place",
        "placed",
        "recent",
        "said",
        "said_s",
        "slot",
        "waiting_tokens",
    )

    def __init__(self, name: str, slot: int) -> None:
        self.name = name
        self.slot = slot
        self.place = -1
        # This gateway's.
        self.in_flight = 0
        self.in_flight_tokens = 0
        self.waiting_tokens = 0
        # Other gateways', as last said; and all that was said, and when.
        self.others = NOBODY
        self.said: Said | None = None
        self.said_s = -math.inf
        # Prompts that other gateways are to hear of, as chains of block hashes.
        self.placed: deque[tuple[int, ...]] = deque(maxlen=MOST_UNTOLD)
        self.recent = 0.0
        # Those it is taken to hold, the one used longest ago first.
        self.adapters: OrderedDict[str, None] = OrderedDict()

    @property
    def requests(self) -> int:
        """Everybody's, as far as they are known."""
        return self.in_flight + self.others.in_flight

    def hear(self, said: Said | None, now_s: float) -> int:
        """Take what the port said at this moment, None to forget it; by how many more requests of others that is."""
        before, self.said, self.said_s = self.others.in_flight, said, now_s
        self.others = NOBODY if said is None else said.others
        return self.others.in_flight - before
