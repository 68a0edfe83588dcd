"""How many replicas the work takes that comes and that is there already, from signals that lag and vary.

Three things are told apart. Prompts need an engine's time at once: their rate counts as it is. Answers stay for as long
as they take, so a swell that is shorter than an answer fills no replica: their rate counts smoothed over that time (by
Little's law what runs follows what came, an answer's length later). And what lengths do not tell, because only those of
answers that have ended are known, shows in the KV cache: replicas whose cache is in use are busy, whatever came; where
that is more than the rate accounts for all the time, the rate is taken for as much more. And where requests wait that
do not become fewer, replicas have all that they can do, whatever was reckoned: then what they are seen to take counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from serving.autoscaling.capacity import PREFILL_SHARE, Capacity

# How slowly the length of what runs is learned against that of what ended.
_CONTEXT_S: Final = 900.0
# How slowly it is learned what KV caches hold against what the rate accounts for, and the most that is believed.
_HELD_S: Final = 300.0
_MOST_HELD: Final = 3.0
# Contexts beyond so many times the mean request's are a fault of the signals.
_MOST_CONTEXT: Final = 6.0


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are like, as learned: a part of the policy's memory; None: not known yet."""

    prompt_tokens: float | None = None
    output_tokens: float | None = None
    # Tokens that running requests hold against those of a mean request half through its answer; 1: all are alike.
    spread: float = 1.0
    # Requests a second, smoothed over an answer's time.
    arrivals_rps: float | None = None
    # Replicas whose KV cache is in use, and those that the rate accounts for; means of the last minutes.
    held: float = 0.0
    accounted: float = 0.0

    @property
    def underrated(self) -> float:
        """What the rate's replicas are to be multiplied by; at least 1."""
        if self.accounted <= 0:
            return 1.0
        return min(max(self.held / self.accounted, 1.0), _MOST_HELD)

    @property
    def context(self) -> float:
        """Tokens that a running request holds on average over time."""
        return (max(self.prompt_tokens or 0.0, 1.0) + (self.output_tokens or 0.0) / 2) * self.spread

    def seen(self, *, running: float, in_cache: float | None, passed_s: float) -> Mix:
        """After a moment at which so many requests ran and held so many tokens; None: nobody tells."""
        if not running or in_cache is None or self.prompt_tokens is None:
            return self
        found = min(max(in_cache / running / replace(self, spread=1.0).context, 1.0), _MOST_CONTEXT)
        return replace(self, spread=found + (self.spread - found) * math.exp(-passed_s / _CONTEXT_S))


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, in replicas, and what one of them does."""

    demand: float
    # Requests a second of one replica, and how long a request is on it then.
    rate_rps: float
    answer_s: float


def work(
    capacity: Capacity, mix: Mix, *, arrivals_rps: float, kv_in_use: float | None, ahead_s: float, passed_s: float
) -> tuple[Work, Mix]:
    """The work as it will be in `ahead_s` if requests come as they do now.

    `kv_in_use`: caches full of KV blocks, summed over replicas (a real number); None: nobody tells.
    """
    prompt, output = max(mix.prompt_tokens or 0.0, 1.0), mix.output_tokens or 0.0
    context = mix.context
    rate = capacity.requests_per_s(prompt, output, context)
    busy = capacity.batch(rate, prompt, output, context)
    answer_s = capacity.prefill_s(prompt) + (busy / rate if math.isfinite(busy) else 0.0)
    before = mix.arrivals_rps
    mean = arrivals_rps if before is None else arrivals_rps + (before - arrivals_rps) * math.exp(-passed_s / answer_s)
    mix = replace(mix, arrivals_rps=mean)
    staying = math.exp(-ahead_s / answer_s)
    held = 0.0
    if kv_in_use is not None:
        held = kv_in_use / capacity.kv_share(prompt, context)
        fades = math.exp(-passed_s / _HELD_S)
        mix = replace(
            mix, held=held + (mix.held - held) * fades, accounted=mean / rate + (mix.accounted - mean / rate) * fades
        )
    # Of what runs now, a part will still run then.
    runs = max(mean / rate * mix.underrated, held)
    demand = staying * runs + (1 - staying) * arrivals_rps / rate * mix.underrated
    demand = max(demand, arrivals_rps * capacity.prefill_s(prompt) / PREFILL_SHARE)
    return Work(demand, rate / mix.underrated, answer_s), mix


# Requests that wait, on how many replicas: (seconds, requests, replicas).
Queued = tuple[float, float, int]
# So long a queue is watched before it tells what replicas take.
WATCHED_S: Final = 60.0
_MOST_SEEN: Final = 2.0


def under_strain(found: Work, queued: Sequence[Queued], *, arrivals_rps: float, breathing: float) -> Work:
    """The work by what replicas were seen to take, where requests waited on them for WATCHED_S."""
    began, now = queued[0], queued[-1]
    lasted_s = now[0] - began[0]
    if lasted_s < WATCHED_S - 1 or any(waiting <= breathing * ready for _, waiting, ready in queued):
        return found
    taken_rps = arrivals_rps - (now[1] - began[1]) / lasted_s
    ready = min(ready for _, _, ready in queued)
    if ready <= 0 or taken_rps <= 0:
        return found
    rate = max(min(taken_rps / ready, found.rate_rps), found.rate_rps / _MOST_SEEN)
    return replace(found, rate_rps=rate, demand=max(found.demand, arrivals_rps / rate))
