"""`make run` on a machine of a newcomer: bare Debian, an ordinary user with an empty home, one missing part after another.

The machine is a directory that debootstrap fills, entered by chroot with mounts of its own; processes, kernel and network
are this machine's. Needs root, debootstrap and a network, and takes minutes; where one of them is missing it says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.running import KEY

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

# The oldest and the newest: one has Python 3.11, the other 3.13.
DEBIANS = {"bookworm": "3.11", "trixie": "3.13"}
# What a user of this machine has told installers counts there too, and the files that it names are there.
TOLD = re.compile(r"(?:PIP|UV)_[A-Z_]+|SSL_CERT_FILE|(?:https?|no)_proxy|(?:HTTPS?|NO)_PROXY")
NOT_TOLD = {"UV_CACHE_DIR", "PIP_CACHE_DIR", "UV_PYTHON"}
# In the sentence of each part that no network here can bring.
NO_PYTORCH, NO_PYTHON = "TORCH_FIND_LINKS=", "UV_PYTHON_INSTALL_MIRROR"
RUN_WITHIN_S, STOP_WITHIN_S = 900, 90
URL = "http://127.0.0.1:8000"
READY = "Galerne is ready"
# `unshare` has the mounts go with the process: whoever removes the directory never removes what was mounted.
ENTER = """
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
# Read-only: vLLM looks at the processors there.
mount --bind -o ro /sys "$1/sys"
for pair in $2; do
  from=${pair%%=*} to=$1${pair#*=}
  if [ -d "$from" ]; then mkdir -p "$to"; else mkdir -p "$(dirname "$to")"; : >>"$to"; fi
  mount --bind "$from" "$to"
done
exec chroot "$1" env -i TERM=dumb LANG=C.UTF-8 $3 sh -c "$4"
"""


class Machine:
    """A bare system, and a user on it with a checkout in the home directory."""

    def __init__(self, directory: Path, release: str) -> None:
        self.directory, self.release = directory, release
        said = {n: v for n, v in os.environ.items() if TOLD.fullmatch(n) and n not in NOT_TOLD and " " not in v}
        # Where pip finds a bundle by its settings, uv is told of it.
        if "PIP_CERT" in said:
            said.setdefault("SSL_CERT_FILE", said["PIP_CERT"])
        # Under names of their own: what they are called here may be a file of the system there.
        paths = sorted({value for value in said.values() if value[:1] == "/" and Path(value).exists()})
        there = {path: f"/mnt/told/{number}" for number, path in enumerate(paths)}
        self._variables = " ".join(f"{name}={there.get(value, value)}" for name, value in said.items())
        self._paths = " ".join(f"{path}={name}" for path, name in there.items())
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", release, str(directory)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"debootstrap {release} failed, so nothing was shown: {done.stdout[-300:]}{done.stderr[-300:]}")
        self.as_root("apt-get -qq update && useradd --create-home --shell /bin/bash alice")
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                target = directory / "home" / "alice" / "galerne" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        self.as_root("chown -R alice: /home/alice")

    def command(self, line: str) -> list[str]:
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "sh", str(self.directory)]
        return [*enter, self._paths, self._variables, line]

    def as_root(self, line: str) -> None:
        done = subprocess.run(self.command(line), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *packages: str) -> None:
        self.as_root(
            f"DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends {' '.join(packages)}"
        )

    def alice(self, line: str) -> list[str]:
        """The user's command in the checkout, in a login shell that keeps what installers were told."""
        return self.command(f"exec su - alice -c 'cd galerne && {self._variables} {line}'")

    def says(self, line: str) -> tuple[int, str]:
        done = subprocess.run(self.alice(line), capture_output=True, text=True, check=False, timeout=RUN_WITHIN_S)
        return done.returncode, done.stdout + done.stderr

    def engines_last_words(self) -> str:
        """What Ray's workers wrote to standard error at their end."""
        logs = sorted(self.directory.glob("tmp/galerne-*/*/r/session_2*/logs/worker-*.err"))
        return "\n".join(file.read_text(errors="replace")[-1500:] for file in logs)

    def sentences(self, line: str) -> list[str]:
        """Ours, of a command that fails."""
        status, output = self.says(line)
        assert status != 0, output
        assert "Traceback" not in output
        return [said for said in output.splitlines() if said.startswith("galerne: ")]


@pytest.fixture(scope="module", params=sorted(DEBIANS))
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap (apt-get install debootstrap): NO bare machine was tried")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs mount namespaces: NO bare machine was tried")
    directory = tmp_path_factory.mktemp("bare") / request.param
    yield Machine(directory, request.param)
    # Four gigabytes; what was mounted below it went with the processes.
    assert str(directory) not in Path("/proc/mounts").read_text()
    shutil.rmtree(directory)


