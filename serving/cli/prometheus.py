"""A Prometheus beside the cluster on one machine: `galerne serve --with-prometheus`.

It listens on loopback, keeps its data below the cluster's state directory, scrapes what the cluster lists there and
ends with it. The cluster does not need it to live: without it, scaling holds. Prometheus reports to nobody.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Final

from serving.cli import state
from serving.cluster import processes
from serving.errors import ClusterError
from serving.metrics import prometheus

PROGRAM: Final = "prometheus"
FIRST_PORT: Final = 9090
HOST: Final = "127.0.0.1"
DIRECTORY: Final = "prometheus"
CONFIG_FILE: Final = "prometheus.yaml"
RULES_FILE: Final = "galerne.rules.yaml"
LOG_FILE: Final = "prometheus.log"
# Three days are the longest window of an alert.
RETENTION: Final = ("--storage.tsdb.retention.time=7d", "--storage.tsdb.retention.size=1GB")
START_WAIT_S: Final = 15.0
POLL_S: Final = 0.05
LOG_TAIL_BYTES: Final = 500
MISSING = (
    "--with-prometheus needs the `prometheus` program on PATH. On Debian and Ubuntu: apt-get install prometheus "
    "(its own service on port 9090 is not needed: systemctl disable --now prometheus); elsewhere: "
    "prometheus.io/download"
)


def program() -> str:
    """Path of Prometheus; raises ClusterError that says how to get it."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise ClusterError(MISSING)
    return found


class LocalPrometheus:
    """The process and its files."""

    def __init__(self, binary: str, state_dir: Path) -> None:
        directory = state_dir / DIRECTORY
        port = processes.free_port(HOST, FIRST_PORT)
        self.url = f"http://{HOST}:{port}"
        self._config, self._rules = directory / CONFIG_FILE, directory / RULES_FILE
        self._log = directory / LOG_FILE
        self._targets = state_dir / state.TARGETS_FILE
        self._process: subprocess.Popen[bytes] | None = None
        self.command = (
            binary,
            f"--config.file={self._config}",
            f"--storage.tsdb.path={directory / 'data'}",
            *RETENTION,
            f"--web.listen-address={HOST}:{port}",
            "--log.level=warn",
        )

    def start(self) -> None:
        """Start it and wait until it answers; raises ClusterError."""
        self._config.parent.mkdir(exist_ok=True, mode=0o700)
        self._rules.write_text(prometheus.rule_file())
        self._config.write_text(prometheus.config_file(self._rules, self._targets))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter and the program found on PATH
                [sys.executable, "-m", "serving.cluster.attached", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the command that started it: it is ended last, with the cluster's other processes.
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_WAIT_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ClusterError(f"Prometheus does not start: {self._log_end()}")
            time.sleep(POLL_S)

    def ended(self) -> str | None:
        """Once, after it has ended, what to tell the operator.

        It is not started again: what ended it may do so again, and the scale is safe while it is held.
        """
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self._process = None
        return (
            f"Prometheus has ended with status {status}; the cluster serves on, and its scale is held. "
            f"Log: {self._log}. To start it again: {shlex.join(self.command)}"
        )

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=1):  # noqa: S310
            return True
        return False

    def _log_end(self) -> str:
        text = self._log.read_text(errors="replace")[-LOG_TAIL_BYTES:].strip()
        return (text.splitlines() or [f"no reason given in {os.fspath(self._log)}"])[-1]
