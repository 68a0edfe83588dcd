"""Whose request is next: the Virtual Token Counter, weighted, under three priority classes. No I/O, no clock.

Each tenant has a counter of the service it was given: `INPUT_WEIGHT` for a token read, charged when its request is
dispatched, `OUTPUT_WEIGHT` for a token written, charged as it is produced; both divided by the tenant's weight. The
smallest counter of those who wait is next, and within a tenant whoever came first. A tenant that begins to wait is
lifted to the smallest counter of those who wait already (to the one that left last where nobody waits), so nobody
saves up service by staying away. (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2.)

Promise (theorem 4.4): of two tenants of a class that both wait throughout any interval, the weighted service differs
by at most 2 * max(INPUT_WEIGHT * longest input, OUTPUT_WEIGHT * most tokens in flight) / the smaller weight, whatever
others do. A request that does not fit is waited for and not overtaken, or small ones would starve large ones.

Between classes order is strict, because a person who waits for a first token and a nightly batch are not to be
weighed against each other; but a class that waits gets one request through whenever those above it were given
`PATIENCE` times that request's service since its last: at least a tenth of all, so nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from typing import Generic, Protocol, TypeVar

from serving.config import PRIORITIES, Priority

# What a token costs: one that is written takes a step of its own, of those that are read many share one. As in the
# paper, and about as providers price them.
INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
PATIENCE = 9.0
# Tenants that are looked at beside the next one: a turn's cost does not grow with how many wait.
NEAR = 16


@dataclass(frozen=True, slots=True)
class Standing:
    """What the configuration grants a tenant."""

    weight: float = 1.0
    priority: Priority = "standard"


class Waiting(Protocol):
    """A request as the queue sees it; tokens are estimates."""

    @property
    def tenant(self) -> str: ...
    @property
    def input_tokens(self) -> float: ...
    @property
    def output_tokens(self) -> float: ...


W = TypeVar("W", bound=Waiting)


class Lane(Generic[W]):
    """One tenant: its counter (service over weight), who waits, and how many requests are in flight."""

    __slots__ = (
        "counter",
        "group",
        "in_flight",
        "sequences",
        "service",
        "tenant",
        "waiting",
        "waiting_bytes",
        "weight",
    )

    def __init__(self, tenant: str, weight: float, group: _Class[W]) -> None:
        self.tenant = tenant
        self.weight = weight
        self.group = group
        self.counter = 0.0
        # All that was ever charged here, not divided.
        self.service = 0.0
        self.waiting: deque[W] = deque()
        self.waiting_bytes = 0
        self.in_flight = 0
        # Of those in flight, kept by whoever knows how many a request has.
        self.sequences = 0

    @property
    def present(self) -> bool:
        """Whether it waits or is served."""
        return bool(self.waiting or self.in_flight)


class _Class(Generic[W]):
    """One priority: the lanes that wait, and what the classes above were given since this one's turn."""

    __slots__ = ("active", "floor", "passed")

    def __init__(self) -> None:
        self.active: dict[str, Lane[W]] = {}
        # The counter of the lane that left last.
        self.floor = 0.0
        self.passed = 0.0


