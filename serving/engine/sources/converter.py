"""Runs the converter process and turns what it reports into progress or a SourceError."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from serving.engine.sources.facts import Progress, ProgressFn
from serving.errors import SourceError

THREADS = 2
_ERROR_CHARACTERS = 500


def run(arguments: list[str], lock_fd: int, progress: ProgressFn, env: Mapping[str, str]) -> None:
    """Convert; OSError for a failure of the disk, SourceError for any other."""
    last: dict[str, Any] = {}
    # Its few matrix operations gain nothing from more threads, and an engine may be running beside it.
    limited = {**env, "OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
    command = [sys.executable, "-m", "serving.engine.sources.convert", *arguments]
    with subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
        command, env=limited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=(lock_fd,)
    ) as process:
        try:
            for line in process.stdout or ():
                last = json.loads(line)
                if "step" in last:
                    progress(Progress(last["step"], last["done"], last["total"]))
            complaint = process.stderr.read() if process.stderr else ""
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return
    if "error" in last and last["errno"] is not None:
        raise OSError(last["errno"], last["error"], last["filename"])
    if "error" in last:
        raise SourceError(f"the model could not be converted: {last['error']}")
    if process.returncode < 0:
        raise SourceError(
            f"converting the model was ended by signal {-process.returncode}; if memory ran out, free about "
            "1 GiB and try again"
        )
    raise SourceError(f"converting the model failed: {complaint.strip()[-_ERROR_CHARACTERS:]}")
