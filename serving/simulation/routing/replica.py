"""One simulated replica: vLLM's batching in the speeds of a profile, over a cache of blocks that evicts as vLLM's does.

Pass by pass where prompts are computed (each pass gives every running answer a token and computes up to a budget of
prompt tokens, first come first served), and in one stride from event to event where nothing but decoding happens.

Left out: preemption. A request is admitted when its prompt and its whole answer fit.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.simulation.engine import Engine
from serving.simulation.routing.cache import BlockCache, Hold


@dataclass(eq=False, slots=True)
class Request:
    """One request of a trace; times in seconds, of the simulation."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...]
    cached_tokens: int = 0
    done_tokens: int = 0
    first_s: float = math.nan
    end_s: float = math.nan
    hold: Hold | None = None


Told = Callable[[Request, float], None]


class Replica:
    """An engine; `advance` it to a moment before anything is read of it or put on it."""

    def __init__(self, engine: Engine, blocks: int, block_tokens: int, on_first: Told, on_end: Told) -> None:
        self._engine = engine
        self._block_tokens = block_tokens
        self._cache = BlockCache(blocks)
        self._on_first = on_first
        self._on_end = on_end
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        # Running answers by the pass that ends them; a number breaks ties.
        self._running: list[tuple[int, int, Request]] = []
        self._context_tokens = 0
        self._passes = 0
        self._number = 0
        self._now_s = 0.0
        self.busy_s = 0.0

    @property
    def next_s(self) -> float:
        """When something may be told next; infinity while idle."""
        return self._now_s if self._waiting or self._prefilling or self._running else math.inf

    def put(self, request: Request, now_s: float) -> None:
        """Queue a request; `advance` must have reached `now_s`."""
        if not (self._waiting or self._prefilling or self._running):
            self._now_s = now_s
        self._waiting.append(request)

    def advance(self, until_s: float) -> None:
        """Run every pass that begins before `until_s`."""
        while self._now_s < until_s:
            if not self._prefilling:
                self._admit()
            if self._prefilling:
                self._mixed_pass()
            elif self._running:
                self._decode(until_s)
            else:
                return

    def _admit(self) -> None:
        room = self._engine.max_sequences - len(self._running) - len(self._prefilling)
        while self._waiting and room > 0:
            request = self._waiting[0]
            hits = self._cache.match(request.hashes)
            blocks = -(-(request.prompt_tokens + request.output_tokens) // self._block_tokens)
            hold = self._cache.admit(request.hashes, hits, blocks)
            if hold is None:
                return
            self._waiting.popleft()
            request.hold = hold
            # The last token is always computed: its logits give the first token of the answer.
            request.cached_tokens = min(hits * self._block_tokens, request.prompt_tokens - 1)
            request.done_tokens = request.cached_tokens
            self._prefilling.append(request)
            room -= 1
            if sum(r.prompt_tokens - r.done_tokens for r in self._prefilling) >= self._engine.chunk_tokens:
                return

    def _mixed_pass(self) -> None:
        engine, budget = self._engine, self._engine.chunk_tokens
        seconds = max(self._step_s(len(self._running), self._context_tokens), engine.overhead_s)
        done: list[Request] = []
        while budget:
            if not self._prefilling:
                self._admit()
                if not self._prefilling:
                    break
            request = self._prefilling[0]
            before = request.done_tokens
            chunk = min(request.prompt_tokens - before, budget)
            budget -= chunk
            request.done_tokens = after = before + chunk
            seconds += chunk / engine.rate + engine.attention_s * (after * after - before * before) / 1e6
            if after < request.prompt_tokens:
                break
            done.append(self._prefilling.popleft())
        self._spend(seconds, 1)
        self._finish()
        for request in done:
            if request.hold is not None:
                self._cache.computed(request.hold, request.hashes)
            request.first_s = self._now_s
            self._on_first(request, self._now_s)
            self._number += 1
            heapq.heappush(self._running, (self._passes + request.output_tokens - 1, self._number, request))
            self._context_tokens += request.prompt_tokens
        self._finish()

    def _decode(self, until_s: float) -> None:
        batch = len(self._running)
        passes = self._running[0][0] - self._passes
        step_s = self._step_s(batch, self._context_tokens + batch * passes / 2)
        if until_s < self._now_s + passes * step_s:
            passes = max(1, math.ceil((until_s - self._now_s) / step_s))
        self._spend(passes * step_s, passes)
        self._finish()

    def _spend(self, seconds: float, passes: int) -> None:
        self._now_s += seconds
        self.busy_s += seconds
        self._passes += passes
        self._context_tokens += passes * len(self._running)

    def _finish(self) -> None:
        while self._running and self._running[0][0] <= self._passes:
            _, _, request = heapq.heappop(self._running)
            self._context_tokens -= request.prompt_tokens + request.output_tokens - 1
            if request.hold is not None:
                self._cache.release(request.hold)
                request.hold = None
            request.end_s = self._now_s
            self._on_end(request, self._now_s)

    def _step_s(self, batch: int, context_tokens: float) -> float:
        engine = self._engine
        return engine.step_s + engine.step_s_per_sequence * batch + engine.step_s_per_token * context_tokens