class FairQueue(Generic[W]):
    """The queue of one model. Memory: one lane for each tenant of the configuration, and who waits."""

    def __init__(self, standings: Mapping[str, Standing] | None = None) -> None:
        self._standings = dict(standings or {})
        self._classes: dict[Priority, _Class[W]] = {name: _Class() for name in PRIORITIES}
        self._lanes: dict[str, Lane[W]] = {}
        self._length = 0
        # Weights of all who wait or are served here, until one comes or goes.
        self._weights: float | None = None
        # Tenants that wait or are served at other gateways.
        self._elsewhere: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[W]:
        """Who waits, in no order that means anything between tenants."""
        for lane in self._lanes.values():
            yield from lane.waiting

    # -- configuration

    def update(self, standings: Mapping[str, Standing]) -> None:
        """Take what tenants are granted from now on; who is named no more finishes what it has under its last terms."""
        self._standings = dict(standings)
        self._weights = None
        for tenant, lane in list(self._lanes.items()):
            standing = standings.get(tenant)
            if standing is None:
                if not lane.present:
                    del self._lanes[tenant]
                continue
            lane.weight = standing.weight
            group = self._classes[standing.priority]
            if group is not lane.group:
                lane.group.active.pop(tenant, None)
                lane.group = group
                # The counters of two classes have nothing to do with each other.
                lane.counter = self._lowest(lane)
                if lane.waiting:
                    group.active[tenant] = lane

    # -- requests

    def lane(self, tenant: str) -> Lane[W]:
        """A tenant's lane."""
        lane = self._lanes.get(tenant)
        if lane is None:
            standing = self._standings.get(tenant) or Standing()
            lane = self._lanes[tenant] = Lane(tenant, standing.weight, self._classes[standing.priority])
        return lane

    def push(self, item: W) -> None:
        """A request waits."""
        lane = self.lane(item.tenant)
        if not lane.waiting:
            lane.counter = max(lane.counter, self._lowest(lane))
            lane.group.active[lane.tenant] = lane
        self._absent(lane)
        lane.waiting.append(item)
        self._length += 1

    def next(self) -> W | None:
        """The request whose turn it is, left where it stands; None where nobody waits."""
        first: W | None = None
        for group in self._classes.values():
            if not group.active:
                continue
            head = min(group.active.values(), key=_by_service).waiting[0]
            if first is None:
                first = head
            elif group.passed >= PATIENCE * service_of(head.input_tokens, head.output_tokens):
                return head
        return first

    def near(self, head: W) -> Iterator[W]:
        """Whose turn it nearly is: of the other tenants of its class, the first request of each that has had no more
        service than this one's tenant and one request like that, least first; of no more than `NEAR` tenants.
        """
        lane = self.lane(head.tenant)
        others = (
            other
            for other in lane.group.active.values()
            if other is not lane and other.counter - lane.counter <= _first_service(other) / other.weight
        )
        return (other.waiting[0] for other in nsmallest(NEAR, others, key=_by_service))

    def take(self, item: W) -> None:
        """Dispatch a request that waits: its input is charged, and it is in flight until `done`."""
        lane = self.lane(item.tenant)
        lane.group.passed = 0.0
        self.remove(item)
        self._dispatch(lane, item)

    def pass_by(self, item: W) -> None:
        """Dispatch a request at once: nobody waits, or it costs nothing."""
        lane = self.lane(item.tenant)
        if not lane.waiting:
            lane.counter = lane.group.floor = max(lane.counter, self._lowest(lane))
        self._dispatch(lane, item)

    def remove(self, item: W) -> None:
        """A request waits no more."""
        lane = self.lane(item.tenant)
        lane.waiting.remove(item)
        self._length -= 1
        if not lane.waiting:
            del lane.group.active[lane.tenant]
            lane.group.floor = lane.counter
            if not lane.group.active:
                lane.group.passed = 0.0
            self._absent(lane)

    def done(self, tenant: str) -> None:
        """A request in flight has ended."""
        lane = self.lane(tenant)
        lane.in_flight -= 1
        self._absent(lane)

    def charge(self, tenant: str, input_tokens: float, output_tokens: float) -> None:
        """Tokens that a tenant was given, or (negative) was charged too much."""
        self._charge(self.lane(tenant), service_of(input_tokens, output_tokens))

    # -- other gateways

    def elsewhere(self, tenants: Iterable[str]) -> None:
        """Who waits or is served at other gateways: their counters are those of tenants that wait here."""
        self._elsewhere = frozenset(tenants)

    def charge_elsewhere(self, tenant: str, service: float) -> None:
        """Service that a tenant was given by other gateways: it counts, but was not given here."""
        lane = self.lane(tenant)
        lane.counter += service / lane.weight

    # -- what is seen of it

    def lanes(self) -> Iterable[Lane[W]]:
        """Every tenant that was ever here; a copy, because metrics are read by another thread."""
        return list(self._lanes.values())

    def counts(self, tenant: str) -> tuple[int, int]:
        """A tenant's requests that wait, and those in flight."""
        lane = self._lanes.get(tenant)
        return (0, 0) if lane is None else (len(lane.waiting), lane.in_flight)

    def lag(self, lane: Lane[W]) -> float:
        """How much weighted service a tenant has had beyond the one of its class that is served next."""
        return lane.counter - min((o.counter for o in list(lane.group.active.values())), default=lane.counter)

    def fair_part(self, lane: Lane[W]) -> float:
        """The part of the whole, 0 to 1, that a tenant's weight gives it among those who wait or are served."""
        if self._weights is None:
            self._weights = sum(other.weight for other in self._lanes.values() if other.present)
        return 1.0 if self._weights <= lane.weight else lane.weight / self._weights

    # --

    def _absent(self, lane: Lane[W]) -> None:
        """Before a tenant comes and after it has gone: who is there changes. Of one that is there it does not."""
        if not lane.present:
            self._weights = None

    def _dispatch(self, lane: Lane[W], item: W) -> None:
        self._absent(lane)
        lane.in_flight += 1
        self._charge(lane, INPUT_WEIGHT * item.input_tokens)

    def _charge(self, lane: Lane[W], service: float) -> None:
        lane.service += service
        lane.counter += service / lane.weight
        if self._length:
            below = False
            for group in self._classes.values():
                if below and group.active:
                    group.passed += service
                below = below or group is lane.group

    def _lowest(self, lane: Lane[W]) -> float:
        """Where a tenant that begins to wait has to stand at least."""
        counters = [other.counter for other in lane.group.active.values() if other is not lane]
        for tenant in self._elsewhere:
            other = self._lanes.get(tenant)
            if other is not None and other is not lane and other.group is lane.group:
                counters.append(other.counter)
        return min(counters, default=lane.group.floor)


def _first_service(lane: Lane[W]) -> float:
    first = lane.waiting[0]
    return service_of(first.input_tokens, first.output_tokens)


def service_of(input_tokens: float, output_tokens: float) -> float:
    """What tokens cost."""
    return INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens


def _by_service(lane: Lane[W]) -> tuple[float, int]:
    # Of two that had as much, whoever has less in flight: a tenant that has just come stands level with those it met.
    return lane.counter, lane.in_flight
