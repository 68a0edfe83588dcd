"""What no file of the repository may hold: where packages and images come from is the installer's to say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In parts, because this file is one of them.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("docker", "io"),
        ("ghcr", "io"),
        ("gcr", "io"),
        ("quay", "io"),
        ("nvcr", "io"),
        ("registry", "k8s", "io"),
        ("azurecr", "io"),
        ("npmjs", "org"),
        ("download", "pytorch", "org"),
        ("github", "io"),
    )
]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def test_no_file_names_a_registry() -> None:
    found = []
    for path in tracked():
        data = path.read_bytes() if path.is_file() else b""
        found += [f"{path.relative_to(ROOT)}: {name}" for name in REGISTRIES if name.encode() in data]
    assert not found
