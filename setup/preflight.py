"""What this machine lacks for a target of the Makefile, said in one sentence each before anything is fetched.

    setup/python.sh setup/preflight.py install|run|test [CONFIG [PORT]]

It runs on any Python from 3.8 on and imports the standard library alone, because it runs before there is anything else.
What it looks at is `Facts`; what it says of them is `findings`, which looks at nothing. It takes a tenth of a second
and asks no network. Status 1 where something is missing that nothing further can do without.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = "Linux on x86-64 with glibc 2.31 or newer (Debian 11, Ubuntu 20.04, RHEL 9 or newer) and Python 3.11"
PYTHON = "3.11"
# The oldest one that a package of the lock is built for.
LEAST_GLIBC = (2, 31)
GIB = 2**30
# .venv and .tools as they are after `make install`, and some room for an archive that is being unpacked.
INSTALL_BYTES = int(4.3 * GIB)
# What `make test` brings beside them: helm, kubectl, checkov, its environment of the image.
TEST_BYTES = 6 * GIB
# Both demo models, with what their conversion takes at its peak.
MODELS_BYTES = 1 * GIB
# The demo: two engines, Ray, a gateway.
RUN_MEMORY_BYTES = int(5.5 * GIB)
DEFAULT_PORT = 8000
# The engine's build for processors is linked with it.
LIBRARIES = {"libnuma.so.1": "libnuma1"}
# PyTorch compiles for processors while a model starts, unless the model is eager; tests start such models.
COMPILER = "g++"
# vLLM asks it which processors there are.
PROCESSORS = "lscpu"


class Facts(NamedTuple):
    """What was found."""

    system: str
    machine: str
    # (0, 0): another C library.
    glibc: tuple[int, ...]
    # A Python 3.11 that runs, "" for none, and the versions of others.
    python: str
    other_pythons: tuple[str, ...]
    # uv is there already, or the Python that runs this can install it (it has pip, or venv with pip).
    has_uv: bool
    has_pip: bool
    # .venv is complete.
    installed: bool
    writable: bool
    # Free where .venv lies; where uv keeps what it fetched (None: the same disk); where models are kept.
    free_bytes: int
    cache: str
    cache_free_bytes: int | None
    models: str
    models_free_bytes: int
    has_models: bool
    memory_bytes: int
    # The processor's instructions that the engine's build for processors is made of.
    has_avx2: bool
    missing_libraries: tuple[str, ...]
    has_compiler: bool
    has_lscpu: bool
    port: int
    port_taken: bool


class Finding(NamedTuple):
    """One sentence; `fatal` where the target cannot succeed."""

    text: str
    fatal: bool


def findings(target: str, facts: Facts) -> list[Finding]:
    """What to say about these facts before this target, most basic first."""
    found = list(_platform(facts))
    if found:
        # Of a machine that cannot run it the rest is noise.
        return found
    found += _python(facts)
    if not facts.writable:
        found.append(Finding(f"{ROOT} is not writable for this user: use a checkout of your own.", fatal=True))
    found += _disk(target, facts)
    found += _parts(target, facts)
    if target in {"run", "test"} and not facts.has_avx2:
        found.append(
            Finding(
                "this processor has no AVX2, which vLLM's build for processors needs, so no engine starts here: use "
                "another machine, or `make install` and `.venv/bin/galerne serve --fake`, which simulates engines.",
                fatal=True,
            )
        )
    if target == "run" and facts.port_taken:
        found.append(
            Finding(
                f"port {facts.port} on 127.0.0.1 is taken: stop what listens there, or choose another with "
                f"`make run PORT={facts.port + 1}`.",
                fatal=True,
            )
        )
    if target in {"run", "test"} and facts.memory_bytes < RUN_MEMORY_BYTES:
        found.append(
            Finding(
                f"this machine has {_gib(facts.memory_bytes)} of memory and the demo takes about 6 GiB: engines may be "
                "ended by the kernel. `.venv/bin/galerne serve --fake` serves simulated engines in 2 GiB.",
                fatal=False,
            )
        )
    return found


def _platform(facts: Facts) -> list[Finding]:
    if facts.system != "Linux" or facts.machine not in {"x86_64", "amd64"}:
        here = f"{facts.system} on {facts.machine}"
        return [Finding(f"this is {here}; supported is {SUPPORTED}. Use a machine or a container that is.", fatal=True)]
    if facts.glibc < LEAST_GLIBC:
        here = "another C library than glibc" if facts.glibc == (0, 0) else f"glibc {'.'.join(map(str, facts.glibc))}"
        return [Finding(f"this system has {here}; supported is {SUPPORTED}.", fatal=True)]
    return []


def _python(facts: Facts) -> list[Finding]:
    found = []
    if not facts.python and not facts.installed:
        others = f"Python {' and '.join(facts.other_pythons)}" if facts.other_pythons else "no Python"
        found.append(
            Finding(
                f"this machine has {others}; Galerne runs on Python {PYTHON}, which its locked packages are built for. "
                f"uv fetches a Python {PYTHON} of its own for it; nothing else on this machine changes.",
                fatal=False,
            )
        )
    if not facts.has_uv and not facts.has_pip:
        found.append(
            Finding(
                "uv, which installs the packages, is not here, and this Python has neither pip nor ensurepip to "
                "install it with: apt-get install python3-venv (Debian, Ubuntu), or put uv on the path.",
                fatal=True,
            )
        )
    return found


def _disk(target: str, facts: Facts) -> list[Finding]:
    found = []
    need_bytes = 0 if facts.installed else INSTALL_BYTES
    if target == "test":
        need_bytes += TEST_BYTES - INSTALL_BYTES
    own_cache = facts.cache_free_bytes is not None
    for where, free_bytes, needed_bytes in (
        (str(ROOT), facts.free_bytes, need_bytes),
        (f"{facts.cache} (where uv keeps packages; UV_CACHE_DIR moves it)", facts.cache_free_bytes or 0, need_bytes),
    )[: 2 if own_cache else 1]:
        if free_bytes < needed_bytes:
            found.append(
                Finding(f"{_gib(free_bytes)} are free in {where}, and {_gib(needed_bytes)} are needed.", fatal=True)
            )
    if target in {"run", "test"} and not facts.has_models and facts.models_free_bytes < MODELS_BYTES:
        found.append(
            Finding(
                f"{_gib(facts.models_free_bytes)} are free in {facts.models} (where models are kept; XDG_CACHE_HOME "
                f"moves it), and the demo's two models take {_gib(MODELS_BYTES)}.",
                fatal=True,
            )
        )
    return found


def _parts(target: str, facts: Facts) -> list[Finding]:
    # What is missing and the package that has it. Without the first ones no engine starts; without a compiler only
    # eager ones do, and the demo's are.
    missing = {name: LIBRARIES[name] for name in facts.missing_libraries}
    if not facts.has_lscpu:
        missing[PROCESSORS] = "util-linux"
    fatal = bool(missing) or target == "test"
    if not facts.has_compiler:
        missing[COMPILER] = COMPILER
    if not missing or target == "install":
        return []
    return [
        Finding(
            f"not installed: {', '.join(missing)}. Engines need it: apt-get install {' '.join(missing.values())} "
            "(Debian, Ubuntu).",
            fatal=fatal,
        )
    ]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


def facts_of(config: str, wanted_port: str, environ: dict[str, str]) -> Facts:
    """Look at this machine; `wanted_port` is in place of the configuration's, unless it is empty."""
    home = Path(environ.get("HOME") or "~").expanduser()
    caches = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    uv_cache = Path(environ.get("UV_CACHE_DIR") or caches / "uv")
    models = caches / "galerne"
    same = _existing(uv_cache).stat().st_dev == ROOT.stat().st_dev
    installed = _installed()
    # What is there already need not be looked for.
    python, others = (PYTHON, ()) if installed else pythons(environ, home)
    has_uv = shutil.which("uv") is not None or (ROOT / ".tools" / "bin" / "uv").exists()
    port = int(wanted_port) if wanted_port.isdigit() else port_of(config)
    return Facts(
        system=platform.system(),
        machine=platform.machine().lower(),
        glibc=_glibc(),
        python=python,
        other_pythons=others,
        has_uv=has_uv,
        has_pip=has_uv or _imports("ensurepip, venv") or _imports("pip"),
        installed=installed,
        writable=os.access(str(ROOT), os.W_OK),
        free_bytes=shutil.disk_usage(str(ROOT)).free,
        cache=str(uv_cache),
        cache_free_bytes=None if same else shutil.disk_usage(str(_existing(uv_cache))).free,
        models=str(models),
        models_free_bytes=shutil.disk_usage(str(_existing(models))).free,
        has_models=(models / "models").is_dir(),
        memory_bytes=_memory_bytes(),
        has_avx2=_has_avx2(),
        missing_libraries=tuple(name for name in LIBRARIES if not _loads(name)),
        has_compiler=shutil.which(COMPILER) is not None,
        has_lscpu=shutil.which(PROCESSORS) is not None,
        port=port,
        port_taken=_taken(port),
    )


