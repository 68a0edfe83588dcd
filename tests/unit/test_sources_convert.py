"""The converter: exact bits, exact names, and the same random weights every time."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.engine.sources import converter
from serving.engine.sources.facts import Progress, silent
from serving.engine.sources.gguf_llama import hugging_face_name, unpermute
from serving.engine.sources.random_mistral import make
from serving.engine.sources.random_options import VOCABULARY, Options
from serving.engine.sources.safetensors_file import Tensor, bfloat16, write
from serving.errors import SourceError

LOCK_FD = 2  # any open descriptor can be inherited


def read(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (0.0, 0x0000),
        (1.00390625, 0x3F80),  # half way: to even, down
        (1.01171875, 0x3F82),  # half way: to even, up
        (1.005, 0x3F81),
        (3.4e38, 0x7F80),  # beyond the largest bfloat16
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert bfloat16(np.array([value], dtype=np.float32))[0] == bits


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    values: NDArray[np.float32] = np.arange(6, dtype=np.float32).reshape(2, 3)
    seen: list[tuple[int, int]] = []
    tensors = [Tensor("a", (2, 3), lambda: values), Tensor("b", (2,), lambda: np.ones(2, np.float32))]
    write(tmp_path / "x", tensors, lambda done, total: seen.append((done, total)))
    header, data = read(tmp_path / "x")
    assert header["a"] == {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    assert header["b"] == {"dtype": "BF16", "shape": [2], "data_offsets": [12, 16]}
    assert data == bfloat16(values).tobytes() + b"\x80\x3f" * 2
    assert seen == [(12, 16), (16, 16)]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor a has shape \(2,\), \(3,\) expected"):
        write(tmp_path / "x", [Tensor("a", (3,), lambda: np.ones(2, np.float32))], lambda *_: None)


def test_names() -> None:
    assert hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hugging_face_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    for name in ("blk.1.attn_qkv.weight", "rope_freqs.weight", "blk.1.attn_q.bias", "x"):
        with pytest.raises(ValueError, match="not part of a Llama model"):
            hugging_face_name(name)


def test_unpermute_undoes_llama_cpps_order() -> None:
    heads, rows, columns = 3, 12, 5
    weights = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    # llama.cpp, convert_hf_to_gguf.py: LlamaModel.permute
    permuted = weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(weights.shape)
    assert not np.array_equal(permuted, weights)
    assert np.array_equal(unpermute(permuted, heads), weights)


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    path = tmp_path / "donor"
    path.mkdir()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, **ids}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (path / name).write_text(name)
    return path


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path, donor: Path) -> None:
    small = {"hidden": 8, "layers": 1, "heads": 2, "kv_heads": 1}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        make(donor, tmp_path / name, Options(**small, seed=seed), lambda *_: None)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architectures"], config["num_key_value_heads"]) == (["MistralForCausalLM"], 1)
    header, _ = read(tmp_path / "a" / "model.safetensors")
    assert header["lm_head.weight"]["shape"] == [VOCABULARY, 8]


def test_the_process_reports_and_writes(tmp_path: Path, donor: Path) -> None:
    (tmp_path / "out").mkdir()
    steps: list[Progress] = []
    options = Options(hidden=8, layers=1, heads=2, kv_heads=1).to_json()
    converter.run(["random", str(donor), str(tmp_path / "out"), options], LOCK_FD, steps.append, {})
    assert steps[-1].step == "write"
    assert steps[-1].done_bytes == steps[-1].total_bytes
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_failing_process_is_explained(tmp_path: Path, donor: Path) -> None:
    options = Options().to_json()
    with pytest.raises(FileNotFoundError):
        converter.run(["random", str(donor), str(tmp_path / "absent"), options], LOCK_FD, silent, {})
    (donor / "config.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(SourceError, match=r"could not be converted: .* has 3 tokens, 49152 expected"):
        converter.run(["random", str(donor), str(tmp_path), options], LOCK_FD, silent, {})
    with pytest.raises(SourceError, match=r"converting the model failed: .*serving.engine.sources.convert"):
        converter.run(["paint"], LOCK_FD, silent, {})


def test_the_converter_imports_no_torch() -> None:
    script = (
        "import sys\n"
        "import serving.engine.sources.convert, serving.engine.sources.gguf_llama\n"
        "import gguf, gguf.quants, tokenizers\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
