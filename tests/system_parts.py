"""Programs of the operating system that some tests need: `make test` installs them where it may.

Where one is absent the test is skipped and says so; with CI=true that is a failure, because a test that never runs
proves nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

HOW = "install it with `make system-parts` (root, apt-get) or by hand"


# Where Debian keeps a server's programs, off the path.
ELSEWHERE = {"initdb": "/usr/lib/postgresql", "pg_ctl": "/usr/lib/postgresql"}


def required(program: str) -> str:
    """The program's path; skips the test without it, or fails it in CI."""
    found = shutil.which(program)
    if found is None and program in ELSEWHERE:
        found = max(map(str, Path(ELSEWHERE[program]).glob(f"*/bin/{program}")), default=None)
    if found is not None:
        return found
    reason = f"`{program}` is not installed: {HOW}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