def pythons(environ: dict[str, str], home: Path) -> tuple[str, tuple[str, ...]]:
    """A Python 3.11 that runs ("" for none), and the versions of the other ones on the path."""
    versions: dict[str, str] = {}
    for name in ("python3.11", "python3", "python", "python3.10", "python3.12", "python3.13", "python3.14"):
        path = shutil.which(name, path=environ.get("PATH"))
        if path is not None and (version := _version(path)):
            versions.setdefault(version, path)
    if PYTHON not in versions:
        # Where pyenv and uv keep theirs.
        kept = [*home.glob(".pyenv/versions/3.11*/bin/python3.11")]
        kept += home.glob(".local/share/uv/python/cpython-3.11*/bin/python3.11")
        for path in map(str, kept):
            if _version(path) == PYTHON:
                versions[PYTHON] = path
    return versions.get(PYTHON, ""), tuple(sorted(set(versions) - {PYTHON}))


def port_of(config: str) -> int:
    """The port that a configuration listens on, as far as can be seen without a parser of YAML."""
    bundled = ROOT / "deployments" / "config" / f"{config}.yaml"
    file = bundled if bundled.is_file() else Path(config)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return DEFAULT_PORT
    found = re.search(r"(?ms)^listen:(?:\s*\{[^}]*?|(?:\s+\w+:[^\n]*\n)*?\s+)\bport:\s*(\d+)", text)
    return int(found.group(1)) if found else DEFAULT_PORT


def _version(python: str) -> str:
    try:
        said = subprocess.run(  # noqa: S603  # an interpreter from the path
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.decode().strip() if said.returncode == 0 else ""


def _installed() -> bool:
    done, lock = ROOT / ".venv" / ".installed", ROOT / "locks" / "cpu.txt"
    return done.exists() and done.stat().st_mtime >= lock.stat().st_mtime


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _glibc() -> tuple[int, ...]:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        return (0, 0)
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) if name == "glibc" else (0, 0)


def _imports(module: str) -> bool:
    # In a process of its own: Debian's ensurepip is there and says so only when it is imported.
    return (
        subprocess.run(  # noqa: S603  # this interpreter
            [sys.executable, "-c", f"import {module}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
        == 0
    )


def _has_avx2() -> bool:
    try:
        return re.search(r"(?m)^flags\b.*\bavx2\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")) is not None
    except OSError:
        return True


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _memory_bytes() -> int:
    try:
        total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return sys.maxsize
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total_bytes = min(total_bytes, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total_bytes


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def main(arguments: list[str]) -> int:
    """Print what was found; 1 where something of it is fatal."""
    target, config, port = [*arguments, *("install", "demo", "")[len(arguments) :]]
    found = findings(target, facts_of(config, port, dict(os.environ)))
    for finding in found:
        print(f"galerne: {finding.text}", file=sys.stderr)
    return 1 if any(finding.fatal for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
