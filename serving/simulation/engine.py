"""The speeds of a simulated engine and the targets its requests are judged by, from a measured or published profile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loadtest.profiles.model import EngineProfile
from serving.config import CapacityConfig
from serving.simulation import kernel

# Where a profile's engine does not say: vLLM's server on GPUs below 70 GiB and on every A100.
MAX_SEQUENCES: Final = 256
CHUNK_TOKENS: Final = 2048
_K: Final = 1000.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request must keep to count as served well.

    `ttft_s` is for what the cluster can do something about; the time that the prompt alone would take on an idle engine
    comes on top (`own_prefill`), or long prompts would miss whatever the scale.
    """

    ttft_s: float = 5.0
    itl_s: float = 0.1
    own_prefill: bool = True


@dataclass(frozen=True, slots=True)
class Engine:
    """One replica's speeds and limits; times in seconds."""

    name: str
    rate: float
    overhead_s: float
    attention_s: float
    step_s: float
    step_s_per_sequence: float
    step_s_per_token: float
    max_sequences: int
    kv_tokens: float
    chunk_tokens: int

    @classmethod
    def of(cls, profile: EngineProfile) -> Engine:
        """From a profile's fit and what its engine section says of limits."""
        fit, limits = profile.fit, profile.engine
        return cls(
            name=profile.name,
            rate=fit.prefill_tokens_per_s,
            overhead_s=fit.prefill_overhead_ms / _K,
            attention_s=fit.prefill_ms_per_1k_tokens_squared / _K,
            step_s=fit.decode_ms / _K,
            step_s_per_sequence=fit.decode_ms_per_sequence / _K,
            step_s_per_token=fit.decode_ms_per_1k_context_tokens / _K / _K,
            max_sequences=int(limits.get("max_num_seqs", MAX_SEQUENCES)),
            kv_tokens=float(limits.get("kv_tokens", math.inf)),
            chunk_tokens=int(limits.get("max_num_batched_tokens", CHUNK_TOKENS)),
        )

    @property
    def capacity(self) -> CapacityConfig:
        """The same as a model's configuration states it, for the policy."""
        return CapacityConfig(
            prefill_tokens_per_s=self.rate,
            prefill_overhead_ms=self.overhead_s * _K,
            prefill_ms_per_1k_tokens_squared=self.attention_s * _K,
            decode_ms=self.step_s * _K,
            decode_ms_per_sequence=self.step_s_per_sequence * _K,
            decode_ms_per_1k_context_tokens=self.step_s_per_token * _K * _K,
            max_sequences=self.max_sequences,
            kv_tokens=int(self.kv_tokens) if math.isfinite(self.kv_tokens) else None,
        )

    def own_s(self, prompt_tokens: Any) -> Floats:
        """Seconds that prompts take alone on an idle engine, chunks of a pass each."""
        tokens = np.asarray(prompt_tokens, dtype=np.float64)
        passes = np.ceil(tokens / self.chunk_tokens)
        fixed = max(self.step_s, self.overhead_s)
        return np.asarray(passes * fixed + tokens / self.rate + self.attention_s * (tokens / _K) ** 2)

    def speeds(self, targets: Targets) -> Floats:
        """For the kernel."""
        speed = np.zeros(kernel.SPEEDS)
        speed[kernel.RATE] = self.rate
        speed[kernel.OVERHEAD] = self.overhead_s
        speed[kernel.ATTENTION] = self.attention_s / _K / _K
        speed[kernel.STEP] = self.step_s
        speed[kernel.PER_SEQUENCE] = self.step_s_per_sequence
        speed[kernel.PER_CONTEXT] = self.step_s_per_token
        speed[kernel.SLOTS] = self.max_sequences
        speed[kernel.KV] = self.kv_tokens
        speed[kernel.CHUNK] = self.chunk_tokens
        speed[kernel.TTFT_SLO] = targets.ttft_s
        speed[kernel.ITL_SLO] = targets.itl_s
        speed[kernel.TTFT_OWN] = float(targets.own_prefill)
        return speed
