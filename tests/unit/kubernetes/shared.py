"""Data that is not part of the repository, where it lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[3]


def shared_file(name: str) -> Path | None:
    """A file of GALERNE_SHARED (../shared beside the repository); None where it is absent."""
    path = Path(os.environ.get("GALERNE_SHARED") or ROOT.parent / "shared") / name
    return path if path.exists() else None
