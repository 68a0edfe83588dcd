"""Locked packages, installed by uv from wherever this machine gets packages, with a sentence where that fails.

    setup/python.sh setup/packages.py [--uv UV] venv DIRECTORY
    setup/python.sh setup/packages.py [--uv UV] sync PYTHON LOCK [OPTION…]       exactly the lock's packages
    setup/python.sh setup/packages.py [--uv UV] add PYTHON LOCK [OPTION…]        the lock's packages besides others
    setup/python.sh setup/packages.py [--uv UV] compile [ARGUMENT…]              a lock, from pyproject.toml
    setup/python.sh setup/packages.py exec COMMAND [ARGUMENT…]                   a command that has uv fetch something

Hashes are enforced wherever a package comes from. Where it comes from is not decided here: uv's settings count, where
it has none those of pip count, and no address is written down in any file. The one package that no default index has,
PyTorch's build for processors, comes from a directory or page that was named (TORCH_FIND_LINKS, UV_FIND_LINKS,
PIP_FIND_LINKS, or find-links in pip's settings), else from PyTorch's own page, which uv knows (`UV_TORCH_BACKEND=cpu`).
That switch moves other packages of the lock to that page as well (triton), which need not be there: so the one package
is installed by itself with it, and the rest without it.

It runs on any Python from 3.8 on and imports the standard library alone.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

# The build in the lock is for this Python and C library: what a wheel's name ends with.
WHEEL_TAGS = "cp311-cp311-manylinux_2_28_x86_64"
BACKEND = "UV_TORCH_BACKEND"
# Everything from this directory, and nothing from a network.
WHEELS = "GALERNE_WHEELS"
SHOWN_LINES = 12


class Pin(NamedTuple):
    """A package of a lock that no default index has: a build of its own, told by its local version."""

    name: str
    version: str
    # The lock's lines, hashes included.
    lines: str

    @property
    def wheel(self) -> str:
        """The file's name."""
        return f"{self.name}-{self.version}-{WHEEL_TAGS}.whl"


def pin_of(lock: str) -> Pin | None:
    """The package with a local version (`+cpu`) in a lock's text; None where it has none."""
    found = re.search(r"(?m)^(?P<name>[a-z0-9-]+)==(?P<version>[^\s;\\]+\+[^\s;\\]+)[^\n]*(?:\n +--hash=[^\n]*)+", lock)
    if found is None:
        return None
    return Pin(found.group("name"), found.group("version"), found.group(0).rstrip("\\ ") + "\n")


def pip_settings(listed: str) -> dict[str, str]:
    """What `pip config list` printed, by name; what is for one of pip's commands alone counts where it is `install`."""
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section not in {"global", "install", ":env:"}:
            continue
        try:
            found[name] = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            continue
    return found


def links_of(environ: Mapping[str, str], settings: Mapping[str, str]) -> list[str]:
    """Directories and pages of wheels that were named: the most particular setting counts."""
    for value in (
        environ.get("TORCH_FIND_LINKS"),
        environ.get("UV_FIND_LINKS"),
        environ.get("PIP_FIND_LINKS"),
        settings.get("find-links"),
    ):
        if value and value.strip():
            # uv's list has commas, pip's has blanks; a directory may have blanks in its name.
            if Path(value).expanduser().is_dir():
                return [str(Path(value).expanduser())]
            return [
                str(Path(part).expanduser()) if part[0] == "~" else part for part in re.split(r"[\s,]+", value.strip())
            ]
    return []


