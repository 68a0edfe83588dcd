"""Takes tenants and keys from the configuration file while requests run.

The file's content is compared every two seconds. Content, not time stamps or notifications: a Secret that the kubelet
swaps by a symlink, a file on NFS and one that an editor replaces look the same. A change counts once it has stood
still for half a second, so that a file half written is never half a list of tenants. So a change is in force in every
gateway within 3 s of its end, on a cluster after the kubelet has brought it (a minute or so).

Promises: tenants and administrators change all at once or not at all; a file that cannot be used leaves everything as
it is, and says why with file and line; no request under way is touched; nothing is read on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

import structlog

from serving.config import GalerneConfig, Source
from serving.config.live import with_live
from serving.config_file import MAX_FILE_BYTES, load, parts
from serving.errors import ConfigError

POLL_S: Final = 2.0
SETTLE_S: Final = 0.5
REVISION_DIGITS: Final = 12

log = structlog.get_logger("galerne.reload")


class Told(Protocol):
    """What the metrics are told."""

    def config_applied(self, revision: str, at_s: float) -> None:
        """This revision of the file is in force."""

    def config_failed(self) -> None:
        """The file as it is now cannot be used."""

    def config_restored(self) -> None:
        """The file is again what is in force."""

    def config_waiting(self, sections: int) -> None:
        """So many sections of the file wait for a restart."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The file as it was found: what is in it, or what is wrong with it."""

    revision: str
    config: GalerneConfig | None
    problems: tuple[str, ...] = ()


class Reloader:
    """Follows one file; one per gateway."""

    def __init__(
        self,
        source: Source,
        running: GalerneConfig,
        apply: Callable[[GalerneConfig], None],
        told: Told,
        *,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`apply` takes a whole configuration, on the caller's thread of `take`; it must apply all of it or raise."""
        self._source = source
        self._running = running
        self._apply = apply
        self._told = told
        self._wall = wall
        self._pause = pause
        self._path = Path(source.path)
        self._parts: tuple[Path, ...] = (self._path,)
        self._seen = ""
        self._applied = ""

    def start(self) -> None:
        """Take the file as it is, before the first request: it may be newer than what this process was given."""
        self._parts = self._parts_of(self._running)
        found = self._read(_digest(self._parts))
        if found is not None:
            self.take(found)

    async def run(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Follow the file until cancelled."""
        while True:
            await sleep(POLL_S)
            try:
                found = await asyncio.to_thread(self.look)
                if found is not None:
                    self.take(found)
            except Exception:
                # Whatever it is, the next change must not be missed for it.
                log.exception("the configuration was not reloaded")
                self._told.config_failed()

    def look(self) -> Seen | None:
        """What is new in the file; None: nothing, or it is being written. Blocks; what is served stays as it is."""
        revision = _digest(self._parts)
        if revision == self._seen:
            return None
        self._pause(SETTLE_S)
        return self._read(revision)

    def take(self, found: Seen) -> None:
        """Put what was found in force, or tell what is wrong with it."""
        self._seen = found.revision
        if found.config is None:
            self._told.config_failed()
            log.error("the configuration stays as it was", revision=found.revision, problems=list(found.problems))
            return
        if found.revision == self._applied:
            self._told.config_restored()
            log.info("the file is again what is in force", revision=found.revision)
            return
        newer = with_live(self._running, found.config)
        self._apply(newer)
        self._running = newer
        self._applied = found.revision
        self._told.config_applied(found.revision, self._wall())
        waiting = self._source.waiting(found.config)
        self._told.config_waiting(len(waiting))
        log.info("the configuration is in force", revision=found.revision, tenants=len(newer.tenants))
        if waiting:
            log.warning("these sections wait for a restart or a rollout", sections=list(waiting))

    def _read(self, revision: str) -> Seen | None:
        try:
            config = load(self._path)
        except ConfigError as error:
            found = Seen(revision, None, error.problems)
        else:
            found = Seen(revision, config)
            if (named := self._parts_of(config)) != self._parts:
                # Another file of tenants than was looked at: look again, at that one.
                self._parts = named
                return None
        return found if _digest(self._parts) == revision else None

    def _parts_of(self, config: GalerneConfig) -> tuple[Path, ...]:
        return parts(self._path, config.tenants_file)


def _digest(paths: tuple[Path, ...]) -> str:
    """What tells one state of the files from another; a file that is not there is a state too."""
    found = sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError:
            content = b"\0"  # no YAML file holds it
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()[:REVISION_DIGITS]
