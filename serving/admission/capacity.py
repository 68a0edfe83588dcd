"""What one replica computes at a time, as the engine says or, until it has, as the configuration does. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from serving.config import FakeEngineConfig, ModelConfig

# vLLM's own default for most devices.
DEFAULT_SEQUENCES = 256


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica computes at a time; `kv_tokens` None: not known, or no bound."""

    sequences: int = DEFAULT_SEQUENCES
    kv_tokens: int | None = None


def configured(model: ModelConfig) -> Capacity:
    """What a replica computes at a time, as far as the configuration says."""
    sequences, kv_tokens = model.hold.sequences_per_replica, model.hold.kv_tokens_per_replica
    if model.is_fake:
        fake = model.fake or FakeEngineConfig()
        sequences = sequences or fake.batch_slots
        kv_tokens = kv_tokens or fake.kv_blocks * fake.block_tokens
    named = model.engine.get("max_num_seqs")
    if sequences is None:
        sequences = named if isinstance(named, int) and named > 0 else DEFAULT_SEQUENCES
    # An embedding keeps no KV cache from one pass to the next.
    return Capacity(sequences, kv_tokens if model.task == "generate" else None)
