"""Building into the cache: whole or not at all, once, and with words for what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from serving.engine.sources import store
from serving.engine.sources.facts import Progress, silent
from serving.engine.sources.store import MANIFEST, Recipe, Workspace, build, complete
from serving.errors import SourceError

RECIPE = Recipe("pypi:x", "1.0", "ab" * 32, needs_bytes=1)


class Builder:
    """Writes one file and counts how often it is asked."""

    def __init__(self, content: str = "weights") -> None:
        self.calls = 0
        self.content = content

    def __call__(self, work: Workspace) -> None:
        self.calls += 1
        (work.scratch / "wheel").write_text("not part of the result")
        (work.out / "model.safetensors").write_text(self.content)


def names(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def test_a_build_is_whole_and_done_once(tmp_path: Path) -> None:
    target, builder = tmp_path / "cache" / "x-1.0", Builder()
    for _ in range(2):
        build(target, RECIPE, builder, silent)
    assert builder.calls == 1
    assert names(target) == {"model.safetensors", MANIFEST}
    assert names(target.parent) == {"x-1.0", ".x-1.0.lock"}
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["source"] == "pypi:x"
    assert manifest["files"] == {"model.safetensors": 7}


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: (t / MANIFEST).unlink(),
        lambda t: (t / MANIFEST).write_text("{"),
        lambda t: (t / MANIFEST).write_text("[]"),
        lambda t: (t / "model.safetensors").write_text("weigh"),
        lambda t: (t / "model.safetensors").unlink(),
    ],
)
def test_a_damaged_directory_is_built_anew(tmp_path: Path, damage: object) -> None:
    target, builder = tmp_path / "x", Builder()
    build(target, RECIPE, builder, silent)
    damage(target)  # type: ignore[operator]
    assert not complete(target, RECIPE)
    build(target, RECIPE, builder, silent)
    assert builder.calls == 2
    assert complete(target, RECIPE)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("pypi:y", "1.0", RECIPE.sha256, 1),
        Recipe("pypi:x", "1.1", RECIPE.sha256, 1),
        Recipe("pypi:x", "1.0", "cd" * 32, 1),
    ],
)
def test_another_recipe_is_another_build(tmp_path: Path, recipe: Recipe) -> None:
    build(tmp_path / "x", RECIPE, Builder(), silent)
    assert not complete(tmp_path / "x", recipe)
    build(tmp_path / "x", recipe, Builder(), silent)
    assert complete(tmp_path / "x", recipe)


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fails(work: Workspace) -> None:
        (work.out / "half").write_text("half")
        raise SourceError("no such wheel")

    with pytest.raises(SourceError, match="no such wheel"):
        build(tmp_path / "x", RECIPE, fails, silent)
    assert names(tmp_path) == {".x.lock"}


def test_leftovers_of_a_dead_process_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".x.tmp-999999" / "out"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    other = tmp_path / ".y.tmp-999999"
    other.mkdir()
    build(tmp_path / "x", RECIPE, Builder(), silent)
    assert names(tmp_path) == {"x", ".x.lock", other.name}


def test_a_second_builder_waits_and_uses_the_result(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()
    waits: list[Progress] = []
    second = Builder()

    def slow(work: Workspace) -> None:
        started.set()
        assert go.wait(10)
        Builder()(work)

    def waiting(step: Progress) -> None:
        waits.append(step)
        go.set()  # only now may the first one finish

    first = threading.Thread(target=build, args=(tmp_path / "x", RECIPE, slow, silent))
    first.start()
    assert started.wait(10)
    build(tmp_path / "x", RECIPE, second, waiting)
    first.join(10)
    assert [w.step for w in waits] == ["wait for another process"]
    assert second.calls == 0
    assert complete(tmp_path / "x", RECIPE)


def test_the_lock_outlives_a_killed_builder_while_its_subprocess_writes(tmp_path: Path) -> None:
    target = tmp_path / "x"
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # the builder, which starts a writer and is killed

        def orphaning(work: Workspace) -> None:
            if os.fork() == 0:
                time.sleep(0.3)
                os._exit(0)
            os.write(write_end, b"x")
            os._exit(9)

        build(target, RECIPE, orphaning, silent)
        os._exit(0)
    os.read(read_end, 1)
    os.waitpid(child, 0)
    steps: list[Progress] = []
    build(target, RECIPE, Builder(), steps.append)
    assert [s.step for s in steps] == ["wait for another process"]
    assert complete(target, RECIPE)
    assert not list(tmp_path.glob(".x.tmp-*"))


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    builder = Builder()
    with pytest.raises(SourceError, match=r"disk under .* is full: about \d+ MiB are needed.*GALERNE_CACHE"):
        build(tmp_path / "x", Recipe("pypi:x", "1", "", 1 << 62), builder, silent)
    assert builder.calls == 0


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    def fills(work: Workspace) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(SourceError, match="is full"):
        build(tmp_path / "x", RECIPE, fills, silent)
    assert names(tmp_path) == {".x.lock"}


def test_a_cache_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"cannot write to .*/file.*point GALERNE_CACHE to a directory"):
        build(tmp_path / "file" / "x", RECIPE, Builder(), silent)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_permission_names_the_place(code: int) -> None:
    error = store.unwritable(OSError(code, "no", "/cache/x"), Path("/cache"), 0)
    assert "cannot write to /cache/x" in str(error)
