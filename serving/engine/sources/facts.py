"""Facts about a model on disk that other layers are handed.

Nothing here reads a network or imports a model library: the gateway's machines may import it freely.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "GALERNE_CACHE"

# The path of a model that has no files (fake:NAME): the empty path, equal to `Path()`.
NO_FILES = Path()


@dataclass(frozen=True)
class Progress:
    """How far one step of a preparation is; `total_bytes` is None where it is not known."""

    step: str
    done_bytes: int
    total_bytes: int | None


ProgressFn = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A listener that shows nothing."""


@dataclass(frozen=True)
class PreparedModel:
    """A model that an engine can open: a directory with config.json, weights and tokenizer.

    `architecture` is the first of config.json's `architectures`; None where there is none (fake:NAME, a bare
    GGUF file, Mistral's own format).
    """

    source: str
    path: Path
    architecture: str | None
    size_bytes: int


def cache_root(env: Mapping[str, str]) -> Path:
    """Where prepared models are kept: GALERNE_CACHE, else XDG_CACHE_HOME/galerne, else ~/.cache/galerne."""
    if own := env.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    if xdg := env.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "galerne"
    return Path("~/.cache/galerne").expanduser()


def describe(source: str, path: Path) -> PreparedModel:
    """The facts of a complete model directory; links are followed, as a hub cache is made of them."""
    return PreparedModel(source, path, architecture(path), size_bytes(path))


def architecture(path: Path) -> str | None:
    """The model class that config.json names, None where it names none."""
    config = path / "config.json"
    if not config.is_file():
        return None
    content: Any = json.loads(config.read_text(encoding="utf-8"))
    names = content.get("architectures") if isinstance(content, dict) else None
    return str(names[0]) if isinstance(names, list) and names else None


def size_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
