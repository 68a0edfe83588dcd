"""Becomes another program that ends with the process that started it, also when that process is killed.

`python -m serving.cluster.attached PROGRAM ARGUMENT…`. A program of its own and no hook between fork and exec: what
such a hook may do in a process with threads is next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys

from serving.cluster.processes import die_with_parent


def main() -> None:
    """Replace this process."""
    die_with_parent(signal.SIGTERM)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - no shell; our caller names the program


if __name__ == "__main__":
    main()
