"""What `random:mistral?…` and `random:lora?…` ask for.

Validated without numpy: a configuration is checked on machines that have no engine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import prod
from urllib.parse import parse_qsl

FAMILY = "mistral"
# SmolLM2's, whose tokenizer it borrows.
VOCABULARY = 49152
# Of Mistral's own, version 3, which mistral-common brings.
OWN_VOCABULARY = 32768
LORA = "lora"
_MAX = {
    "hidden": 4096,
    "layers": 64,
    "heads": 64,
    "kv_heads": 64,
    "seed": 2**31 - 1,
    "rank": 256,
    "mistral_tokenizer": 1,
}


@dataclass(frozen=True)
class Options:
    """Shape and seed; the defaults split over two tensor-parallel workers."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    seed: int = 0
    # 1: Mistral's own tokenizer, which vLLM reads with `tokenizer_mode: mistral`, in place of the borrowed one.
    mistral_tokenizer: int = 0

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return OWN_VOCABULARY if self.mistral_tokenizer else VOCABULARY

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer: Mistral 7B's ratio, 3.5 times the hidden size."""
        return self.hidden * 7 // 2

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, in the order in which the seed fills them."""
        hidden, wide, keys = self.hidden, self.intermediate, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            **{f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in layer.items()},
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in bfloat16."""
        return sum(2 * prod(shape) for shape in self.shapes.values())

    @property
    def slug(self) -> str:
        """A directory name that tells all options."""
        own = "-m" if self.mistral_tokenizer else ""
        return f"{FAMILY}-h{self.hidden}-l{self.layers}-a{self.heads}-k{self.kv_heads}-s{self.seed}{own}"

    def to_json(self) -> str:
        """For the converter process."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class LoraOptions(Options):
    """An adapter for a random model of the same shape; `seed` is the adapter's own."""

    rank: int = 8

    @property
    def slug(self) -> str:
        """A directory name that tells all options."""
        return f"{LORA}-h{self.hidden}-l{self.layers}-a{self.heads}-k{self.kv_heads}-r{self.rank}-s{self.seed}"


def parse(rest: str) -> Options:
    """`mistral?hidden=256&layers=4…` into options; ValueError says what is allowed."""
    return Options(**_given(rest, FAMILY, Options))


def parse_lora(rest: str) -> LoraOptions:
    """`lora?rank=8&seed=1…` into options; ValueError says what is allowed."""
    return LoraOptions(**_given(rest, LORA, LoraOptions))


def _given(rest: str, kind: str, options: type[Options]) -> dict[str, int]:
    family, _, query = rest.partition("?")
    if family != kind:
        raise ValueError(f"random:{family} is not known; allowed: random:{kind}")
    names = tuple(field.name for field in fields(options))
    given: dict[str, int] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in names:
            raise ValueError(f"option {name!r} is not known; allowed: {', '.join(names)}")
        if name in given:
            raise ValueError(f"option {name!r} appears twice")
        low = 0 if name in {"seed", "mistral_tokenizer"} else 1
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= _MAX[name]):
            raise ValueError(f"option {name}={text!r} must be a whole number from {low} to {_MAX[name]}")
        given[name] = int(text)
    shape = options(**given)
    if shape.hidden % shape.heads or shape.head_dim % 2:
        raise ValueError(f"hidden ({shape.hidden}) must be an even multiple of heads ({shape.heads})")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"heads ({shape.heads}) must be a multiple of kv_heads ({shape.kv_heads})")
    return given