def apt_line() -> list[str]:
    """The packages that README names."""
    (found,) = re.findall(r"`apt-get install ([a-z0-9+ -]+)`", (ROOT / "README.md").read_text())
    assert isinstance(found, str)
    return found.split()


def test_one_part_after_another_is_missing(machine: Machine) -> None:
    machine.install("make")
    (said,) = machine.sentences("make run")
    assert "there is no Python on this machine" in said
    machine.install("python3")
    said = "\n".join(machine.sentences("make run"))
    assert "apt-get install python3-venv" in said
    assert "apt-get install libnuma1 g++" in said
    assert ("has Python 3.13; Galerne runs on Python 3.11" in said) is (machine.release == "trixie")
    # pip without venv installs uv as well.
    machine.install("python3-pip", "libnuma1")
    status, output = machine.says("make .tools/bin/uv && .tools/bin/uv --version")
    assert status == 0, output
    assert re.search(r"^uv \d+\.\d+", output, re.M)
    machine.as_root("rm -rf /home/alice/galerne/.tools && apt-get -qq purge -y python3-pip")


def test_readmes_two_commands(machine: Machine, tmp_path: Path) -> None:
    machine.install(*apt_line())
    log = tmp_path / "run.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            machine.alice("make run"), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        began_s = time.monotonic()
        while READY not in log.read_text():
            assert time.monotonic() - began_s < RUN_WITHIN_S, log.read_text()[-4000:]
            if process.poll() is not None:
                said = [line for line in log.read_text().splitlines() if line.startswith("galerne: ")]
                _cannot(said, log.read_text() + machine.engines_last_words())
            time.sleep(0.5)
        print(f"\n{machine.release}: make run from nothing took {time.monotonic() - began_s:.0f} s")
        assert "Three" in _line_to_paste(log.read_text())
        assert _answer()["usage"]["completion_tokens"] > 0
        caused = psutil.Process(process.pid).children(recursive=True)
        (serving,) = (p for p in caused if "serve" in p.cmdline() and p.name() == "galerne")
        serving.send_signal(signal.SIGINT)
        process.wait(STOP_WITHIN_S)
        assert "no process and no port is left" in log.read_text()
        assert not [p for p in caused if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.wait()


def _cannot(said: list[str], log: str) -> None:
    """It ended: only where a network here cannot bring a part, and then the last sentence says which, and what to do."""
    assert said, log[-4000:]
    assert NO_PYTORCH in said[-1] or NO_PYTHON in said[-1], log[-4000:]
    assert "Traceback" not in log
    pytest.skip(f"this machine's network does not reach everything, so it did NOT serve; it said: {said[-1]}")


def _line_to_paste(log: str) -> str:
    return log[log.index("curl ") :]


def _answer() -> dict[str, dict[str, int]]:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Name three French cheeses."}],
        "max_tokens": 8,
    }
    asked = urllib.request.Request(
        f"{URL}/v1/chat/completions",
        json.dumps(body).encode(),
        {"authorization": f"Bearer {KEY}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as response:
        found: dict[str, dict[str, int]] = json.loads(response.read())
    return found
