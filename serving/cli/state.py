"""What a running cluster tells other commands on the same machine: one JSON file, replaced atomically.

It is the only link between `galerne serve` and `galerne status`, benchmarks and Prometheus' file-based discovery:
no socket, no Ray client. It lies in a directory only its user may read, because it holds the engine token.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serving.errors import ClusterError
from serving.metrics import targets

ROOT = Path("/tmp")  # noqa: S108 - what lies there belongs to this user alone: `make_private`
STATE_FILE = "cluster.json"
TARGETS_FILE = "prometheus-targets.json"


@dataclass(frozen=True, slots=True)
class EngineState:
    """One running engine replica."""

    replica_id: str
    host: str
    port: int
    pid: int


@dataclass(frozen=True, slots=True)
class GatewayState:
    """One running gateway replica."""

    replica_id: str
    pid: int
    metrics_port: int


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The cluster as it is now; a change of replicas writes it anew."""

    url: str
    pid: int
    engine_token: str
    haproxy_metrics_port: int
    models: Mapping[str, str]  # id -> task
    gateways: tuple[GatewayState, ...] = ()
    engines: Mapping[str, tuple[EngineState, ...]] = field(default_factory=dict)
    haproxy_pids: tuple[int, ...] = ()
    prometheus_url: str | None = None
    # 0: no model's replicas follow its load.
    autoscaler_port: int = 0
    # The configuration's `release`.
    release: str = ""

    def document(self) -> dict[str, Any]:
        """The file's content; `pids` groups processes for measurements."""
        pids = {
            "gateway": [g.pid for g in self.gateways],
            "engine": [e.pid for replicas in self.engines.values() for e in replicas],
            "haproxy": list(self.haproxy_pids),
        }
        return asdict(self) | {"pids": pids}

    def prometheus_targets(self) -> list[dict[str, Any]]:
        """Every endpoint to scrape, in Prometheus' file_sd form."""
        host, name = "127.0.0.1", self.release
        rows = [targets.gateway_row(host, g.metrics_port, name) for g in self.gateways if g.metrics_port]
        rows += [
            targets.engine_row(e.host, e.port, model, e.replica_id, name)
            for model, engines in self.engines.items()
            for e in engines
        ]
        rows.append(targets.row(host, self.haproxy_metrics_port, targets.HAPROXY_JOB, name))
        if self.autoscaler_port:
            rows.append(targets.row(host, self.autoscaler_port, targets.AUTOSCALER_JOB, name))
        return rows


def state_dir(port: int) -> Path:
    """Directory of the cluster listening on `port`; a short path, because sockets lie in it."""
    return ROOT / f"galerne-{os.getuid()}" / str(port)


def make_private(directory: Path) -> None:
    """Create it for this user alone; raises ClusterError where it, or what it lies in, is somebody else's or a link."""
    for path in (directory.parent, directory):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700, parents=True)
        try:
            # Whoever puts a link of that name there would choose whose directory is changed and used.
            opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise ClusterError(f"{path} is not a directory of its own ({error.strerror}); have it removed") from error
        try:
            if os.fstat(opened).st_uid != os.getuid():
                raise ClusterError(f"{path} belongs to another user; have it removed")
            os.fchmod(opened, 0o700)
        finally:
            os.close(opened)


def write(directory: Path, state: ClusterState, ready_file: Path | None = None) -> None:
    """Replace the state and the scrape targets; `ready_file` gets a copy of the state."""
    write_targets(directory, state)
    _replace(directory / STATE_FILE, state.document())
    if ready_file is not None:
        _replace(ready_file, state.document())


def write_targets(directory: Path, state: ClusterState) -> None:
    """Replace the scrape targets alone: they are scraped before every model is ready."""
    _replace(directory / TARGETS_FILE, state.prometheus_targets())


def read(directory: Path) -> dict[str, Any]:
    """The state of the cluster of this directory; raises ClusterError where none runs."""
    try:
        document: dict[str, Any] = json.loads((directory / STATE_FILE).read_text())
    except (OSError, ValueError):
        raise ClusterError(
            f"no cluster of this user is running on port {directory.name}; start one with `galerne serve`"
        ) from None
    if not Path(f"/proc/{document['pid']}").exists():
        raise ClusterError(f"the cluster on port {directory.name} has ended; start it with `galerne serve`")
    return document


def _replace(path: Path, content: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=1)
    temporary.replace(path)
