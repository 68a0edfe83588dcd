"""docs/operate.md: each of its commands is run, and prints what stands there.

GALERNE_WRITE_DOCS=1 writes what they print today into the document.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from serving.cli.cluster import app
from tests.unit.kubernetes.release import VALUES, Run, being_removed, operate, populate
from tests.unit.kubernetes.server import ApiServer
from tests.unit.kubernetes.shared import ROOT

DOCUMENT = ROOT / "docs" / "operate.md"
BLOCK = re.compile(r"```console\n\$ galerne cluster ([^\n]*)\n(.*?)```", re.DOTALL)
ADDRESS = "https://kubernetes.example"
CONFIG = """\
listen: {host: 0.0.0.0}
models: [{id: m-v1.5, source: "path:/models/m-2", resources: {accelerator: gpu}}]
tenants: [{id: press, keys: [{id: k, sha256: "%s"}]}]
""" % ("0" * 64)


@pytest.fixture
def shown(
    server: ApiServer, kubeconfig: Path, tmp_path: Path, galerne: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[int, str]]:
    """Exit code and everything printed, in order; the address is the document's."""
    populate(server)
    operate(server, monkeypatch)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.chdir(tmp_path)
    # The document's example: a class that the cluster has not, and an image without a registry.
    values = {**VALUES, "redis": {"storageClass": "fast"}, "image": {"repository": "galerne/galerne"}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "galerne-2.yaml").write_text(CONFIG)

    def run(line: str) -> tuple[int, str]:
        if line.startswith("free"):
            being_removed(server)
        monkeypatch.setattr(sys, "stderr", sys.stdout)  # in the order in which a terminal would show them
        code, out, err = galerne(*shlex.split(line))
        return code, (out + err).replace(server.url, ADDRESS)

    return run


def settled(text: str) -> list[str]:
    """Lines without what differs from run to run: widths, sizes, digits of names made up by chance."""
    lines = (re.sub(r"\d+ bytes", "N bytes", " ".join(line.split())) for line in text.splitlines())
    return [re.sub(r"[─━┏┓┗┛┡┩┃│└┘┴┬┼┳╇╈ ]+", " ", line).strip() for line in lines if line.strip("─━┏┓┗┛┡┩┃│└┘┴┬┼┳╇ ")]


def test_every_command_prints_what_the_document_says(shown: Callable[[str], tuple[int, str]]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) >= 7
    write = os.environ.get("GALERNE_WRITE_DOCS") == "1"
    for line, printed in blocks:
        code, out = shown(line)
        out = "\n".join(part.rstrip() for part in out.strip("\n").splitlines())
        if write:
            text = text.replace(
                f"```console\n$ galerne cluster {line}\n{printed}```",
                f"```console\n$ galerne cluster {line}\n{out}\n[exit code {code}]\n```",
            )
        else:
            assert settled(printed) == settled(f"{out}\n[exit code {code}]"), line
    if write:
        DOCUMENT.write_text(text, encoding="utf-8")


def test_every_command_is_in_it() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        assert f"galerne cluster {name}" in text, name
