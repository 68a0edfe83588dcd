"""The replica's side of an engine process, against programs that behave as one may: well, badly, not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from serving.config import ModelConfig
from serving.engine.host_spec import HostSpec
from serving.engine.hosted import HostedEngine
from serving.errors import EngineError

ANSWERS = """
    import json, os, signal, sys, threading
    from http.server import BaseHTTPRequestHandler, HTTPServer
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(STATUS); self.end_headers()
        def log_message(self, *args): pass
    spec = json.loads(sys.stdin.readline())
    assert spec["model"]["id"] == "m" and spec["token"] == "t"
    server = HTTPServer(("127.0.0.1", 0), Handler)
    def stop(*_):
        open("drained", "w").close()
        os._exit(0)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.write(int(sys.argv[1]), json.dumps({"port": server.server_port, "phases_s": {"load": 7.0, "compile": 2.5}, "capacity": {"sequences": 32}, "token_ids": 49152}).encode() + b"\\n")
    sys.stdin.read()
"""


def engine(tmp_path: Path, program: str, **fields: object) -> HostedEngine:
    script = tmp_path / "program.py"
    script.write_text(f"import os; os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(program))
    model = ModelConfig.model_validate({"id": "m", "source": "random:mistral"} | fields)
    # As on a GPU: nothing of an installed PyTorch is asked for.
    spec = HostSpec(model=model, weights=tmp_path, host="127.0.0.1", token="t", gpu=True)
    return HostedEngine(model, "127.0.0.1", lambda: spec, (str(script),))


async def test_a_good_engine_is_healthy_and_drained_by_sigterm(tmp_path: Path) -> None:
    hosted = engine(tmp_path, ANSWERS.replace("STATUS", "200"))
    await hosted.start()
    assert hosted.port > 0
    # As the process says; what it cannot know of, its own start, is loading.
    assert hosted.phases_s["compile"] == 2.5
    assert hosted.phases_s["load"] >= 7.0
    assert hosted.capacity == {"sequences": 32}
    assert hosted.token_ids == 49152
    await hosted.check_health()
    await hosted.stop()
    assert (tmp_path / "drained").exists()
    with pytest.raises(EngineError, match="has ended"):
        await hosted.check_health()


async def test_an_engine_that_reports_an_error_is_unhealthy(tmp_path: Path) -> None:
    hosted = engine(tmp_path, ANSWERS.replace("STATUS", "503"))
    await hosted.start()
    try:
        with pytest.raises(EngineError, match="503"):
            await hosted.check_health()
    finally:
        await hosted.stop()


async def test_a_killed_process_is_noticed(tmp_path: Path) -> None:
    hosted = engine(tmp_path, ANSWERS.replace("STATUS", "200"))
    await hosted.start()
    (child,) = [p for p in psutil.Process().children() if "program.py" in " ".join(p.cmdline())]
    os.kill(child.pid, signal.SIGKILL)
    child.wait(5)
    with pytest.raises(EngineError, match="has ended"):
        await hosted.check_health()
    await hosted.stop()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit(7)", "ended with 7"),
        (
            'import os, sys; os.write(int(sys.argv[1]), b\'{"error": "no such weights"}\\n\')',
            "'m': no such weights",
        ),
    ],
)
async def test_what_keeps_it_from_starting_is_told(program: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message):
        await engine(tmp_path, program).start()


async def test_a_start_has_a_bound(tmp_path: Path) -> None:
    hosted = engine(tmp_path, "import time; time.sleep(600)", start_timeout_s=1)
    with pytest.raises(EngineError, match="did not start within 1 s"):
        async with asyncio.timeout(20):
            await hosted.start()
    await hosted.stop()
    assert not [p for p in psutil.Process().children() if "program.py" in " ".join(p.cmdline())]


def test_an_engines_process_has_its_title_before_it_changes_its_environment() -> None:
    # The kernel's place for a title begins where the environment does: who moves the first variable first gets none,
    # and neither do vLLM's core and workers, which are forks.
    with subprocess.Popen(
        [sys.executable, "-m", "serving.engine.host", "1"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline_s = time.monotonic() + 60
            while not " ".join(psutil.Process(process.pid).cmdline()).startswith("galerne engine"):
                assert time.monotonic() < deadline_s, psutil.Process(process.pid).cmdline()
                time.sleep(0.05)
        finally:
            process.kill()
