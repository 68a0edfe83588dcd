"""What the operating system lets one process have open."""

from __future__ import annotations

import resource

from loadtest.errors import LoadtestError

# Beside connections: standard streams, the event loop's own, pipes, libraries.
OWN_FILES = 64


def raise_open_files(connections: int) -> None:
    """Allow this process so many connections: the soft limit of open files is raised to the hard one.

    Raises LoadtestError where the hard limit is too low.
    """
    needed = connections + OWN_FILES
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LoadtestError(
            f"{connections} connections in one process need {needed} open files, and it may have {hard}; "
            "raise the limit (ulimit -Hn, LimitNOFILE=), use more --workers, or lower --max-connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
