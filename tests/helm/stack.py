"""The stack's chart with its dependencies: stand-ins of the same names and versions, from a repository on this machine.

The charts themselves are not here, because nothing is fetched in a test; a stand-in renders what it was told, so that tests
see what reaches each of them. What the real charts make of it was looked at when their versions were pinned.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.helm.rendering import NAMESPACE, RELEASE, ROOT, Ran, helm

STACK = ROOT / "helm" / "galerne-stack"
TOLD = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: told-{{ .Chart.Name }}
data:
  values: |
    {{- toYaml .Values | nindent 4 }}
"""


def pinned() -> dict[str, dict[str, Any]]:
    """The stack's dependencies by name."""
    return {part["name"]: part for part in yaml.safe_load((STACK / "Chart.yaml").read_text())["dependencies"]}


def aliases() -> set[str]:
    """Names of the repositories that `helm repo add` has to give an address."""
    return {part["repository"][1:] for part in pinned().values() if part["repository"].startswith("@")}


@contextlib.contextmanager
def repository(directory: Path, also: dict[str, str] | None = None) -> Iterator[str]:
    """Address of a repository that has a stand-in for each dependency, and for `also` (versions by chart)."""
    wanted = {name: part["version"] for name, part in pinned().items() if part["repository"].startswith("@")}
    served = directory / "served"
    for name, version in (wanted | (also or {})).items():
        chart = directory / "stand-ins" / name
        (chart / "templates").mkdir(parents=True)
        (chart / "Chart.yaml").write_text(yaml.safe_dump({"apiVersion": "v2", "name": name, "version": version}))
        (chart / "templates" / "told.yaml").write_text(TOLD)
        ran = helm("helm4", "package", str(chart), "--destination", str(served))
        assert ran.status == 0, ran.err
    handler = functools.partial(_Quiet, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        ran = helm("helm4", "repo", "index", str(served), "--url", url)
        assert ran.status == 0, ran.err
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


def checkout(directory: Path) -> Path:
    """A copy of the charts, into which dependencies may be built; the stack's directory."""
    for name in ("galerne", "galerne-stack"):
        leave = shutil.ignore_patterns("charts", "Chart.lock")
        shutil.copytree(ROOT / "helm" / name, directory / name, ignore=leave)
    return directory / "galerne-stack"


def built(line: str, directory: Path, url: str) -> Path:
    """The stack with its dependencies, as a helm line fetches them through the aliases."""
    home = directory / "home"
    stack = checkout(directory)
    for alias in sorted(aliases()):
        ran = helm(line, "repo", "add", alias, url, home=home)
        assert ran.status == 0, ran.err
    ran = helm(line, "dependency", "build", str(stack), home=home)
    assert ran.status == 0, ran.err
    return stack


def render(line: str, stack: Path, values: str, *args: str) -> Ran:
    """`helm template` of the stack with one of its values files."""
    where = ("--namespace", NAMESPACE, "--values", str(stack / "ci" / values))
    return helm(line, "template", RELEASE, str(stack), *where, *args)
