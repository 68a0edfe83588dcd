"""A peer's own environment: made once, with its dependencies resolved there, never in the product's.

PyTorch's builds for processors, which are on no default index, are looked for where UV_FIND_LINKS or PIP_FIND_LINKS
says, else on PyTorch's own page, which uv knows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtest.errors import LoadtestError
from loadtest.peers.peer import Peer

CACHE_VARIABLE = "XDG_CACHE_HOME"
_TIMEOUT_S = 900
_SHOWN_LINES = 8
# uv's list has commas, pip's has blanks.
_UV_LINKS, _PIP_LINKS = "UV_FIND_LINKS", "PIP_FIND_LINKS"
# What such a build's version ends with, and uv's switch for the page that has it. The switch moves other packages to
# that page as well, so it is on for these builds alone, which come first.
_OWN_BUILD, _OWN_PAGE = "+cpu", {"UV_TORCH_BACKEND": "cpu"}
# Written last: an environment without it was cut off half way.
_COMPLETE = ".complete"
_OWN_UV = Path(__file__).resolve().parents[2] / ".tools" / "bin" / "uv"


def cache() -> Path:
    """Where environments of peers are kept."""
    home = os.environ.get(CACHE_VARIABLE)
    return (Path(home) if home else Path.home() / ".cache") / "galerne" / "peers"


def installed(peer: Peer, folder: Path) -> Path:
    """The peer's folder of programs, installed first where it is not. Raises LoadtestError with pip's own words."""
    wanted = peer.environment
    home = wanted.home(folder)
    programs = home / "bin"
    if (home / _COMPLETE).exists():
        return programs
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    uv = str(_OWN_UV) if _OWN_UV.exists() else shutil.which("uv")
    if uv is None:
        raise LoadtestError(f"{peer.name}: uv is not installed here; run `make install` first")
    _run(peer, [uv, "venv", "--quiet", "--python", sys.executable, str(home)])
    install = [uv, "pip", "install", "--quiet", "--python", str(programs / "python")]
    if wanted.overrides:
        overrides = home / "overrides.txt"
        overrides.write_text("\n".join(wanted.overrides) + "\n", encoding="utf-8")
        install += ["--override", str(overrides)]
    for requirements, more in steps(wanted.requirements, os.environ):
        _run(peer, [*install, *requirements], more)
    (home / _COMPLETE).touch()
    return programs


def steps(requirements: Sequence[str], environ: Mapping[str, str]) -> list[tuple[Sequence[str], Mapping[str, str]]]:
    """What is installed one after the other, each with more variables for uv."""
    builds = [requirement for requirement in requirements if requirement.endswith(_OWN_BUILD)]
    if not builds or _UV_LINKS in environment(environ):
        return [(requirements, {})]
    return [(builds, _OWN_PAGE), (requirements, {})]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """uv's: it does not know pip's variable."""
    links = environ.get(_UV_LINKS) or ",".join(environ.get(_PIP_LINKS, "").split())
    return {**environ, **({_UV_LINKS: links} if links else {})}


def _run(peer: Peer, command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
    try:
        # A fixed program with a catalogue's words.
        ended = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=environment(os.environ) | dict(more or {}),
        )
    except subprocess.TimeoutExpired:
        raise LoadtestError(f"{peer.name}: not installed after {_TIMEOUT_S} s") from None
    if ended.returncode:
        said = "\n".join(ended.stderr.strip().splitlines()[-_SHOWN_LINES:])
        raise LoadtestError(f"{peer.name} {peer.version} cannot be installed:\n{said}")
