"""The unit for systemd says what the service needs of a supervisor, in words that systemd knows."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.cli.lifecycle import STOP_WAIT_S
from serving.cluster.processes import TERM_WAIT_S

UNIT = Path(__file__).parents[2] / "deployments" / "systemd" / "galerne.service"


def service() -> configparser.SectionProxy:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[method-assign,assignment]
    parsed.read(UNIT)
    return parsed["Service"]


def test_systemd_understands_it(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed, so systemd was NOT asked")
    # The program that it names is not installed on this machine: this one is.
    program = Path(sys.executable).with_name("galerne")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/galerne/.venv/bin/galerne", str(program)))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_starts_again_whatever_ended_but_not_what_cannot_be_used() -> None:
    found = service()
    assert found["Restart"] == "always"
    # What a configuration that is refused ends with: tests/integration/test_fake_cluster.py.
    assert found["RestartPreventExitStatus"] == "2"
    assert found["KillMode"] == "mixed"


def test_an_orderly_stop_is_not_cut_off() -> None:
    assert int(service()["TimeoutStopSec"]) >= 2 * (STOP_WAIT_S + TERM_WAIT_S)


def test_what_is_written_may_be_written() -> None:
    writable = service()["ReadWritePaths"].split()
    # `galerne serve` keeps its state below the first, what engines compile below the second, Ray's store in the third.
    assert writable == ["/tmp", "/var/tmp", "/dev/shm"]
    assert "PrivateTmp" not in service()
