"""The presets against the installed vLLM: every name they hand over exists in its registries."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from serving.engine.presets import PRESETS, Preset, engine_args

vllm = pytest.importorskip("vllm")
# Its own torch version warns about torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_names_exist(preset: Preset) -> None:
    from vllm.config.model import TokenizerMode
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.transformers_utils.config import ConfigFormat

    if preset.tool_call_parser:
        assert preset.tool_call_parser in ToolParserManager.list_registered()
    if preset.reasoning_parser:
        assert preset.reasoning_parser in ReasoningParserManager.list_registered()
    if preset.tokenizer_mode:
        assert preset.tokenizer_mode in get_args(TokenizerMode)
    if preset.config_format:
        assert preset.config_format in get_args(ConfigFormat)
    if preset.architecture:
        assert preset.architecture in ModelRegistry.get_supported_archs()


def test_load_formats_exist() -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    for load_format in {p.load_format for p in PRESETS if p.load_format}:
        get_model_loader(LoadConfig(load_format=load_format))


def test_every_argument_is_one_of_vllms() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = {f.name for cls in (AsyncEngineArgs, FrontendArgs) for f in dataclasses.fields(cls)}
    assert {key for p in PRESETS for key in engine_args(p)} <= known


@pytest.mark.parametrize(
    ("params", "architecture"),
    [
        ({}, "MistralForCausalLM"),
        ({"vision_encoder": {"hidden_size": 1024}}, "PixtralForConditionalGeneration"),
        ({"model_type": "mamba"}, "Mamba2ForCausalLM"),
    ],
)
def test_mistral_format_gives_the_architectures_named(params: dict[str, object], architecture: str) -> None:
    from vllm.transformers_utils.configs.mistral import adapt_config_dict

    config = adapt_config_dict({"dim": 64, "n_layers": 2, "n_heads": 4, **params}, defaults={})
    assert config.architectures == [architecture]
