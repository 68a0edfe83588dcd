"""Requests that wait in the gateway: their model has no replica, or its engines have as much as they compute at a time.

A wait is bounded in number, bytes and time, for each model and within that for each tenant. Beyond a bound the answer
is 503 where the cluster is the cause (no replica: with what is left of a measured start as Retry-After) and 429 where
the tenant's own requests are. Promises: tenants get service by their weights, and each of them first come, first
served (`fair_queue`); a tenant that has the most waiting for its weight displaces nobody who has less, and is displaced
by them (longest-queue drop, McKenney, "Stochastic Fairness Queueing", 1990); a replica that comes is not met by
everybody at once (`slow_start`); whoever leaves has left.

Where nobody waits and engines have room (`in_flight`), a request pays one look and is counted, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from serving.admission.capacity import Capacity, configured
from serving.admission.estimates import FREE, Cost, TokenEstimates
from serving.admission.fair_queue import FairQueue, Lane, Standing
from serving.admission.in_flight import FIRST_BYTE_S, InFlight
from serving.admission.slow_start import SlowStart
from serving.admission.ticket import CallLater, End, Ticket, Timer, Work
from serving.admission.waking import Waking
from serving.config import AutoscalingConfig, ModelConfig, TenantConfig, TenantQueueConfig
from serving.errors import RateLimited, RequestError, Unavailable
from serving.metering.usage import Usage

# Replicas that could not be reached are tried again after so long, if the cluster does not speak first.
UNREACHABLE_S = 1.0
# Retry-After where replicas are there but busy: as long as the oldest has waited, within these.
BUSY_RETRY_S, MOST_BUSY_RETRY_S = 1, 60
# What engines have produced is counted while somebody waits, at most so often.
COUNT_EVERY_S = 0.05


class HoldMetrics(Protocol):
    """What a hold tells of what waits in it."""

    def hold_began(self, model: str, tenant: str, place: int) -> None:
        """A request waits, in this place among its tenant's own; 1: the tenant's next."""

    def hold_ended(self, model: str, tenant: str, end: str, seconds: float) -> None:
        """A wait is over: released, full, displaced, late or left."""


class ModelHold:
    """The requests of one model that wait or are in flight. Used from one event loop only."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        clock: Callable[[], float],
        on_need: Callable[[str], None],
        metrics: HoldMetrics,
        call_later: CallLater,
    ) -> None:
        self._id = model.id
        self._bounds = model.hold
        self._sleeps = model.replicas.min == 0
        self._clock = clock
        self._metrics = metrics
        self._call_later = call_later
        self._waking = Waking(
            (model.autoscaling or AutoscalingConfig()).start_s,
            (lambda: on_need(model.id)) if self._sleeps else None,
            clock,
            call_later,
        )
        self._slow_start = SlowStart(call_later, self._refresh)
        self._tenants: Mapping[str, TenantQueueConfig] = {}
        self._queue: FairQueue[Ticket] = FairQueue()
        self._estimates = TokenEstimates(generates=model.task == "generate")
        self._configured = configured(model)
        self.in_flight = InFlight(
            self._configured,
            per_replica=model.hold.in_flight_per_replica,
            first_byte_s=FIRST_BYTE_S if model.slo.ttft_p95_s is None else model.slo.ttft_p95_s,
        )
        self._generates = model.task == "generate"
        # Insertion order; the value is unused.
        self._flights: dict[Ticket, None] = {}
        self._counted_s = -math.inf
        self._bytes = 0
        self._ready = 0
        self._ejected = 0
        self._unreachable: Timer | None = None

    # -- what the relay calls

    def expect(self, tenant: str, work: Work | None, size_bytes: int) -> Cost:
        """What a tenant's request is expected to take."""
        if work is not None and not work.computes:
            return FREE
        return self._estimates.cost(tenant, None if work is None else work.facts, size_bytes)

    def enter(self, tenant: str, size_bytes: int, since_s: float, work: Work | None = None) -> Ticket:
        """A place in the queue, or at once a turn (`released`); raises RequestError beyond the bounds."""
        cost = self.expect(tenant, work, size_bytes)
        ticket = Ticket(self, tenant, size_bytes, since_s, cost, work)
        if (not self._queue or cost is FREE) and self._may(ticket):
            self._queue.pass_by(ticket)
            self._send(ticket)
            return ticket
        self._make_room(ticket)
        self._queue.push(ticket)
        self._bytes += size_bytes
        lane = self._queue.lane(tenant)
        lane.waiting_bytes += size_bytes
        self._metrics.hold_began(self._id, tenant, len(lane.waiting))
        left_s = max(0.0, self._wait_s(tenant) - (self._clock() - since_s))
        ticket.start_timer(self._call_later(left_s, lambda: ticket.finish_wait("late")))
        self._refresh()
        return ticket

    def charge(self, ticket: Ticket, usage: Usage) -> None:
        """A request has ended and is billed this: the same is its tenant's service, whatever was charged before."""
        if not ticket.charged and ticket.released:
            ticket.charged = True
            self._queue.charge(
                ticket.tenant,
                usage.prompt_tokens - ticket.cost.input_tokens,
                usage.completion_tokens - ticket.charged_output,
            )

    def unreachable(self) -> None:
        """No replica could be reached: treat the model as without one until the cluster says more, or for a moment."""
        if self._unreachable is None:
            self._unreachable = self._call_later(UNREACHABLE_S, self._reachable_again)
        self._refresh()

    # -- what the cluster and the configuration tell

    def update(self, ready: int) -> None:
        """Take the number of replicas that the cluster lists as ready."""
        self._ready = ready
        self.in_flight.resize(self._computing)
        self._reachable_again()

    def ejected(self, replicas: int) -> None:
        """Take how many of them get no new requests: what they compute is not to be given to the others."""
        self._ejected = replicas
        self.in_flight.resize(self._computing)
        self._refresh()

    def measured(self, start_s: float) -> None:
        """Take how long a replica of this model took to start."""
        self._waking.start_s = start_s

    def learn(self, said: Mapping[str, int]) -> None:
        """Take what an engine of this model says that it computes at a time: sequences, kv_tokens."""
        known, bounds = self._configured, self._bounds
        tokens = bounds.kv_tokens_per_replica or said.get("kv_tokens") or known.kv_tokens
        self.in_flight.learn(
            Capacity(
                bounds.sequences_per_replica or said.get("sequences") or known.sequences,
                tokens if self._generates else None,
            )
        )
        self._refresh()

    def divide(self, gateways: int) -> None:
        """Take how many gateways give to the same engines."""
        self.in_flight.divide(gateways)
        self._refresh()

    def look_again(self) -> None:
        """Something that decides has changed elsewhere."""
        if self._queue:
            self._refresh()

    def grant(self, tenants: Mapping[str, TenantConfig]) -> None:
        """Take what tenants are granted from now on: weight, priority, bounds of their waits."""
        self._tenants = {tenant: config.queue for tenant, config in tenants.items()}
        self._queue.update({tenant: Standing(c.weight, c.priority) for tenant, c in tenants.items()})
        self._estimates.keep(tenants)
        self._refresh()

    # -- what is seen of it

    @property
    def queue(self) -> FairQueue[Ticket]:
        """Who waits, and what each tenant was given."""
        return self._queue

    @property
    def is_open(self) -> bool:
        """Whether the model has a replica and nobody waits."""
        return self._reachable > 0 and not self._queue

    def held(self) -> dict[str, int]:
        """Waiting requests by tenant."""
        return {lane.tenant: len(lane.waiting) for lane in self._queue.lanes() if lane.waiting}

    @property
    def held_bytes(self) -> int:
        """Bytes of the waiting requests' bodies."""
        return self._bytes

    @property
    def turns(self) -> int:
        """Requests that had their turn and have not ended."""
        return self.in_flight.requests

    def oldest_s(self) -> float:
        """How long the oldest has waited; 0 where nobody waits."""
        oldest_s = min((lane.waiting[0].since_s for lane in self._queue.lanes() if lane.waiting), default=None)
        return 0.0 if oldest_s is None else self._clock() - oldest_s

    def shares(self) -> Iterable[tuple[str, float, float, float]]:
        """Of each tenant: service given; and while it waits how far it is ahead, and its part of its bound."""
        for lane in list(self._queue.lanes()):
            lag = self._queue.lag(lane) if lane.waiting else 0.0
            own = self._tenants.get(lane.tenant)
            most = self._bounds.requests if own is None or own.requests is None else own.requests
            yield lane.tenant, lane.service, lag, len(lane.waiting) / max(1, min(most, self._bounds.requests))

    def budget(self) -> tuple[tuple[float, float | None], tuple[int, int]]:
        """In flight and the most of it: tokens, sequences."""
        flight = self.in_flight
        return (flight.tokens, flight.tokens_limit()), (flight.sequences, flight.sequences_limit())

    def refusal(self, why: str, ticket: Ticket | None = None) -> RequestError:
        """The answer beyond a bound."""
        seconds = self._retry_after_s()
        if self._reachable:
            if ticket is not None and ticket.own_fault:
                return RateLimited(
                    f"Your organisation has as many requests for the model '{self._id}' waiting as it may have, "
                    f"while others wait too or engines are full. Try again in {seconds} s.",
                    retry_after_s=seconds,
                )
            message = f"The model '{self._id}' has as many requests as it takes. Try again shortly."
            return Unavailable(message, code="overloaded", retry_after_s=seconds)
        begun = {
            "full": "and as many requests wait for one as may wait",
            "displaced": "and others, whose tenants have fewer requests waiting, wait for one",
            "late": f"and none came within {self._bounds.wait_s:g} s",
        }[why]
        state = "asleep or still starting" if self._sleeps else "still loading"
        return Unavailable(
            f"The model '{self._id}' is {state}: no replica is ready yet, {begun}. Try again in {seconds} s.",
            retry_after_s=seconds,
        )

    # -- what tickets call

    def forget(self, ticket: Ticket, end: End) -> None:
        """A wait has ended otherwise than by its turn."""
        ticket.own_fault = end == "displaced" or self._has_most(ticket.tenant)
        self._queue.remove(ticket)
        self._waited(ticket, end)
        self._refresh()

    def answering(self, ticket: Ticket) -> None:
        """The engine has begun to answer."""
        now_s = self._clock()
        if ticket.work is not None and ticket.work.stream:
            self.in_flight.first_byte(ticket.sent_s, now_s, somebody_waits=bool(self._queue))
        if ticket.ramped:
            ticket.ramped = False
            self._slow_start.answered()
            self._refresh()

    def turn_ended(self, ticket: Ticket) -> None:
        """A request that had its turn is over: what it took is known."""
        del self._flights[ticket]
        self._settle(ticket)
        self.in_flight.give(ticket.held_tokens, ticket.cost.sequences)
        self._queue.lane(ticket.tenant).sequences -= ticket.cost.sequences
        self._queue.done(ticket.tenant)
        if ticket.ramped:
            ticket.ramped = False
            self._slow_start.answered()
        if self._queue:
            self._refresh()

    # --

    def _may(self, ticket: Ticket) -> bool:
        if self._slow_start.full(self._reachable):
            return False
        tokens, sequences = ticket.cost.input_tokens + ticket.cost.output_tokens, ticket.cost.sequences
        if self.in_flight.room(tokens, sequences, reserve=False):
            return True
        return self._below_its_part(self._queue.lane(ticket.tenant)) and self.in_flight.room(
            tokens, sequences, reserve=True
        )

    def _below_its_part(self, lane: Lane[Ticket]) -> bool:
        # By sequences: a body may hold many prompts.
        return lane.sequences < self._queue.fair_part(lane) * self.in_flight.sequences or lane.sequences == 0

    def _send(self, ticket: Ticket) -> None:
        """A request goes: it is in flight from now on."""
        ticket.sent_s = self._clock()
        ticket.held_tokens = ticket.cost.input_tokens + ticket.cost.output_tokens
        self.in_flight.take(ticket.held_tokens, ticket.cost.sequences)
        self._flights[ticket] = None
        self._queue.lane(ticket.tenant).sequences += ticket.cost.sequences
        ticket.ramped = self._slow_start.sent()
        ticket.release()

    def _count(self) -> None:
        """Charge what engines have produced since the last count."""
        now_s = self._clock()
        if now_s - self._counted_s < COUNT_EVERY_S:
            return
        self._counted_s = now_s
        for ticket in self._flights:
            work = ticket.work
            if work is None or work.first_byte_s is None or not work.stream:
                continue
            produced = work.later_events + 1.0
            if produced > ticket.charged_output:
                self._queue.charge(ticket.tenant, 0.0, produced - ticket.charged_output)
                ticket.charged_output = produced
                beyond = ticket.cost.input_tokens + produced - ticket.held_tokens
                if beyond > 0:
                    ticket.held_tokens += beyond
                    self.in_flight.grow(beyond)

    def _settle(self, ticket: Ticket) -> None:
        work = ticket.work
        if work is None or not work.computes:
            return
        if work.first_byte_s is None and not work.client_left:
            # No engine gave anything for it.
            self.charge(ticket, Usage(0, 0))
            return
        usage = work.usage
        if usage is None or not work.usage_exact:
            # Its engine is asked. Until it has said (`charge`), the prompt counts as expected, and so does an answer of
            # which nothing is seen while it is written.
            produced = ticket.output_tokens
            if work.stream:
                produced = work.later_events + 1.0 if work.first_byte_s is not None else 0.0
            if produced > ticket.charged_output:
                self._queue.charge(ticket.tenant, 0.0, produced - ticket.charged_output)
                ticket.charged_output = produced
            return
        self.charge(ticket, usage)
        if work.outcome == "completed" and work.facts is not None and usage.prompt_tokens:
            self._estimates.learn(ticket.tenant, work.facts, usage)
            self.in_flight.turnover(self._estimates.output_tokens)

    @property
    def _computing(self) -> int:
        # Who has left may be counted as ejected for a moment yet.
        return max(0, self._ready - self._ejected)

    @property
    def _reachable(self) -> int:
        return 0 if self._unreachable is not None else self._ready

    def _reachable_again(self) -> None:
        if self._unreachable is not None:
            self._unreachable.cancel()
            self._unreachable = None
        self._refresh()

    def _refresh(self) -> None:
        """Let go whose turn it is."""
        if self._queue:
            self._count()
            while (ticket := self._whose_turn()) is not None:
                self._queue.take(ticket)
                self._send(ticket)
                self._waited(ticket, "released")
        waits = bool(self._queue)
        self._slow_start.follow(self._reachable, somebody_waits=waits)
        self._waking.follow(has_replica=self._ready > 0, somebody_waits=waits)

    def _whose_turn(self) -> Ticket | None:
        """Who may go now. Where whoever is next may not, what is kept for those with little in flight is theirs all the
        same: two requests of theirs at one moment are not to wait behind a tenant that takes all.
        """
        first = self._queue.next()
        if first is None or self._may(first):
            return first
        if self._slow_start.full(self._reachable) or not self.in_flight.room(0.0, 1, reserve=True):
            return None
        near = (t for t in self._queue.near(first) if self._below_its_part(self._queue.lane(t.tenant)))
        return next((ticket for ticket in near if self._may(ticket)), None)

    def _waited(self, ticket: Ticket, end: End) -> None:
        self._bytes -= ticket.size_bytes
        self._queue.lane(ticket.tenant).waiting_bytes -= ticket.size_bytes
        self._metrics.hold_ended(self._id, ticket.tenant, end, self._clock() - ticket.since_s)

    # -- bounds

    def _wait_s(self, tenant: str) -> float:
        own = self._tenants.get(tenant)
        return self._bounds.wait_s if own is None or own.wait_s is None else own.wait_s

    def _make_room(self, ticket: Ticket) -> None:
        bounds, lane = self._bounds, self._queue.lane(ticket.tenant)
        own = self._tenants.get(ticket.tenant)
        if own is not None and own.requests is not None and len(lane.waiting) >= own.requests:
            self._refuse(ticket)
        while len(self._queue) >= bounds.requests or self._bytes + ticket.size_bytes > bounds.bytes:
            most = max((other for other in self._queue.lanes() if other.waiting), key=self._share, default=lane)
            if most is lane or self._share(most) <= self._share(lane, 1, ticket.size_bytes):
                self._refuse(ticket)
            most.waiting[-1].finish_wait("displaced")

    def _refuse(self, ticket: Ticket) -> None:
        self._metrics.hold_ended(self._id, ticket.tenant, "full", 0.0)
        # Where none may wait, whoever finds engines full is refused.
        ticket.own_fault = self._bounds.requests > 0
        raise self.refusal("full", ticket)

    def _share(self, lane: Lane[Ticket], more: int = 0, more_bytes: int = 0) -> float:
        """A tenant's part of the hold for its weight."""
        count, size = len(lane.waiting) + more, lane.waiting_bytes + more_bytes
        return max(count / max(1, self._bounds.requests), size / self._bounds.bytes) / lane.weight

    def _has_most(self, tenant: str) -> bool:
        """Whether a tenant has more waiting than any other that waits too."""
        lane = self._queue.lane(tenant)
        shares = [self._share(other) for other in self._queue.lanes() if other.waiting and other is not lane]
        return bool(shares) and self._share(lane) >= max(shares)

    def _retry_after_s(self) -> int:
        if self._reachable:
            return min(MOST_BUSY_RETRY_S, max(BUSY_RETRY_S, math.ceil(self.oldest_s())))
        return self._waking.retry_after_s()
