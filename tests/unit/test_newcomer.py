"""What a newcomer's machine lacks is said in one sentence each, and packages come from where the machine gets them.

Facts are made up here; that they are found on real machines is tests/image/test_newcomer.py's matter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup"


def program(name: str) -> ModuleType:
    """A program of setup/, which is no package: it runs before anything is installed."""
    spec = importlib.util.spec_from_file_location(f"setup_{name}", SETUP / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


preflight = program("preflight")
packages = program("packages")

GIB = 2**30
GOOD = preflight.Facts(
    system="Linux",
    machine="x86_64",
    glibc=(2, 36),
    python="/usr/bin/python3.11",
    other_pythons=(),
    has_uv=False,
    has_pip=True,
    installed=False,
    writable=True,
    free_bytes=20 * GIB,
    cache="/home/alice/.cache/uv",
    cache_free_bytes=None,
    models="/home/alice/.cache/galerne",
    models_free_bytes=20 * GIB,
    has_models=False,
    memory_bytes=16 * GIB,
    has_avx2=True,
    missing_libraries=(),
    has_compiler=True,
    has_lscpu=True,
    port=8000,
    port_taken=False,
)


@pytest.mark.parametrize("target", ["install", "run", "test"])
def test_nothing_is_said_of_a_machine_that_has_everything(target: str) -> None:
    assert preflight.findings(target, GOOD) == []


@pytest.mark.parametrize(
    ("target", "changed", "fatal", "said"),
    [
        ("run", {"machine": "aarch64"}, True, ["Linux on aarch64", "Linux on x86-64", "Python 3.11"]),
        ("run", {"system": "Darwin", "machine": "arm64"}, True, ["Darwin on arm64", "Linux on x86-64"]),
        ("run", {"glibc": (2, 28)}, True, ["glibc 2.28", "glibc 2.31"]),
        ("run", {"glibc": (0, 0)}, True, ["another C library than glibc"]),
        (
            "run",
            {"python": "", "other_pythons": ("3.13",)},
            False,
            ["has Python 3.13", "runs on Python 3.11", "uv fetches"],
        ),
        ("run", {"python": "", "other_pythons": ("3.12", "3.13")}, False, ["Python 3.12 and 3.13"]),
        ("install", {"has_pip": False}, True, ["apt-get install python3-venv", "put uv on the path"]),
        ("install", {"writable": False}, True, ["not writable"]),
        ("install", {"free_bytes": 3 * GIB}, True, ["3.0 GiB are free", "4.3 GiB are needed"]),
        ("test", {"free_bytes": 5 * GIB}, True, ["6.0 GiB are needed"]),
        ("install", {"cache_free_bytes": GIB}, True, ["1.0 GiB are free in /home/alice/.cache/uv", "UV_CACHE_DIR"]),
        ("run", {"models_free_bytes": GIB // 2}, True, ["/home/alice/.cache/galerne", "XDG_CACHE_HOME"]),
        ("run", {"missing_libraries": ("libnuma.so.1",)}, True, ["libnuma.so.1", "apt-get install libnuma1"]),
        ("run", {"has_lscpu": False}, True, ["lscpu", "apt-get install util-linux"]),
        ("run", {"has_compiler": False}, False, ["apt-get install g++"]),
        ("test", {"has_compiler": False}, True, ["apt-get install g++"]),
        ("run", {"has_avx2": False}, True, ["no AVX2", "--fake"]),
        ("run", {"port_taken": True}, True, ["port 8000 on 127.0.0.1 is taken", "make run PORT=8001"]),
        ("run", {"memory_bytes": 4 * GIB}, False, ["4.0 GiB of memory", "--fake"]),
    ],
)
def test_what_is_missing_is_one_sentence_that_says_what_to_do(
    target: str, changed: Mapping[str, object], fatal: bool, said: Sequence[str]
) -> None:
    (finding,) = preflight.findings(target, GOOD._replace(**changed))
    assert finding.fatal is fatal
    assert "\n" not in finding.text
    for part in said:
        assert part in finding.text


def test_what_a_target_does_not_need_is_not_asked_for() -> None:
    bare = GOOD._replace(missing_libraries=("libnuma.so.1",), has_compiler=False, port_taken=True, memory_bytes=GIB)
    assert preflight.findings("install", bare) == []
    # What is there already takes no room, and brings its own Python.
    there = GOOD._replace(
        installed=True, free_bytes=GIB // 4, cache_free_bytes=0, python="", has_uv=True, has_models=True
    )
    assert preflight.findings("run", there) == []


def test_a_machine_that_is_not_supported_hears_that_alone() -> None:
    nothing = GOOD._replace(machine="aarch64", python="", has_pip=False, free_bytes=0, port_taken=True)
    assert len(preflight.findings("run", nothing)) == 1


def test_everything_missing_is_said_at_once() -> None:
    bare = GOOD._replace(has_pip=False, free_bytes=0, missing_libraries=("libnuma.so.1",), port_taken=True)
    assert len(preflight.findings("run", bare)) == 4


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("listen: {host: 127.0.0.1, port: 8123}\n", 8123),
        ("demo_keys: true\nlisten:\n  host: 127.0.0.1\n  port: 8124\n", 8124),
        ("gateway: {metrics_port: 9400}\n", 8000),
        ("listen: {host: 127.0.0.1}\ngateway: {port: 1}\n", 8000),
    ],
)
def test_the_port_of_a_configuration_is_seen(tmp_path: Path, text: str, port: int) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert preflight.port_of(str(file)) == port
    assert preflight.port_of("demo") == 8000
    assert preflight.port_of(str(tmp_path / "none.yaml")) == 8000


# --- where packages come from -----------------------------------------------------------------------------------------

HASH = "sha256:" + "0" * 64
LOCK = f"""# a lock
numpy==2.0.0 \\
    --hash={HASH} \\
    --hash={HASH}
    # via torch
