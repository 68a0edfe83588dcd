"""Replica choice as pure functions from what is known of candidates to the index of one.

`least_cost` is the default: seconds until a prompt would be computed, on each candidate. Its terms:

- what waits there before it, as uncached prompt tokens, and its own uncached tokens, at the rate of prefill as far as
  running answers leave time for it;
- its own count for more than one second a second (`reuse_weight`): computing anew what another replica holds costs
  this request once, and everybody later, because it fills a cache with what is there twice. The more requests under
  way share the prefix, the less so (by the square of them): a copy on a second replica will be used. So a
  conversation stays where it is, and a popular prefix spreads as soon as its replica has a queue;
- what it takes to load the request's adapter, where it is not loaded;
- a little of what a replica has computed beyond the others of late, never more than the prompt itself would take: it
  decides where nothing else does, and caches of one size grow old at one speed.

`less_loaded_of_two`: two random candidates and the less loaded of them come close to the least loaded of all, without
the herd that "least loaded" sends to one replica when several gateways act on the same stale picture (Mitzenmacher,
"The Power of Two Choices in Randomized Load Balancing", 2001). `bounded_walk`: consistent hashing with bounded loads
(Mirrokni, Thorup, Zadimoghaddam, SODA 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, NamedTuple

# Of what a replica has computed beyond the mean in the last minutes, so much counts.
SURPLUS_WEIGHT: Final = 0.1
# Prompt tokens of one pass where nobody says: vLLM's server on most GPUs.
CHUNK_TOKENS: Final = 2048


class Candidate(NamedTuple):
    """What a gateway knows of one replica, for one request; loads are all gateways'."""

    # Uncached prompt tokens of its requests that have no first byte yet.
    waiting_tokens: float
    in_flight: int
    # Prompts of those in flight.
    in_flight_tokens: float
    # Of this request's prompt, what is in its cache.
    cached_tokens: int = 0
    # Prompt tokens computed of late, beyond the mean of all replicas; below it negative.
    surplus_tokens: float = 0.0
    # What it takes to load the request's adapter here, as prompt tokens; 0 where it is loaded or there is none.
    to_load_tokens: float = 0.0


class Demand(NamedTuple):
    """What is to be placed: a prompt, and how many requests under way share what is cached of it."""

    tokens: int
    sharers: int = 0


@dataclass(frozen=True, slots=True)
class Speeds:
    """One replica's, as configured, measured or assumed; a 7B model on one large GPU where nothing is known."""

    prefill_tokens_per_s: float = 10_000.0
    decode_s: float = 0.01
    decode_s_per_sequence: float = 0.0001
    decode_s_per_context_token: float = 0.0
    # Prompt tokens of one pass.
    chunk_tokens: int = CHUNK_TOKENS
    # Seconds for a prompt token, with its part of the pass: of any pass, and more for each sequence and each token of
    # context in it.
    token_s: tuple[float, float, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pass_s = 1 / self.prefill_tokens_per_s + self.decode_s / self.chunk_tokens
        per_sequence_s = self.decode_s_per_sequence / self.chunk_tokens
        per_context_token_s = self.decode_s_per_context_token / self.chunk_tokens
        object.__setattr__(self, "token_s", (pass_s, per_sequence_s, per_context_token_s))


def cost_s(candidate: Candidate, demand: Demand, speeds: Speeds, reuse_weight: float) -> float:
    """Seconds that a request is taken to cost on this replica."""
    return _cost_s(candidate, demand.tokens, speeds.token_s, _weight(demand, reuse_weight))


def _weight(demand: Demand, reuse_weight: float) -> float:
    return max(1.0, reuse_weight / (1 + demand.sharers) ** 2)


def _cost_s(candidate: Candidate, tokens: int, token_s: tuple[float, float, float], weight: float) -> float:
    waiting, in_flight, in_flight_tokens, cached, surplus, to_load = candidate
    pass_s, per_sequence_s, per_context_token_s = token_s
    balance = SURPLUS_WEIGHT * surplus
    if balance > tokens:
        balance = tokens
    elif balance < -tokens:
        balance = -tokens
    each_s = pass_s + per_sequence_s * in_flight + per_context_token_s * in_flight_tokens
    return (waiting + weight * (tokens - cached) + balance + to_load) * each_s


def least_cost(candidates: Sequence[Candidate], demand: Demand, speeds: Speeds, reuse_weight: float) -> int:
    """Index of the cheapest; of equals the one with fewer requests in flight, then the first."""
    tokens, token_s, weight = demand.tokens, speeds.token_s, _weight(demand, reuse_weight)
    best, best_s, best_in_flight = 0, math.inf, 0
    for i, candidate in enumerate(candidates):
        seconds = _cost_s(candidate, tokens, token_s, weight)
        if seconds < best_s or (seconds == best_s and candidate.in_flight < best_in_flight):
            best, best_s, best_in_flight = i, seconds, candidate.in_flight
    return best


def less_loaded_of_two(loads: Sequence[int], rng: Random) -> int:
    """Index of the less loaded of two distinct random candidates; a tie goes to the first drawn.

    `loads` are requests in flight, one entry a candidate, at least one.
    """
    if len(loads) == 1:
        return 0
    first, second = rng.sample(range(len(loads)), 2)
    return second if loads[second] < loads[first] else first


def bounded_walk(ring: Iterable[int], in_flight: Callable[[int], int], total: int, replicas: int, factor: float) -> int:
    """The first replica on the ring with room for one more: at most `factor` times the mean, rounded up.

    `ring` yields replicas from a key's place on, some repeatedly; `total` requests are in flight on all `replicas`.
    With a factor above 1 somebody always has room; if loads of another picture say otherwise, it is the first.
    """
    most = math.ceil(factor * (total + 1) / replicas)
    first = None
    for replica in ring:
        if first is None:
            first = replica
        if in_flight(replica) < most:
            return replica
    if first is None:
        raise ValueError("a ring without replicas")
    return first
