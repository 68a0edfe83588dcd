"""What a replica tells the process of its engine; one line of JSON between the two."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from serving.config import ModelConfig


class RayPlacement(BaseModel):
    """Where the workers of an engine are to run: a placement group of a Ray cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    group: str  # the group's id, hexadecimal


class HostSpec(BaseModel):
    """One engine to run: its model, its weights, the interface and token of its port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    weights: Path
    # Directories of the model's adapters by id.
    adapters: dict[str, Path] = {}
    host: str
    token: str
    gpu: bool
    # Where its spans go; None: it is not traced.
    otlp_traces_url: str | None = None
    # For an engine whose workers are Ray actors.
    placement: RayPlacement | None = None
