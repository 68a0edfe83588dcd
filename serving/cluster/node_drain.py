"""Before a pod ends: has Serve move its replicas elsewhere, and waits until they have finished their streams.

A pod's preStop hook runs it (`python -m serving.cluster.node_drain SECONDS`), because Ray's own end of a node cuts what
runs on it. Ray is told that the node goes; Serve's controller starts replacements where there is room, takes the
replicas here out of the gateways' lists and lets them drain, and this process looks at the processes of its pod until
none of them is a replica. It always ends within the given time, with status 0: a hook that fails changes nothing but
the events it leaves.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Ray names an actor's process after its class and method.
REPLICA = b"ray::ServeReplica:"
ENV_ADDRESS = "RAY_ADDRESS"
ENV_POD_IP = "VLLM_HOST_IP"
MESSAGE = "the pod ends"
POLL_S = 0.5


def replicas_here(proc: Path = Path("/proc")) -> list[int]:
    """Process ids of the Serve replicas of this pod."""
    found = []
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if command.startswith(REPLICA):
                found.append(int(entry.name))
    return sorted(found)


def drain(
    within_s: float,
    tell: Callable[[], bool],
    replicas: Callable[[], list[int]] = replicas_here,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Return when no replica is left, True, or when the time is over, False."""
    deadline_s = clock() + within_s
    if not replicas():
        # Nothing to wait for; yet what would be placed here in the next seconds would be cut.
        tell()
        return True
    if not tell():
        # Nobody will end them: all that is left is to end.
        return False
    while replicas():
        if clock() >= deadline_s:
            return False
        sleep(POLL_S)
    return True


def main(args: list[str], env: Mapping[str, str]) -> int:
    """Drain this pod's node within the seconds given; the exit status."""
    from serving.errors import ClusterError

    within_s = float(args[0])

    def tell() -> bool:
        from serving.cluster.ray import drain_node

        try:
            return drain_node(env[ENV_ADDRESS], env[ENV_POD_IP], MESSAGE, within_s)
        except (ClusterError, KeyError) as error:
            print(f"node_drain: {error}", file=sys.stderr)
            return False

    if not drain(within_s, tell):
        print(f"node_drain: replicas are left: {replicas_here()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
