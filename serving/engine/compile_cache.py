"""Where vLLM keeps what it has compiled: on this node, for this user alone.

What lies there is loaded and run, so whoever can write to it runs code in an engine: it is shared with nobody, and it
is not below the cache of weights, which installations do share. An operator's VLLM_CACHE_ROOT stands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from serving.errors import EngineError

VARIABLE = "VLLM_CACHE_ROOT"
ROOT = Path("/var/tmp")  # noqa: S108 - what lies there belongs to this user alone: `directory` checks


def environment(env: Mapping[str, str], root: Path = ROOT) -> dict[str, str]:
    """The variable for an engine's process; raises EngineError where the directory is not ours alone."""
    if known := env.get(VARIABLE):
        return {VARIABLE: known}
    return {VARIABLE: str(directory(root))}


def directory(root: Path = ROOT) -> Path:
    """The directory, made where it is missing; survives a restart of the machine."""
    path = root / f"galerne-{os.getuid()}" / "vllm"
    for part in (path.parent, path):
        part.mkdir(mode=0o700, exist_ok=True)
        found = part.lstat()
        if found.st_uid != os.getuid() or part.is_symlink():
            raise EngineError(f"{part} belongs to another user; have it removed, or set {VARIABLE}")
        part.chmod(0o700)
    return path
