"""`python -m helm.dashboards.show`: a cluster with simulated engines under load, and a picture of every dashboard.

The load is a scenario of the load tester and, beside it, what a scenario does not send: embeddings and requests that
are refused. The pictures are taken while it still runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from helm.dashboards.pictures import OUT, take
from serving.cli.prometheus import DIRECTORY as PROMETHEUS
from serving.cli.state import state_dir

HERE: Final = Path(__file__).parent
PORT: Final = 18600  # as in cluster.yaml
START_S: Final = 240.0
STOP_S: Final = 60.0
# A little less than the load lasts, so that its end is not in the pictures.
SHOWN_S: Final = 390
PAUSE_S: Final = 1.5
PRESS, JOBS, NOBODY = "sk-demo-press", "sk-demo-jobs", "sk-nobody"
_CHAT: Final = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
# key, path, body; None: by GET
ASIDE: Final[tuple[tuple[str, str, dict[str, Any] | None], ...]] = (
    (JOBS, "/v1/embeddings", {"model": "all-minilm-l6-v2", "input": ["a vacancy", "a second one"]}),
    (PRESS, "/v1/embeddings", {"model": "all-minilm-l6-v2", "input": "a report"}),
    (NOBODY, "/v1/chat/completions", _CHAT),
    (JOBS, "/v1/chat/completions", _CHAT | {"model": "nothing"}),
    (PRESS, "/v1/chat/completions", _CHAT | {"n": 99}),
    (JOBS, "/v1/usage?group_by=model", None),
)


def _aside(url: str, stopping: threading.Event) -> None:
    number = 0
    while not stopping.wait(PAUSE_S):
        key, path, body = ASIDE[number % len(ASIDE)]
        number += 1
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers)  # noqa: S310 - our own cluster
        try:
            urllib.request.urlopen(request, timeout=60).close()  # noqa: S310
        except urllib.error.HTTPError as refused:
            refused.close()


def _started(process: subprocess.Popen[bytes], ready: Path, log: Path) -> dict[str, Any]:
    deadline_s = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the cluster does not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.3)
    state: dict[str, Any] = json.loads(ready.read_text())
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; the cluster is stopped whatever happens."""
    parser = argparse.ArgumentParser(
        prog="python -m helm.dashboards.show", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    galerne = Path(sys.executable).with_name("galerne")
    # What an earlier run left there would be in the pictures.
    shutil.rmtree(state_dir(PORT) / PROMETHEUS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        ready, log = Path(directory) / "ready.json", Path(directory) / "serve.log"
        with log.open("wb") as output:
            command = [str(galerne), "serve", str(HERE / "cluster.yaml"), "--with-prometheus"]
            command += ["--ready-file", str(ready)]
            cluster = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)  # noqa: S603
        stopping = threading.Event()
        try:
            state = _started(cluster, ready, log)
            threading.Thread(target=_aside, args=(state["url"], stopping), daemon=True).start()
            scenario = [sys.executable, "-m", "loadtest", "run", str(HERE / "load.yaml"), "--url", state["url"]]
            load = subprocess.Popen([*scenario, "--out", f"{directory}/load"], env=os.environ)  # noqa: S603
            time.sleep(SHOWN_S)
            for path in take(state["prometheus_url"], SHOWN_S, given.out):
                print(path)
            load.wait()  # its exit code says whether the load was served in time, not whether there are pictures
        finally:
            stopping.set()
            cluster.send_signal(signal.SIGINT)
            cluster.wait(STOP_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
