"""A tiny Mistral with random weights: the architecture, tensor parallelism and the API without a download.

What it answers is noise. The same options give the same weights on every machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.engine.sources import safetensors_file
from serving.engine.sources.random_options import VOCABULARY, Options
from serving.engine.sources.safetensors_file import Tensor

CONTEXT_TOKENS = 4096
WEIGHT_STD = 0.02  # transformers' initializer_range
# Mistral's own tokenizer, as mistral-common names it (vLLM needs that package), and its special tokens.
OWN_TOKENIZER = "mistral_instruct_tokenizer_240323.model.v3"
OWN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make(tokenizer: Path, out: Path, options: Options, written: Callable[[int, int], None]) -> None:
    """Write the model into `out`, with the tokenizer and token ids of the directory `tokenizer`."""
    donor = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    if donor["vocab_size"] != VOCABULARY:
        raise ValueError(f"{tokenizer} has {donor['vocab_size']} tokens, {VOCABULARY} expected")
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "head_dim": options.head_dim,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "max_position_embeddings": CONTEXT_TOKENS,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "vocab_size": options.vocabulary,
        **(OWN_IDS if options.mistral_tokenizer else {key: donor[key] for key in OWN_IDS}),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if options.mistral_tokenizer:
        own = resources.files("mistral_common") / "data" / OWN_TOKENIZER
        (out / "tokenizer.model.v3").write_bytes(own.read_bytes())
    else:
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, out / name)
    generator = np.random.Generator(np.random.PCG64(options.seed))
    tensors = [
        Tensor(name, shape, partial(_ones if len(shape) == 1 else partial(_normal, generator), shape))
        for name, shape in options.shapes.items()
    ]
    safetensors_file.write(out / "model.safetensors", tensors, written)


def _ones(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.ones(shape, dtype=np.float32)


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(WEIGHT_STD)
