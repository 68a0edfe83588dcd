"""The directory whose content an engine runs: ours alone, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serving.engine import compile_cache
from serving.engine.worker_times import EXTENSION, METHOD, WorkerTimes
from serving.errors import EngineError


def test_it_is_private_and_found_again(tmp_path: Path) -> None:
    found = compile_cache.environment({}, tmp_path)
    path = Path(found["VLLM_CACHE_ROOT"])
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o777)
    assert compile_cache.environment({}, tmp_path) == found
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_operators_word_stands(tmp_path: Path) -> None:
    assert compile_cache.environment({"VLLM_CACHE_ROOT": "/node/cache"}, tmp_path) == {"VLLM_CACHE_ROOT": "/node/cache"}
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_put_there_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"galerne-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(EngineError, match="another user"):
        compile_cache.directory(tmp_path)


def test_the_workers_method_is_what_is_called() -> None:
    assert f"{WorkerTimes.__module__}.{WorkerTimes.__name__}" == EXTENSION
    assert callable(getattr(WorkerTimes, METHOD))
