"""Rows on their way to the database, on local disk: a directory of small files that are whole or not there.

A gateway writes what it finished in the last moment as one file, flushed to the disk before it gets its name, and
looks no further; a writer puts files into the database, oldest first, and removes those that are in it. Any writer may
take any file, because rows have unique ids: what a gateway that was killed left behind is taken up by whoever comes
next, and a file that was written twice does no harm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from serving.metering.row import Row

SUFFIX: Final = ".rows"
# What cannot be read as rows is put aside under this name for a person to look at.
BAD_SUFFIX: Final = ".bad"
TEMPORARY: Final = ".new"
# What a file takes on disk at least; many of them are small.
BLOCK_BYTES: Final = 4096

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Row)


@dataclass(frozen=True, slots=True)
class Batch:
    """One file: when it was written (seconds since 1970), how many rows it holds, what it takes on disk."""

    path: Path
    written_s: float
    rows: int
    size_bytes: int


class Spill:
    """The directory; created for this user alone."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory

    def write(self, rows: Sequence[Row], name: str, now_s: float) -> Batch:
        """Write one batch and return when it is on the disk; raises OSError. `name` is unique."""
        data = b"\n".join(map(_encoder.encode, rows)) + b"\n"
        path = self.directory / f"{int(now_s * 1000):015d}-{len(rows)}-{name}{SUFFIX}"
        temporary = path.with_suffix(TEMPORARY)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._sync()
        return Batch(path, now_s, len(rows), _on_disk(len(data)))

    def batches(self) -> list[Batch]:
        """Every batch that waits, oldest first."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError, ValueError):  # another writer was quicker
                        written, rows, _ = entry.name.split("-", 2)
                        size = _on_disk(entry.stat().st_size)
                        found.append(Batch(Path(entry.path), int(written) / 1000, int(rows), size))
        found.sort(key=lambda batch: batch.path.name)
        return found

    def read(self, batch: Batch) -> list[Row] | None:
        """Its rows; none where another writer was quicker. None: it was put aside, because it holds no rows."""
        try:
            lines = batch.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        try:
            return [_decoder.decode(line) for line in lines]
        except msgspec.DecodeError:
            self.put_aside(batch)
            return None

    def put_aside(self, batch: Batch) -> None:
        """Keep what no database takes under another name, for a person to look at."""
        with contextlib.suppress(FileNotFoundError):
            batch.path.rename(batch.path.with_suffix(BAD_SUFFIX))

    def remove(self, batches: Iterable[Batch]) -> None:
        """Forget batches whose rows are in the database."""
        for batch in batches:
            batch.path.unlink(missing_ok=True)

    def _sync(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _on_disk(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
