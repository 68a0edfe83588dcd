"""Llama-architecture GGUF files into Hugging Face's layout: bfloat16 safetensors, config, tokenizer.

Done here because the general way (transformers' GGUF loader) reads the file four times and needs torch: about
fifty seconds on two cores, against ten. It covers what the bundled model needs and refuses everything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engine.sources import safetensors_file
from serving.engine.sources.safetensors_file import Tensor

CONTROL_TOKEN = 3  # llama.cpp: LLAMA_TOKEN_TYPE_CONTROL

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(file: Path, out: Path, written: Callable[[int, int], None]) -> None:
    """Write config, tokenizer and weights of `file` into `out`; ValueError where it is not covered."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{file.name} has architecture {fields['general.architecture']}; only llama is converted")
    names = {tensor.name for tensor in reader.tensors}
    config = llama_config(fields, tied="output.weight" not in names)
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_tokenizer(fields, out)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = [
        Tensor(
            hugging_face_name(tensor.name),
            tuple(int(n) for n in reversed(tensor.shape)),
            partial(_values, tensor, heads.get(tensor.name.split(".")[-2])),
        )
        for tensor in reader.tensors
    ]
    safetensors_file.write(out / "model.safetensors", tensors, written)


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; ValueError for a tensor Llama lacks."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"
        case [part, "weight"] if part in _TOP_NAMES:
            return f"{_TOP_NAMES[part]}.weight"
        case _:
            raise ValueError(f"tensor {name} is not part of a Llama model")


def unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k: it interleaves the two halves that rotary embedding pairs."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def llama_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of transformers' LlamaForCausalLM from GGUF metadata."""
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": _short(fields["llama.rope.freq_base"])},
        "vocab_size": int(fields["llama.vocab_size"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
    }


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template from GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {'/'.join(kind)} is not converted; only gpt2/smollm is")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # llama.cpp's "smollm": every digit alone, then GPT-2's byte-level split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": int(fields["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
            **settings,
        },
    )
    (out / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _values(tensor: Any, heads: int | None) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return values if heads is None else unpermute(values, heads)


def _short(value: float) -> float:
    # GGUF keeps float32; its shortest decimal is the number the model's authors wrote.
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
