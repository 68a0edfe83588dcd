"""A LoRA adapter with random weights for a random Mistral: adapters without a download.

Trained adapters start with B = 0 and change little; here both halves are random and large, so that an answer with the
adapter surely differs from one without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.engine.sources import safetensors_file
from serving.engine.sources.random_options import LoraOptions
from serving.engine.sources.safetensors_file import Tensor

TARGETS = ("q_proj", "v_proj")
STD = 0.3


def make(out: Path, options: LoraOptions, written: Callable[[int, int], None]) -> None:
    """Write the adapter into `out`, as PEFT does."""
    config = {
        "peft_type": "LORA",
        "r": options.rank,
        "lora_alpha": 2 * options.rank,
        "target_modules": list(TARGETS),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generator = np.random.Generator(np.random.PCG64(options.seed))
    tensors = []
    for name, shape in options.shapes.items():
        module = name.removesuffix(".weight")
        if not module.endswith(TARGETS):
            continue
        wide, narrow = shape
        for half, size in (("lora_A", (options.rank, narrow)), ("lora_B", (wide, options.rank))):
            tensors.append(Tensor(f"base_model.model.{module}.{half}.weight", size, partial(_normal, generator, size)))
    safetensors_file.write(out / "adapter_model.safetensors", tensors, written)


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(STD)
