"""Tries to reach the outside from where it runs, and must fail to.

What it does to a target is the least that shows a way out: a name is resolved; a port gets a TCP connection that is
closed at once and carries no byte; a metadata service gets `GET /` without the headers that would make it hand out
anything. A connection that is accepted counts as reached, whoever accepted it: a proxy that takes everything is a way
out until it is shown not to be. UDP is not tried, because there a silence proves nothing.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from serving.cli.verify.result import FAILED, PASSED, Check
from serving.errors import GalerneError

PROBE_TIMEOUT_S = 3.0
PARALLEL = 16
HIGHEST_PORT = 65535
READ_BYTES = 64

Kind = Literal["dns", "tcp", "http"]
Resolve = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Target:
    """Something outside: a name (dns), or an address and a port."""

    kind: Kind
    host: str
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "dns":
            return f"dns:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}:{host}:{self.port}"


# The defaults of `--isolated`. Names end with a dot, so that no search domain of the cluster is put after them.
OUTSIDE: tuple[Target, ...] = (
    Target("dns", "example.com."),
    Target("dns", "huggingface.co."),
    # Public resolvers: addresses that everybody knows and that answer on both ports.
    Target("tcp", "1.1.1.1", 443),
    Target("tcp", "8.8.8.8", 443),
    Target("tcp", "9.9.9.9", 443),
    Target("tcp", "1.1.1.1", 53),
    Target("tcp", "8.8.8.8", 53),
    Target("tcp", "2606:4700:4700::1111", 443),
    Target("tcp", "2001:4860:4860::8888", 443),
    # Metadata services hand a node's identity to whoever asks from it.
    Target("http", "169.254.169.254", 80),  # Azure, AWS, Google and most others
    Target("http", "168.63.129.16", 80),  # Azure's host agent
    Target("http", "169.254.170.2", 80),  # AWS containers
    Target("http", "100.100.100.200", 80),  # Alibaba
    Target("http", "fd00:ec2::254", 80),  # AWS over IPv6
)


class BadTarget(GalerneError):
    """A target that cannot be read."""


def target(text: str) -> Target:
    """A target from `dns:NAME`, `tcp:HOST:PORT` or `http:HOST:PORT`; raises BadTarget."""
    kind, _, rest = text.partition(":")
    if kind == "dns" and rest and not rest.endswith(":"):
        return Target("dns", rest)
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if kind in {"tcp", "http"} and host and port.isdecimal() and 0 < int(port) <= HIGHEST_PORT:
        return Target("tcp" if kind == "tcp" else "http", host, int(port))
    raise BadTarget(f"{text!r} is no target; allowed: dns:NAME, tcp:HOST:PORT, http:HOST:PORT")


def resolve(name: str) -> str:
    """The first address of a name; raises OSError."""
    return str(socket.getaddrinfo(name, None)[0][4][0])


def probe(
    targets: Iterable[Target],
    *,
    timeout_s: float = PROBE_TIMEOUT_S,
    resolver: Resolve = resolve,
    clock: Callable[[], float] = time.monotonic,
) -> list[Check]:
    """One check a target, at once: passed where it could not be reached."""

    def one(target: Target) -> Check:
        began_s = clock()
        reached = _reached(target, timeout_s, resolver)
        name = f"isolated from {target}"
        if reached is None:
            return Check(name, PASSED, "cannot be reached", clock() - began_s)
        return Check(name, FAILED, f"REACHED: {reached}", clock() - began_s)

    with ThreadPoolExecutor(PARALLEL) as threads:
        return list(threads.map(one, targets))


def _reached(target: Target, timeout_s: float, resolver: Resolve) -> str | None:
    """What answered; None where nothing did."""
    if target.kind == "dns":
        address = _within(lambda: resolver(target.host), timeout_s)
        return None if address is None else f"the name resolves to {address}"
    try:
        with socket.create_connection((target.host, target.port), timeout=timeout_s) as connection:
            if target.kind == "tcp":
                return "the connection was accepted"
            return _greeted(connection, target)
    except OSError:
        return None


def _greeted(connection: socket.socket, target: Target) -> str:
    with contextlib.suppress(OSError):
        connection.sendall(f"GET / HTTP/1.0\r\nhost: {target.host}\r\n\r\n".encode())
        line = connection.recv(READ_BYTES).split(b"\r\n")[0].decode(errors="replace")
        if line:
            return f"it answered {line!r}"
    return "the connection was accepted"


def _within(call: Callable[[], str], timeout_s: float) -> str | None:
    """What the call returns; None where it fails or takes longer: the system's resolver knows no time limit."""
    found: list[str] = []

    def run() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else None
