"""A real Redis for tests: 127.0.0.1, a free port, nothing on disk, gone afterwards."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.system_parts import required

PASSWORD = "redis-secret"


@dataclass
class RedisServer:
    """A server that can be stopped and started again on its port."""

    program: str
    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--requirepass", PASSWORD]
        options += ["--save", "", "--appendonly", "no", "--dir", str(self.directory)]
        self.process = subprocess.Popen([self.program, *options], stdout=subprocess.DEVNULL)
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as there:
                there.sendall(f"AUTH {PASSWORD}\r\nPING\r\n".encode())
                answer = b""
                while part := there.recv(100):
                    answer += part
                    if b"PONG" in answer:
                        return
            assert self.process.poll() is None, "redis-server ended"
            time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[RedisServer]:
    """Skipped, or in CI failed, where redis-server is not installed."""
    program = required("redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = RedisServer(program, directory, port)
    try:
        server.start()
        yield server
    finally:
        server.stop()
