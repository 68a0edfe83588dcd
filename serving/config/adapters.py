"""LoRA adapters of a model: what they are called, where they come from, how many an engine holds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.config.base import MODEL_ID, Frozen, Misplaced, PositiveInt, known_source

ADAPTER_SCHEMES = ("path", "hf", "random")
# Ranks that vLLM has kernels for.
Rank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


class AdapterConfig(Frozen):
    """One LoRA adapter: clients name it as they name a model."""

    id: Annotated[str, Field(pattern=MODEL_ID, max_length=128)]
    # A directory in PEFT's format (adapter_config.json and weights): path:…, hf:…; random:lora for tests.
    source: Annotated[str, Field(max_length=1024)]

    @field_validator("source")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return known_source(value, ADAPTER_SCHEMES, "adapter")


class LoraConfig(Frozen):
    """How many adapters each engine holds; beyond that, the one used longest ago makes room."""

    # Adapters whose requests run in one batch; each takes GPU memory of its own.
    slots: PositiveInt = 4
    # Adapters kept in main memory, ready to be moved into a slot; absent: twice the slots.
    cached: PositiveInt | None = None
    # The largest rank of any adapter of this model.
    max_rank: Rank = 16

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.cached is not None and self.cached < self.slots:
            raise Misplaced(f"cached ({self.cached}) is below slots ({self.slots})", "cached")
        return self

    @property
    def in_memory(self) -> int:
        """Adapters kept in main memory."""
        return 2 * self.slots if self.cached is None else self.cached
