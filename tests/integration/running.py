"""A cluster started the way a user starts it: the `galerne serve` command, stopped by SIGINT."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

GALERNE = Path(sys.executable).with_name("galerne")
STOP_TIMEOUT_S = 60
# Ray Serve's own range for the replicas that take HTTP.
RAY_INGRESS_PORTS = range(30_000, 31_001)
KEY = "sk-demo-press"
OTHER_KEY = "sk-demo-jobs"
ADMIN_KEY = "sk-demo-operator"


@dataclass
class RunningCluster:
    """A cluster that answers, and what it told about itself."""

    url: str
    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path
    start_s: float

    def state(self) -> dict[str, Any]:
        """The state file as it is now: replicas come and go."""
        document: dict[str, Any] = json.loads(self.ready_file.read_text())
        return document

    def engine_url(self, model: str, index: int = 0) -> str:
        """The private port of one of the model's replicas."""
        engine = self.state()["engines"][model][index]
        return f"http://{engine['host']}:{engine['port']}"

    def engine_headers(self) -> dict[str, str]:
        """What the engine's port asks for."""
        return {"x-galerne-engine-token": self.state()["engine_token"]}

    def engine_metric(self, model: str, name: str, index: int = 0) -> float:
        """Sum of an engine metric's samples, from the engine itself."""
        return metric(f"{self.engine_url(model, index)}/metrics", name)

    def processes(self) -> list[psutil.Process]:
        """The command and every process it caused."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def ports_past_haproxy(self) -> dict[str, int]:
        """Where whoever is on this machine reaches a gateway past HAProxy: its own port, and Ray's fallback proxy."""
        gateway = psutil.Process(self.state()["pids"]["gateway"][0])
        (own,) = (
            connection.laddr.port
            for connection in gateway.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port in RAY_INGRESS_PORTS
        )
        return {"gateway": own, "fallback": int(gateway.environ()["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])}

    def listening(self) -> set[tuple[str, str, int]]:
        """Process name, address and port of every socket listened on now, in one walk over the processes."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # a passing helper of Ray's
                found |= {
                    (process.name(), connection.laddr.ip, connection.laddr.port)
                    for connection in process.net_connections(kind="inet")
                    if connection.status == psutil.CONN_LISTEN
                }
        return found


def metric(url: str, name: str, **labels: str) -> float:
    """Sum of the samples of a metric on a Prometheus endpoint, those with these labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@contextlib.contextmanager
def cluster(config: Path, directory: Path, timeout_s: float, *options: str) -> Iterator[RunningCluster]:
    """Start `galerne serve` with a configuration, wait until it is ready, stop it with SIGINT."""
    ready, log = directory / "ready.json", directory / "serve.log"
    started_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(GALERNE), "serve", str(config), "--ready-file", str(ready), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"COLUMNS": "200"},
        )
    try:
        while not ready.exists():
            if process.poll() is not None or time.monotonic() - started_s > timeout_s:
                raise AssertionError(f"the cluster did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        url = json.loads(ready.read_text())["url"]
        yield RunningCluster(url, process, ready, log, time.monotonic() - started_s)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGINT, as Ctrl-C sends it; SIGKILL only where that does not end it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode
