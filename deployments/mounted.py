"""The configuration as a pod finds it: a file that Kubernetes replaces some time after its Secret has changed.

Serve is told of a new configuration at once, and the file in the pod follows a minute or so later; an application built
in between would be the old one for good. So the chart writes a revision into the file's first line and names the same
one in the application's arguments, and whoever builds waits until the file says it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from serving.config import GalerneConfig
from serving.config_file import load
from serving.errors import ConfigError

MARK = "# revision:"
# A kubelet looks at its volumes every minute, and caches what it has seen for as long.
WAIT_S = 300.0
POLL_S = 1.0


def load_revision(
    path: Path,
    revision: str | None,
    wait_s: float = WAIT_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> GalerneConfig:
    """The configuration once the file is of this revision; a file without one is taken as it is. Raises ConfigError."""
    deadline_s = clock() + wait_s
    while revision and (found := _revision(path)) not in {revision, None}:
        if clock() >= deadline_s:
            late = f"still of revision {found} after {wait_s:.0f} s, and {revision} is wanted: was its Secret changed?"
            raise ConfigError((f"{path}: {late}",))
        sleep(POLL_S)
    return load(path)


def _revision(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except OSError:
        return None  # `load` says what is wrong
    return first.removeprefix(MARK).strip() if first.startswith(MARK) else None
