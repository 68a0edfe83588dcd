"""Where LoRA adapters come from: a directory in PEFT's format, checked before an engine starts with it.

path:/dir                 a directory with adapter_config.json and adapter_model.safetensors
hf:org/name[@revision]    a model hub repository, through the hub's cache; offline where it is cached
random:lora[?…]           random weights for random:mistral of the same shape; for tests
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.engine.sources import converter, hub, random_options, store
from serving.engine.sources.facts import Progress, ProgressFn, silent
from serving.errors import SourceError

CONFIG_FILE = "adapter_config.json"
# Not the pickled .bin of old adapters: opening one may run code.
WEIGHTS_FILE = "adapter_model.safetensors"
RANDOM_VERSION = "1"
RANDOM_BYTES = 8 * 2**20


def prepare_adapter(
    source: str, cache: Path, progress: ProgressFn = silent, env: Mapping[str, str] = os.environ
) -> Path:
    """Make `source` ready and return its directory; safe to call from several processes. Raises SourceError."""
    scheme, _, rest = source.partition(":")
    match scheme:
        case "path":
            path = Path(rest).expanduser()
            if not path.is_dir():
                raise SourceError(f"{path} is no directory on this machine; every machine that runs it needs it there")
            return _complete(path.resolve(), str(path))
        case "hf":
            return _complete(hub.download(rest, cache, progress, env, ADAPTER), source)
        case "random":
            return _random(rest, cache, progress, env)
        case _:
            raise SourceError(
                f"{source!r} is no adapter source; allowed: path:DIRECTORY, hf:ORGANISATION/NAME[@REVISION]"
            )


def rank(path: Path) -> int:
    """The rank that adapter_config.json names; SourceError where it names none."""
    try:
        found: Any = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path / CONFIG_FILE} does not name a rank (`r`)") from error
    if not isinstance(found, int):
        raise SourceError(f"{path / CONFIG_FILE}: the rank (`r`) is no whole number")
    return found


def lacks(path: Path) -> str | None:
    """What `path` misses to be an adapter, in words; None where it is complete."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            return f"it has no {name}"
    return None


def wanted_files(names: Any, _: bool) -> list[str]:
    """The files of a repository that make the adapter."""
    return sorted({CONFIG_FILE, WEIGHTS_FILE} & set(names))


ADAPTER = hub.Content(CONFIG_FILE, lacks, wanted_files)


def _complete(path: Path, name: str) -> Path:
    if missing := lacks(path):
        raise SourceError(f"{name} is no complete adapter: {missing}")
    rank(path)
    return path


def _random(rest: str, cache: Path, progress: ProgressFn, env: Mapping[str, str]) -> Path:
    try:
        options = random_options.parse_lora(rest)
    except ValueError as error:
        raise SourceError(str(error)) from error
    target = cache / "random" / options.slug
    recipe = store.Recipe(f"random:{options.slug}", RANDOM_VERSION, "", RANDOM_BYTES)

    def builder(work: store.Workspace) -> None:
        converter.run(["lora", str(work.out), options.to_json()], work.lock_fd, progress, env)

    if not store.complete(target, recipe):
        store.build(target, recipe, builder, progress)
    return target


__all__ = ["ADAPTER", "Progress", "lacks", "prepare_adapter", "rank"]
