"""Builds a directory in the cache once, whole or not at all, whoever else builds it at the same time.

A build runs in a directory beside its target and is renamed into place, with a manifest written last. A lock
file per target lets one process build while others wait and then use the result. The lock belongs to the
open file, which converting subprocesses inherit: a builder that was killed leaves no second writer behind,
and whatever temporary directory the next holder of the lock finds is a dead process's and is removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import __version__
from serving.engine.sources.facts import CACHE_VARIABLE, Progress, ProgressFn
from serving.errors import SourceError

MANIFEST = "galerne-source.json"
# Raised when what a preparation writes changes: older directories are then built anew.
FORMAT = 1

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Recipe:
    """What identifies a build: the same recipe gives the same files."""

    source: str
    version: str
    sha256: str
    # Free space asked for before anything is written, bytes.
    needs_bytes: int


@dataclass(frozen=True)
class Workspace:
    """What a builder gets: where to write, and the lock that its subprocesses must inherit."""

    out: Path
    scratch: Path
    lock_fd: int


def complete(target: Path, recipe: Recipe) -> bool:
    """Whether `target` holds what `recipe` gives: the manifest agrees and every file has its size."""
    manifest = _read_manifest(target)
    if manifest is None:
        return False
    wanted = {"source": recipe.source, "version": recipe.version, "sha256": recipe.sha256, "format": FORMAT}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return False
    files = manifest.get("files")
    return isinstance(files, dict) and files == _sizes(target)


def build(target: Path, recipe: Recipe, builder: Callable[[Workspace], None], progress: ProgressFn) -> None:
    """Fill `target` by `builder` unless it is complete; SourceError where the cache cannot be written."""
    if complete(target, recipe):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, progress) as lock_fd:
            if complete(target, recipe):
                return
            _remove_leftovers(target)
            require_space(target.parent, recipe.needs_bytes)
            _build_locked(target, recipe, builder, lock_fd)
    except OSError as error:
        raise unwritable(error, target.parent, recipe.needs_bytes) from error


def unwritable(error: OSError, directory: Path, needs_bytes: int) -> SourceError:
    """What went wrong on the disk and what to do about it."""
    place = error.filename or directory
    if error.errno in _FULL:
        return SourceError(
            f"the disk under {directory} is full: about {needs_bytes / 2**20:.0f} MiB are needed; free some "
            f"space or point {CACHE_VARIABLE} to another disk"
        )
    if error.errno in _REFUSED:
        return SourceError(
            f"cannot write to {place} ({os.strerror(error.errno or 0)}): change its permissions or point "
            f"{CACHE_VARIABLE} to a directory that this user may write"
        )
    return SourceError(f"preparing a model in {directory} failed: {error}")


def require_space(directory: Path, needs_bytes: int) -> None:
    """OSError (no space left) where `directory` has less than `needs_bytes` free."""
    if shutil.disk_usage(directory).free < needs_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def bytes_below(path: Path) -> int:
    """Bytes of all files below `path` while others write there; 0 where it does not exist."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += (Path(directory) / name).stat().st_size
    return total


def _build_locked(target: Path, recipe: Recipe, builder: Callable[[Workspace], None], lock_fd: int) -> None:
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    out, scratch = temporary / "out", temporary / "scratch"
    try:
        out.mkdir(parents=True)
        scratch.mkdir()
        builder(Workspace(out, scratch, lock_fd))
        manifest = {
            "source": recipe.source,
            "version": recipe.version,
            "sha256": recipe.sha256,
            "format": FORMAT,
            "galerne": __version__,
            "files": _sizes(out),
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        out.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(target: Path, progress: ProgressFn) -> Iterator[int]:
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Progress("wait for another process", 0, None))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sizes(path: Path) -> dict[str, int]:
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def _read_manifest(target: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
