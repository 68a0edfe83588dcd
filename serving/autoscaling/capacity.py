"""What one replica can take: requests a second at which the promised latencies still hold, from measured speeds.

The engine batches continuously, so a replica has no fixed concurrency: prefill takes a share of its time, and what is
left advances every running answer by one token a step, each step longer the more answers run. At a rate of r
requests a second of P prompt and O output tokens the share of prefill is u = r x prefill(P), the batch settles where

    b = r x O x step(b) / (1 - u)        and the time between two tokens is  step(b) / (1 - u).

Capacity is the greatest r at which that time, the batch and the KV cache are within their limits. The latency model is
that of `loadtest profile`; the fixed point is the mean-value analysis of a processor-sharing queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

from serving.config import CapacityConfig, FakeEngineConfig, ModelConfig

# Of prefill alone: beyond it the wait for the first token grows without measure.
PREFILL_SHARE: Final = 0.85
# The mean against the target that most requests are to keep.
ITL_SHARE: Final = 0.85
# Batches and KV caches vary around their mean, and a full one makes requests wait.
BATCH_SHARE: Final = 0.85
_K: Final = 1000.0
_HALVINGS: Final = 40


@dataclass(frozen=True, slots=True)
class Capacity:
    """A replica's speeds and limits, in seconds and tokens; the targets it is to keep."""

    prefill_tokens_per_s: float
    prefill_overhead_s: float
    prefill_s_per_k_squared: float
    step_s: float
    step_s_per_sequence: float
    step_s_per_k_context: float
    max_sequences: float
    kv_tokens: float = math.inf
    itl_s: float = math.inf

    @classmethod
    def of(cls, model: ModelConfig) -> Self | None:
        """From the configuration, the fake engine's own figures where it serves the model; None: not known."""
        measured = model.autoscaling.capacity if model.autoscaling else None
        if measured is None and model.is_fake:
            measured = of_fake(model.fake or FakeEngineConfig())
        if measured is None:
            return None
        return cls.measured(measured, itl_s=model.slo.itl_p95_s)

    @classmethod
    def measured(cls, config: CapacityConfig, *, itl_s: float | None) -> Self:
        """From what was measured."""
        return cls(
            prefill_tokens_per_s=config.prefill_tokens_per_s,
            prefill_overhead_s=config.prefill_overhead_ms / _K,
            prefill_s_per_k_squared=config.prefill_ms_per_1k_tokens_squared / _K,
            step_s=config.decode_ms / _K,
            step_s_per_sequence=config.decode_ms_per_sequence / _K,
            step_s_per_k_context=config.decode_ms_per_1k_context_tokens / _K,
            max_sequences=float(config.max_sequences),
            kv_tokens=math.inf if config.kv_tokens is None else float(config.kv_tokens),
            itl_s=math.inf if itl_s is None else itl_s,
        )

    def prefill_s(self, prompt_tokens: float) -> float:
        """Engine time of one prompt."""
        k = prompt_tokens / _K
        return (
            self.prefill_overhead_s + prompt_tokens / self.prefill_tokens_per_s + self.prefill_s_per_k_squared * k * k
        )

    def requests_per_s(self, prompt_tokens: float, output_tokens: float, context: float | None = None) -> float:
        """The greatest rate of such requests that one replica takes within its limits; above 0.

        `context`: tokens that a running request holds on average over time, where that was seen; without it as if all
        were alike. Long answers run longer, so where lengths vary it is more than prompt + output / 2.
        """
        if context is None:
            context = prompt_tokens + output_tokens / 2
        most = min(self.max_sequences * BATCH_SHARE, self.kv_tokens * BATCH_SHARE / _at_the_end(prompt_tokens, context))
        most = max(most, 1.0)
        low, high = 0.0, PREFILL_SHARE / max(self.prefill_s(prompt_tokens), 1e-9)
        if self._within(high, prompt_tokens, output_tokens, context, most):
            return high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._within(middle, prompt_tokens, output_tokens, context, most):
                low = middle
            else:
                high = middle
        # A target that not even one request alone keeps must not make a replica worthless: then it serves one by one.
        alone_s = self.prefill_s(prompt_tokens) + output_tokens * self._step_s(1.0, context)
        return max(low, 1.0 / max(alone_s, 1e-9))

    def _step_s(self, batch: float, context: float) -> float:
        return self.step_s + batch * (self.step_s_per_sequence + self.step_s_per_k_context * context / _K)

    def batch(self, rate: float, prompt_tokens: float, output_tokens: float, context: float) -> float:
        """Requests that run on a replica at a rate; by Little's law their time on it is this over the rate."""
        left = 1.0 - rate * self.prefill_s(prompt_tokens)
        tokens_per_s = rate * max(output_tokens - 1.0, 0.0)
        spare = left - tokens_per_s * (self.step_s_per_sequence + self.step_s_per_k_context * context / _K)
        return tokens_per_s * self.step_s / spare if spare > 0 else math.inf

    def kv_share(self, prompt_tokens: float, context: float) -> float:
        """The share of the KV cache in use at which a replica has all that it should: what runs has room to end."""
        return BATCH_SHARE * min(max(context, 1.0) / _at_the_end(prompt_tokens, context), 1.0)

    def _within(self, rate: float, prompt_tokens: float, output_tokens: float, context: float, most: float) -> bool:
        left = 1.0 - rate * self.prefill_s(prompt_tokens)
        # One token of each answer comes out of its prefill.
        tokens_per_s = rate * max(output_tokens - 1.0, 0.0)
        each = self.step_s_per_sequence + self.step_s_per_k_context * context / _K
        spare = left - tokens_per_s * each
        if spare <= 0:
            return False
        batch = tokens_per_s * self.step_s / spare
        return batch <= most and self._step_s(batch, context) / left <= self.itl_s * ITL_SHARE


def _at_the_end(prompt_tokens: float, context: float) -> float:
    """Tokens that what runs will hold at its end: it is half through its answer on average."""
    return max(2 * context - prompt_tokens, context, 1.0)


def of_fake(fake: FakeEngineConfig) -> CapacityConfig:
    """The fake engine's latency model in the words of a measured one."""
    return CapacityConfig(
        prefill_tokens_per_s=fake.prefill_tokens_per_s,
        decode_ms=fake.decode_ms,
        decode_ms_per_sequence=fake.decode_ms_per_sequence,
        max_sequences=fake.batch_slots,
        kv_tokens=fake.kv_blocks * fake.block_tokens,
    )
