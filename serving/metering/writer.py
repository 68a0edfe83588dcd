"""`python -m serving.metering.writer`: moves the spill's rows into the database, in a process of its own.

SQLAlchemy with PostgreSQL's driver takes 35 MB and, with every batch, Python's lock for some milliseconds; a gateway
has neither to spare. A gateway starts this beside itself; of several over one spill one works and the others wait.
Standard input brings one line, `{"url": …, "spill_dir": …}`; its end means that the gateway is gone: what lies in the
spill is written once more, and the process ends. What it cannot write stays where it is, for the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from serving.metering.spill import Batch, Spill

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from serving.metering.row import Row

LOCK: Final = "writer.lock"
POLL_S: Final = 0.5
# Behind the gateway and what else computes on its machine; rows are safe where they are.
NICE: Final = 10
# Rows of one transaction, some more where the last file is large.
BATCH_ROWS: Final = 1000
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
STDIN: Final = 0


class Writer:
    """The way from one spill to one database."""

    def __init__(self, spill: Spill, url: str, report: Callable[[str], None]) -> None:
        """`report` hears in a sentence what does not work, never with a password."""
        self._spill = spill
        self._url = url
        self._report = report
        self._engine: Engine | None = None

    def drain(self) -> bool:
        """Write everything that waits; False where the database could not be used."""
        from sqlalchemy import exc

        try:
            # Also with nothing to write: a wrong address is to be heard of before the first request.
            engine = self._ready()
            while batches := self._spill.batches():
                self._write(engine, batches)
        except exc.SQLAlchemyError as error:
            from serving.metering import store

            self._report(f"the ledger's database cannot be used: {type(error).__name__}: {store.reason(error)}")
            return False
        return True

    def close(self) -> None:
        """Let go of the database."""
        if self._engine is not None:
            self._engine.dispose()

    def _write(self, engine: Engine, batches: list[Batch]) -> None:
        from sqlalchemy import exc

        from serving.metering import store

        taken, rows = self._take(batches)
        try:
            with engine.begin() as connection:
                if rows:
                    store.insert(connection, rows)
        except (exc.DataError, exc.IntegrityError):
            self._one_by_one(engine, taken)
            return
        self._spill.remove(taken)

    def _take(self, batches: list[Batch]) -> tuple[list[Batch], list[Row]]:
        taken: list[Batch] = []
        rows: list[Row] = []
        for batch in batches:
            found = self._spill.read(batch)
            if found is None:
                self._report(f"{batch.path.name} holds no rows and was put aside")
                continue
            taken.append(batch)
            rows += found
            if len(rows) >= BATCH_ROWS:
                break
        return taken, rows

    def _one_by_one(self, engine: Engine, batches: list[Batch]) -> None:
        """A row that the database refuses must not keep the others: its batch is put aside, the others go in."""
        from sqlalchemy import exc

        from serving.metering import store

        for batch in batches:
            refused = 0
            for row in self._spill.read(batch) or ():
                try:
                    with engine.begin() as connection:
                        store.insert(connection, [row])
                except (exc.DataError, exc.IntegrityError):
                    refused += 1
            if refused:
                self._report(f"the database refused {refused} rows of {batch.path.name}, which was put aside")
                self._spill.put_aside(batch)
            else:
                self._spill.remove([batch])

    def _ready(self) -> Engine:
        if self._engine is None:
            from serving.metering import schema, store

            engine = store.connect(self._url)
            schema.upgrade(engine)
            self._engine = engine
        return self._engine


def run(spill: Spill, url: str, ended: threading.Event, report: Callable[[str], None]) -> None:
    """Write until `ended` is set, then once more."""
    writer = Writer(spill, url, report)
    pause_s = POLL_S
    try:
        while not ended.is_set():
            longer_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * pause_s))
            pause_s = POLL_S if writer.drain() else longer_s
            ended.wait(pause_s)
        writer.drain()
    finally:
        writer.close()


@contextlib.contextmanager
def only_one(directory: Path, ended: threading.Event) -> Iterator[IO[str]]:
    """Wait for the right to write from this spill, or for the end."""
    with (directory / LOCK).open("w") as lock:
        while not ended.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                ended.wait(1.0)
        yield lock


def _say(sentence: str) -> None:
    print(json.dumps({"event": sentence, "logger": "galerne.ledger", "time": time.time()}), file=sys.stderr, flush=True)


def main() -> int:
    """The process; its exit status."""
    os.nice(NICE)
    settings = json.loads(sys.stdin.readline())
    spill, ended = Spill(Path(settings["spill_dir"])), threading.Event()

    def await_end() -> None:
        while os.read(STDIN, 4096):
            pass
        ended.set()

    threading.Thread(target=await_end, daemon=True).start()
    with only_one(spill.directory, ended):
        run(spill, settings["url"], ended, _say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
