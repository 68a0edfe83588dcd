"""Several gateways before the same replicas: each request reaches one at random, and each has a router of its own.

They learn of one another at the replicas, as in a cluster: how many requests others have there, from the head of each
answer to a request of their own, as it arrives (an engine sends a stream's head before it computes); that and the
prompts that others have placed there once an interval, each gateway at its own moment. Nothing takes time on its way,
and nothing is lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from serving.config import RoutingConfig
from serving.engine.load import EngineLoad, Said, Share
from serving.routing.choice import Choice, Wanted
from serving.routing.policies import Speeds
from serving.routing.prefix_index import Prefix
from serving.routing.router import Router, Turn
from serving.simulation.routing.replica import Replica

# Only here, to compare with: the longest cached prefix wins, whatever the load.
AFFINITY: Final = "affinity"
# As serving.api.peers exchanges, up to a hundred replicas.
EXCHANGE_INTERVAL_S: Final = 0.25


class Gateways:
    """The gateways of one cluster, in virtual time."""

    def __init__(
        self,
        number: int,
        config: RoutingConfig,
        *,
        speeds: Speeds,
        replicas: Sequence[Replica],
        kv_tokens: int,
        seed: int,
        affinity: bool = False,
        feedback: bool = True,
        exchange_interval_s: float = EXCHANGE_INTERVAL_S,
    ) -> None:
        """`kv_tokens`: of each replica's cache; `affinity`: choose by prefix alone."""
        self._replicas = replicas
        self._now_s = 0.0
        self._rng = Random(~seed)  # noqa: S311 - a simulation
        self._routers = [
            Router(config, speeds=speeds, clock=lambda: self._now_s, rng=Random(seed + i))  # noqa: S311
            for i in range(number)
        ]
        for router in self._routers:
            for i in range(len(replicas)):
                router.join(f"replica-{i}", kv_tokens)
        self._choose = [_affinity(router) if affinity else router.choose for router in self._routers]
        self._says = feedback and number > 1
        self._interval_s = exchange_interval_s
        # When each gateway exchanges next; one alone has nobody to.
        self._rounds = [(exchange_interval_s * i / number, i) for i in range(number)] if self._says else []
        # By gateway and replica: prompts of its own that it has not told of, and others' that it has not heard of.
        self._untold: list[list[list[Prefix]]] = [[[] for _ in replicas] for _ in range(number)]
        self._unheard: list[list[list[Prefix]]] = [[[] for _ in replicas] for _ in range(number)]

    def advance(self, until_s: float) -> None:
        """Let the replicas compute, and the gateways exchange, up to this moment."""
        rounds = self._rounds
        while rounds and rounds[0][0] <= until_s:
            at_s, asking = rounds[0]
            self._compute(at_s)
            for place in range(len(self._replicas)):
                self._say(asking, place)
                self._exchange(asking, place)
            heapq.heapreplace(rounds, (at_s + self._interval_s, asking))
        self._compute(until_s)

    def send(self, wanted: Wanted) -> tuple[Turn, int]:
        """A request comes now: its turn, and the place of the replica that it is to be put on."""
        number = len(self._routers)
        at = self._rng.randrange(number) if number > 1 else 0
        choice = self._choose[at](wanted)
        if choice is None:
            raise ValueError("a cluster without replicas")
        turn = self._routers[at].begin(choice, wanted)
        if self._says:
            self._say(at, choice.seat.place)
            if wanted.prefix is not None:
                self._untold[at][choice.seat.place].append(wanted.prefix)
        return turn, choice.seat.place

    def _compute(self, until_s: float) -> None:
        for replica in self._replicas:
            replica.advance(until_s)
        self._now_s = until_s

    def _say(self, asking: int, place: int) -> None:
        """What a replica says to one gateway: the others' books together are its own."""
        seats = [router.seats[place] for i, router in enumerate(self._routers) if i != asking]
        others = Share(
            sum(seat.in_flight for seat in seats),
            sum(seat.in_flight_tokens for seat in seats),
            sum(seat.waiting_tokens for seat in seats),
        )
        router = self._routers[asking]
        router.hear(router.seats[place], Said(EngineLoad(), others))

    def _exchange(self, asking: int, place: int) -> None:
        """One gateway tells a replica's port what it has placed there, and takes what others have told."""
        router, told, heard = self._routers[asking], self._untold[asking][place], self._unheard[asking][place]
        for prefix in heard:
            router.learn(router.seats[place], prefix)
        for i, others in enumerate(self._unheard):
            if i != asking:
                others[place].extend(told)
        told.clear()
        heard.clear()


def _affinity(router: Router) -> Callable[[Wanted], Choice]:
    def choose(wanted: Wanted) -> Choice:
        held = router.index.match(wanted.prefix) if wanted.prefix is not None else []
        holders = [seat for seat in router.seats if held and held[0].replicas >> seat.slot & 1]
        seat = min(holders or router.seats, key=lambda seat: seat.requests)
        return Choice(seat, "prefix" if holders else "load", held[0].tokens if held else 0)

    return choose
