"""How much of a model's work is given to its engines at once: as much as they compute, no more. Pure.

An engine computes as many sequences at a time as it has slots and as many tokens as its KV cache holds; what is beyond
waits in the engine, first come first served, where no fairness reaches it. So the gateway keeps that queue: it gives
away replicas x slots and replicas x KV tokens (prompt plus expected output), divided by the gateways that do so too.
A sequence that ends in one step of an engine is replaced two
steps later, so as many more as end in a step are under way: no slot is empty while their successors travel. Capacities
come from the engine itself, from the configuration where an engine has not said, and where neither says, slots
are DEFAULT_SEQUENCES and tokens unbounded.

Estimates err, so the token bound is corrected by what is seen: when first bytes come late (the median of a window,
of requests sent since the last correction) the engine queues, and the bound shrinks by a seventh; while they come in
time and somebody waits for tokens, it grows by a twentieth (additive increase, multiplicative decrease, as TCP's).
It never falls below a quarter of what the engine has, so a wrong signal cannot starve the engine.

A request always fits where nothing is in flight, and one that is larger than half of the whole (a long prompt, a body
of many prompts) where half is free, so it gets its turn while others go on coming.

The last of the bound is kept for tenants that have less than their fair part in flight: whoever sends little does not
wait for a slot behind somebody who takes all. Of tokens `RESERVE` is kept. Of slots, one, and as many as lack where
fewer sequences end in a step than their successors that travel: those that end are independent, so of n on average a
standard deviation is sqrt(n), and never more than all n are lacking.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from serving.admission.capacity import Capacity
from serving.admission.gateway_part import GatewayPart

RESERVE = 1 / 64
# Slots kept: one and so many standard deviations of what ends in a step (99 of 100 steps end no fewer), but never more
# than this part of all.
DEVIATIONS, MOST_KEPT = 2.33, 1 / 40
# Sequences run for at least so many steps, as far as is counted on.
LEAST_STEPS = 16.0
# With fewer slots than these a reserved one would be too much of the whole.
LEAST_FOR_RESERVE = 64
GROW, SHRINK = 0.05, 0.85
LEAST_FACTOR, MOST_FACTOR = 0.25, 4.0
# A window of first bytes is judged when it has so many, or after so long with a few.
WINDOW, WINDOW_S, FEW = 16, 2.0, 4
# First bytes later than this, or than twice the best window of late, mean that the engine queues.
FIRST_BYTE_S = 2.0
BEST_WINDOWS = 64
# With less than this part of its slots in use an engine's delays say nothing of the bound.
BUSY = 0.25


class InFlight:
    """What is in flight of one model, and whether more may be."""

    def __init__(
        self, capacity: Capacity, *, per_replica: int | None = None, first_byte_s: float = FIRST_BYTE_S
    ) -> None:
        """`per_replica`: exactly so many requests on each, and nothing is corrected."""
        self._capacity = capacity
        self._per_replica = per_replica
        self._first_byte_s = first_byte_s
        self._replicas = 0
        self._tokens_part = GatewayPart()
        self._sequences_part = GatewayPart()
        self._ends_per_step = 0.0
        self.factor = 1.0
        self.tokens = 0.0
        self.sequences = 0
        self.requests = 0
        self._tokens_bind = False
        self._delays_s: list[float] = []
        self._window_s = 0.0
        self._corrected_s = 0.0
        self._best_s: deque[float] = deque(maxlen=BEST_WINDOWS)

    # -- what is known of the engines

    def resize(self, replicas: int) -> None:
        """Take how many replicas compute."""
        self._replicas = replicas

    def learn(self, capacity: Capacity) -> None:
        """Take what an engine says of itself."""
        self._capacity = capacity

    def turnover(self, output_tokens: float) -> None:
        """Take how many tokens, and so steps, a sequence runs: in each step so many of all end."""
        self._ends_per_step = 1 / max(LEAST_STEPS, output_tokens)

    def divide(self, gateways: int) -> None:
        """Take how many gateways, this one included, give to the same engines."""
        self._tokens_part.divide(gateways)
        self._sequences_part.divide(gateways)

    def others(self, tokens: float, sequences: float, *, wanted: bool) -> None:
        """Take what other gateways have in flight, and whether one of them has less than its part and wants more."""
        self._tokens_part.heard(tokens, self.tokens, self._whole_tokens(), wanted=wanted)
        self._sequences_part.heard(sequences, self.sequences, self._whole_sequences(), wanted=wanted)

    def wants(self, *, somebody_waits: bool) -> bool:
        """Whether others are not to borrow of this gateway's part."""
        return self._sequences_part.wants(self.sequences, self._whole_sequences(), somebody_waits=somebody_waits)

    def alone(self) -> None:
        """Nothing is known of other gateways any more."""
        self._tokens_part.alone()
        self._sequences_part.alone()

    # -- requests

    def room(self, tokens: float, sequences: int, *, reserve: bool) -> bool:
        """Whether a request may be sent; `reserve`: into what is kept for tenants with little in flight."""
        if not self.requests:
            return True
        if self._per_replica is not None:
            return self.requests < self._per_replica * self._replicas
        # One that is larger than half of the whole does not wait for the engines to run empty.
        most = self.sequences_limit(keep=not reserve)
        if self.sequences + min(sequences, max(1, most // 2)) > most:
            self._tokens_bind = False
            return False
        limit = self.tokens_limit(1.0 if reserve else 1.0 - RESERVE)
        self._tokens_bind = limit is not None and self.tokens + min(tokens, limit / 2) > limit
        return not self._tokens_bind

    def take(self, tokens: float, sequences: int) -> None:
        """A request is sent."""
        self.requests += 1
        self.tokens += tokens
        self.sequences += sequences

    def grow(self, tokens: float) -> None:
        """A request in flight takes more than was expected."""
        self.tokens += tokens

    def give(self, tokens: float, sequences: int) -> None:
        """A request has ended; `tokens` is all that it had taken."""
        self.requests -= 1
        self.sequences -= sequences
        # Sums of fractions: nothing in flight is nothing.
        self.tokens = self.tokens - tokens if self.requests else 0.0

    def sequences_limit(self, *, keep: bool = False) -> int:
        """The most sequences of this gateway; `keep`: less what is kept for tenants with little in flight."""
        whole, factor = self._whole_sequences(), min(1.0, self.factor)
        most = self._sequences_part.of(whole) * factor
        if not keep or most < LEAST_FOR_RESERVE:
            return max(self._replicas or 1, int(most))
        computed = self._capacity.sequences * self._replicas
        ends = computed * self._ends_per_step
        kept = min(1.0 + min(ends, DEVIATIONS * math.sqrt(ends)), MOST_KEPT * computed)
        return min(round(self._sequences_part.of(whole - kept) * factor), int(most) - 1)

    def tokens_limit(self, part: float = 1.0) -> float | None:
        """The most tokens of this gateway; None: unbounded."""
        if self._capacity.kv_tokens is None:
            return None
        return self._tokens_part.of(self._whole_tokens()) * self.factor * part

    def _whole_sequences(self) -> float:
        """All that engines compute at a time, and what travels to them meanwhile."""
        return self._capacity.sequences * self._replicas * (1.0 + self._ends_per_step)

    def _whole_tokens(self) -> float:
        return float((self._capacity.kv_tokens or 0) * self._replicas)

    # -- what is seen

    def first_byte(self, sent_s: float, now_s: float, *, somebody_waits: bool) -> None:
        """A streamed answer has begun; its request was sent at `sent_s`."""
        if self._per_replica is not None or sent_s < self._corrected_s:
            return
        if not self._delays_s:
            self._window_s = now_s
        self._delays_s.append(now_s - sent_s)
        count = len(self._delays_s)
        if count < WINDOW and (count < FEW or now_s - self._window_s < WINDOW_S):
            return
        seen_s = median(self._delays_s)
        self._delays_s.clear()
        self._best_s.append(seen_s)
        if seen_s > max(self._first_byte_s, 2 * min(self._best_s)):
            # An engine that is slow with little to do is slow for another reason.
            if self._tokens_bind or self.sequences >= BUSY * self.sequences_limit():
                self.factor = max(LEAST_FACTOR, self.factor * SHRINK)
                self._corrected_s = now_s
        elif somebody_waits and (self.factor < 1.0 or self._tokens_bind):
            self.factor = min(MOST_FACTOR, self.factor + GROW)
