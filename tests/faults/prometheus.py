"""A real Prometheus over a cluster, in front of it a proxy that can spoil its answers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serving.metrics import prometheus

PORT = 18290
PROXY_PORT = 18291
URL = f"http://127.0.0.1:{PORT}"
# Longer than the configuration's query_timeout_s.
SLOW_S = 4.0
VALUE = re.compile(r'("value":\[[0-9.e+]+,)"[^"]*"')


class Prometheus:
    """The process; `kill`, `freeze` and `thaw` are what a test does to it."""

    def __init__(self, program: str, directory: Path, targets: Path) -> None:
        rules, config = directory / "rules.yaml", directory / "prometheus.yaml"
        rules.write_text(prometheus.rule_file())
        config.write_text(prometheus.config_file(rules, targets))
        self._command = (
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{PORT}",
            "--log.level=error",
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it (again, with the data it has) and wait until it answers."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{URL}/-/ready", timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline_s, "Prometheus does not start"
                time.sleep(0.1)
            else:
                return

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As the kernel does when memory is out; a frozen one too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Proxy:
    """Hands questions on; `mode` spoils the answers: pass, nan or slow."""

    def __init__(self) -> None:
        self.mode = "pass"
        self.answered: dict[str, int] = {"pass": 0, "nan": 0, "slow": 0}
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", PROXY_PORT), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        mode = self.mode
        try:
            with urllib.request.urlopen(URL + asked.path, timeout=5) as response:
                body: bytes = response.read()
        except OSError:
            asked.send_error(502)
            return
        if mode == "nan":
            body = VALUE.sub(r'\1"NaN"', body.decode()).encode()
            assert json.loads(body)["status"] == "success"
        elif mode == "slow":
            time.sleep(SLOW_S)
        self.answered[mode] += 1
        try:
            asked.send_response(200)
            asked.send_header("content-length", str(len(body)))
            asked.end_headers()
            asked.wfile.write(body)
        except OSError:
            pass  # who asked has given up

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