def environment(environ: Mapping[str, str], settings: Mapping[str, str], *, uv_is_set_up: bool) -> dict[str, str]:
    """uv's environment: its own settings first, pip's where it has none. `uv_is_set_up`: it has a settings file."""
    env = {name: value for name, value in environ.items() if name not in {BACKEND, "VIRTUAL_ENV", "TORCH_FIND_LINKS"}}
    if environ.get(WHEELS):
        directory = str(Path(environ[WHEELS]).expanduser().resolve())
        return {**env, "UV_FIND_LINKS": directory, "UV_OFFLINE": "1"}
    links = links_of(environ, settings)
    env["UV_FIND_LINKS"] = ",".join(links)
    if not links:
        del env["UV_FIND_LINKS"]
    if not uv_is_set_up:
        for ours, pips, option in (
            (("UV_DEFAULT_INDEX", "UV_INDEX_URL"), "PIP_INDEX_URL", "index-url"),
            (("SSL_CERT_FILE",), "PIP_CERT", "cert"),
            (("UV_INSECURE_HOST",), "PIP_TRUSTED_HOST", "trusted-host"),
        ):
            value = environ.get(pips) or settings.get(option)
            if value and not any(environ.get(name) for name in ours):
                env[ours[0]] = value
    return env


def given(links: Sequence[str], pin: Pin) -> bool:
    """Whether a named directory has the package; a page on a network is taken to have it."""
    return any(
        re.match(r"https?://", link) is not None
        or _holds(link[len("file://") :] if link[:7] == "file://" else link, pin)
        for link in links
    )


def _holds(directory: str, pin: Pin) -> bool:
    names = {pin.wheel, pin.wheel.replace("+", "%2B")}
    return any((Path(directory) / name).is_file() for name in names)


MIRROR = (
    "the package index does not answer, or does not have everything: name a mirror (UV_DEFAULT_INDEX), a proxy "
    "(HTTPS_PROXY), or on a machine without a network a directory of wheels (WHEELS=/path/to/wheels)."
)
# What uv prints, as far as it tells causes apart; the first that is found counts.
CAUSES = (
    (
        r"hash mismatch",
        "what the package index gave is not the file that was locked, so it was not installed: ask whoever runs the "
        "mirror, or use another one (UV_DEFAULT_INDEX).",
    ),
    (
        r"no space left|os error 28",
        "the disk is full: about 4.3 GiB are needed for packages (UV_CACHE_DIR moves where uv keeps them).",
    ),
    (
        r"invalid peer certificate|unknownissuer|certificate verify failed",
        "the package index or a proxy shows a certificate that is not known here: name your certificates with "
        "SSL_CERT_FILE=/path/to/bundle.pem.",
    ),
    (
        r"no interpreter found|python-build-standalone|failed to (download|install).*cpython",
        "there is no Python 3.11 on this machine, and uv could not fetch one: install Python 3.11 (Debian 12: apt-get "
        "install python3 python3-venv; others: pyenv), or name a mirror or directory in UV_PYTHON_INSTALL_MIRROR.",
    ),
)
LOST = (
    r"failed to fetch|request failed|error sending request|timed? ?out|"
    r"not found in the (package registry|cache)|no version of"
)


def explanation(output: str, pin: Pin | None, environ: Mapping[str, str]) -> str:
    """What went wrong and what to do about it, of what uv printed; "" where it says so itself."""
    for pattern, said in CAUSES:
        if re.search(pattern, output, re.I):
            return said
    if not re.search(LOST, output, re.I):
        return ""
    if environ.get(WHEELS):
        return (
            f"{environ[WHEELS]} does not hold everything: put every wheel of the lock into it (README, “Installing”), "
            "or leave WHEELS out where there is a network."
        )
    if pin is not None and re.search(rf"/{pin.name}/|\b{pin.name}(==| was not found)", output):
        return (
            f"PyTorch's build for processors, {pin.name} {pin.version}, could not be fetched from PyTorch's own page. "
            f"Fetch the file {pin.wheel} where that page can be reached, put it into a directory, and name that: "
            "TORCH_FIND_LINKS=/path/to/directory. Its hash is in the lock."
        )
    return MIRROR


class Run(Protocol):
    """Runs a command in an environment: status, and what it printed to standard error."""

    def __call__(self, command: Sequence[str], env: Mapping[str, str], /) -> tuple[int, str]: ...


def sync(
    uv: str, command: str, python: str, lock: Path, options: Sequence[str], env: Mapping[str, str], run: Run
) -> tuple[int, str]:
    """Install a lock; `command` is `sync` or `install`. Status and what uv printed."""
    pin = pin_of(lock.read_text(encoding="utf-8"))
    hashed = ["--python", python, "--require-hashes", *options]
    links = [part for part in env.get("UV_FIND_LINKS", "").split(",") if part]
    if pin is not None and not env.get(WHEELS) and not given(links, pin):
        with tempfile.TemporaryDirectory() as folder:
            alone = Path(folder) / "pin.txt"
            alone.write_text(pin.lines, encoding="utf-8")
            status, output = run(
                [uv, "pip", "install", "--quiet", "--no-deps", *hashed, "-r", str(alone)], {**env, BACKEND: "cpu"}
            )
        if status:
            return status, output
    if command == "sync":
        return run([uv, "pip", "sync", "--quiet", *hashed, str(lock)], env)
    return run([uv, "pip", "install", "--quiet", "--no-deps", *hashed, "-r", str(lock)], env)


def _run(command: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    done = subprocess.run(  # noqa: S603  # uv, as the Makefile found it
        list(command), env=dict(env), stderr=subprocess.PIPE, check=False
    )
    output = done.stderr.decode("utf-8", "replace")
    shown = output if done.returncode == 0 else "\n".join(output.strip().splitlines()[-SHOWN_LINES:]) + "\n"
    sys.stderr.write(re.sub(r"://[^/@\s]*@", "://***@", shown))
    return done.returncode, output


def _pips_own(environ: Mapping[str, str]) -> str:
    """pip's own word on its settings; its variables are read apart. Without a file of them pip, which is slow, is not
    asked."""
    home = environ.get("HOME", "/")
    config = environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
    files = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf", f"{home}/.pip/pip.conf", f"{config}/pip/pip.conf"]
    if not any(map(os.path.exists, [environ.get("PIP_CONFIG_FILE", ""), f"{sys.prefix}/pip.conf", *files])):
        return ""
    done = subprocess.run(  # this interpreter
        [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.stdout.decode("utf-8", "replace")


def _uv_is_set_up(environ: Mapping[str, str]) -> bool:
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/")) / ".config")
    return "UV_CONFIG_FILE" in environ or any(
        Path(file).is_file() for file in (f"{home}/uv/uv.toml", "/etc/uv/uv.toml")
    )


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    words = list(arguments)
    uv = "uv"
    if words[:1] == ["--uv"]:
        uv, words = words[1], words[2:]
    environ = dict(os.environ)
    env = environment(environ, pip_settings(_pips_own(environ)), uv_is_set_up=_uv_is_set_up(environ))
    if words[0] == "exec":
        os.execvpe(words[1], words[1:], env)  # noqa: S606  # in this process's place: signals are the command's
    pin: Pin | None = None
    if words[0] == "venv":
        status, output = _run([uv, "venv", "--quiet", "--python", "3.11", *words[1:]], env)
    elif words[0] == "compile":
        links = [part for part in env.get("UV_FIND_LINKS", "").split(",") if part]
        # Only the names of versions are wanted: of which page uv reads them does not matter.
        lock = Path(__file__).resolve().parent.parent / "locks" / "cpu.txt"
        pin = pin_of(lock.read_text(encoding="utf-8"))
        away = "cpu" in words and pin is not None and not given(links, pin)
        status, output = _run([uv, "pip", "compile", *words[1:]], {**env, **({BACKEND: "cpu"} if away else {})})
    else:
        python, lock = words[1], Path(words[2])
        pin = pin_of(lock.read_text(encoding="utf-8"))
        command = {"sync": "sync", "add": "install"}[words[0]]
        status, output = sync(uv, command, python, lock, words[3:], env, _run)
    if status and (said := explanation(output, pin, environ)):
        print(f"galerne: {said}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
