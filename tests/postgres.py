"""A PostgreSQL of a test's own, on 127.0.0.1, with a password, below a directory that goes with it."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from serving.cluster.processes import free_port
from tests.system_parts import required

PASSWORD = "a-pass'word"
USER = "galerne"


class Postgres:
    """Starts and stops; the data stays between both."""

    def __init__(self, directory: Path) -> None:
        self._initdb, self._control = required("initdb"), required("pg_ctl")
        self._data = directory / "data"
        self.port = free_port("127.0.0.1", 15432)
        # The server refuses to run as root.
        self._user = _somebody() if os.getuid() == 0 else None
        self._data.mkdir(parents=True)
        secret = directory / "password"
        secret.write_text(PASSWORD)
        if self._user is not None:
            for path in (directory, self._data, secret):
                os.chown(path, self._user, -1)
        self._run(self._initdb, "-D", str(self._data), "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}")

    @property
    def url(self) -> str:
        """As a configuration names it; the password is escaped as in every URL."""
        return f"postgresql://{USER}:a-pass%27word@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._run(self._control, "-D", str(self._data), "-w", "-l", str(self._data / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._run(self._control, "-D", str(self._data), "-w", "-m", "immediate", "stop")

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            check=False,
            user=self._user,
            # Not a pipe: the server inherits it and would keep it open.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            cwd="/",
            timeout=60,
        )
        assert done.returncode == 0, command


def _somebody() -> int:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    raise LookupError("neither postgres nor nobody is a user here")