torch==2.13.0+cpu \\
    --hash={HASH}
    # via
    #   galerne (pyproject.toml)
triton==3.9.0 \\
    --hash={HASH}
"""
PIN = packages.pin_of(LOCK)


def test_the_one_package_with_a_build_of_its_own_is_found_in_every_lock() -> None:
    assert packages.Pin("torch", "2.13.0+cpu", f"torch==2.13.0+cpu \\\n    --hash={HASH}\n") == PIN
    for name in ("cpu", "image-cpu"):
        lock = (ROOT / "locks" / f"{name}.txt").read_text()
        pin = packages.pin_of(lock)
        assert pin is not None
        # Nothing else of the lock is looked for on that page.
        assert lock.count("+cpu") == 1
        assert pin.lines.count("--hash=sha256:") >= 1
        assert pin.lines in lock
    for name in ("gpu", "uv", "helm", "checkov", "image-tools"):
        assert packages.pin_of((ROOT / "locks" / f"{name}.txt").read_text()) is None


def env_of(
    environ: Mapping[str, str], settings: Mapping[str, str] = {}, *, uv_is_set_up: bool = False
) -> dict[str, str]:
    found: dict[str, str] = packages.environment(environ, settings, uv_is_set_up=uv_is_set_up)
    return found


def test_uvs_own_settings_count_and_pips_where_it_has_none() -> None:
    pips = {"find-links": "/a /b", "index-url": "https://mirror.example/simple", "cert": "/ca.pem", "timeout": "3"}
    assert env_of({}) == {}
    assert env_of({}, pips) == {
        "UV_FIND_LINKS": "/a,/b",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "SSL_CERT_FILE": "/ca.pem",
    }
    assert env_of({}, pips, uv_is_set_up=True) == {"UV_FIND_LINKS": "/a,/b"}
    mine = {"UV_FIND_LINKS": "/uv", "PIP_FIND_LINKS": "/pip", "UV_INDEX_URL": "u", "SSL_CERT_FILE": "/mine"}
    assert env_of(mine, pips) == mine
    assert env_of({"PIP_FIND_LINKS": "/pip /two"}, pips, uv_is_set_up=True)["UV_FIND_LINKS"] == "/pip,/two"
    assert env_of({**mine, "TORCH_FIND_LINKS": "/torch"}, uv_is_set_up=True)["UV_FIND_LINKS"] == "/torch"
    # An empty variable, as make exports it, is none.
    assert env_of({"TORCH_FIND_LINKS": "", "PIP_FIND_LINKS": "/pip"}) == {
        "PIP_FIND_LINKS": "/pip",
        "UV_FIND_LINKS": "/pip",
    }


def test_a_directory_with_blanks_in_its_name_is_one(tmp_path: Path) -> None:
    directory = tmp_path / "my wheels"
    directory.mkdir()
    assert env_of({"TORCH_FIND_LINKS": str(directory)})["UV_FIND_LINKS"] == str(directory)


def test_a_directory_of_wheels_takes_the_place_of_every_network(tmp_path: Path) -> None:
    found = env_of({"GALERNE_WHEELS": str(tmp_path), "PIP_INDEX_URL": "https://mirror.example/simple"})
    assert found["UV_FIND_LINKS"] == str(tmp_path)
    assert found["UV_OFFLINE"] == "1"


def test_settings_of_pip_are_read_as_pip_prints_them() -> None:
    listed = (
        "global.find-links='/opt/wheels'\nglobal.index-url='https://mirror.example/simple'\n"
        ":env:.cert='/ca.pem'\ndownload.index-url='https://other.example'\nnonsense\n"
    )
    assert packages.pip_settings(listed) == {
        "find-links": "/opt/wheels",
        "index-url": "https://mirror.example/simple",
        "cert": "/ca.pem",
    }


class Uv:
    """Notes what uv is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], str | None, str]] = []

    def __call__(self, command: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
        lock = Path(command[-1]).read_text()
        self.asked.append((list(command[1:3]), env.get("UV_TORCH_BACKEND"), lock))
        assert "--require-hashes" in command
        return 0, ""


def synced(tmp_path: Path, lock: str, env: Mapping[str, str]) -> list[tuple[list[str], str | None, str]]:
    uv, file = Uv(), tmp_path / "lock.txt"
    file.write_text(lock)
    assert packages.sync("uv", "sync", "python", file, [], env, uv) == (0, "")
    return uv.asked


def test_pytorch_comes_from_its_own_page_where_no_directory_has_it(tmp_path: Path) -> None:
    assert PIN is not None
    away = [(["pip", "install"], "cpu", PIN.lines), (["pip", "sync"], None, LOCK)]
    assert synced(tmp_path, LOCK, {}) == away
    # Named for something else.
    assert synced(tmp_path, LOCK, {"UV_FIND_LINKS": str(tmp_path)}) == away
    (tmp_path / PIN.wheel).touch()
    assert synced(tmp_path, LOCK, {"UV_FIND_LINKS": str(tmp_path)}) == away[1:]
    assert synced(tmp_path, LOCK, {"UV_FIND_LINKS": f"/nowhere,file://{tmp_path}"}) == away[1:]
    assert synced(tmp_path, LOCK, {"UV_FIND_LINKS": "https://wheels.example/cpu"}) == away[1:]
    assert synced(tmp_path, LOCK, {"GALERNE_WHEELS": str(tmp_path)}) == away[1:]
    # A lock without such a build asks for nothing of the kind.
    assert [backend for _, backend, _ in synced(tmp_path, f"a==1 \\\n    --hash={HASH}\n", {})] == [None]


@pytest.mark.parametrize(
    ("output", "environ", "said"),
    [
        ("Failed to fetch: https://x.example/whl/cpu/torch/\n dns error", {}, "TORCH_FIND_LINKS=/path/to/directory"),
        ("Because there is no version of torch==2.13.0+cpu and you require", {}, "TORCH_FIND_LINKS=/path/to/directory"),
        ("Request failed after 3 retries: Failed to fetch: https://x.example/simple/numpy/", {}, "UV_DEFAULT_INDEX"),
        (
            "Because numpy was not found in the package registry",
            {"GALERNE_WHEELS": "/w"},
            "/w does not hold everything",
        ),
        ("Hash mismatch for `torch==2.13.0+cpu`", {}, "not the file that was locked"),
        ("No space left on device (os error 28)", {}, "the disk is full"),
        ("invalid peer certificate: UnknownIssuer", {}, "SSL_CERT_FILE"),
        (
            "No interpreter found for Python 3.11 in managed installations or search path",
            {},
            "UV_PYTHON_INSTALL_MIRROR",
        ),
        ("error: unexpected argument", {}, ""),
    ],
)
def test_what_uv_prints_becomes_a_sentence(output: str, environ: Mapping[str, str], said: str) -> None:
    found = packages.explanation(output, PIN, environ)
    assert said in found
    assert bool(found) is bool(said)
    assert "\n" not in found


def test_the_file_to_fetch_is_named_whole() -> None:
    found = packages.explanation("Failed to fetch: https://x.example/whl/cpu/torch/", PIN, {})
    assert "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl" in found


@pytest.mark.parametrize("name", ["preflight", "packages"])
def test_they_run_on_an_old_python_with_nothing_installed(name: str) -> None:
    import ast

    source = (SETUP / f"{name}.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.partition(".")[0] for name in imported} <= {*sys.stdlib_module_names}
    # Annotations are not evaluated, so newer ones may stand there.
    assert "from __future__ import annotations" in source


def test_a_machine_without_python_hears_one_sentence(tmp_path: Path) -> None:
    for tool in ("sh", "env"):
        target = next(Path(p) / tool for p in os.environ["PATH"].split(":") if (Path(p) / tool).exists())
        (tmp_path / tool).symlink_to(target)
    done = subprocess.run(
        [SETUP / "python.sh", "x.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no Python on this machine" in done.stderr


@pytest.mark.parametrize(
    ("version", "taken"), [("uv 0.13.9 (x86_64)", True), ("uv 1.0.0", True), ("uv 0.4.30", False), ("nonsense", False)]
)
def test_an_old_uv_of_the_machine_is_not_used(tmp_path: Path, version: str, taken: bool) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f"#!/bin/sh\necho '{version}'\n")
    uv.chmod(0o755)
    done = subprocess.run(
        [SETUP / "uv.sh", "--which"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.stdout.strip() == (str(uv) if taken else ".tools/bin/uv")
