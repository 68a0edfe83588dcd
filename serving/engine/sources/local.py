"""Checks that a directory holds a model, before an engine spends minutes on finding out."""

from __future__ import annotations

import json
from pathlib import Path

from serving.errors import SourceError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
INDEX_FILES = (
    "model.safetensors.index.json",
    "consolidated.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# Mistral's own format has params.json in config.json's place.
CONFIG_FILES = ("config.json", "params.json")
# PyTorch .bin files that are no weights.
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin"}


def checked(rest: str) -> Path:
    """The absolute directory of `path:rest`; SourceError says what is missing."""
    path = Path(rest).expanduser()
    if not path.exists():
        raise SourceError(f"{path} does not exist on this machine; every machine that runs the model needs it there")
    if not path.is_dir():
        raise SourceError(f"{path} is a file; path: needs the directory with config.json and the weights")
    try:
        missing = lacks(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
    if missing:
        raise SourceError(f"{path} is not a complete model: {missing}")
    return path.resolve()


def found(rest: str) -> Path | None:
    """The directory of `path:rest` where it is complete."""
    try:
        return checked(rest)
    except SourceError:
        return None


def lacks(path: Path) -> str | None:
    """What `path` misses to be a model, in words; None where it is complete."""
    names = {file.name for file in path.iterdir() if file.is_file()}
    if not names & set(CONFIG_FILES):
        return f"it has no {' or '.join(CONFIG_FILES)}"
    if not any(name.endswith(WEIGHT_SUFFIXES) and name not in _NOT_WEIGHTS for name in names):
        return f"it has no weights ({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})"
    if "config.json" in names and not _is_json_object(path / "config.json"):
        return "its config.json is not a JSON object"
    for index in names & set(INDEX_FILES):
        if absent := sorted(_shards(path / index) - names):
            return f"its {index} names files that are not there: {', '.join(absent)}"
    return None


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def _shards(index: Path) -> set[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return set(content["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return {f"(unreadable {index.name})"}
