"""The gateway's side of the ledger: rows into the spill, off the event loop, and a writer that empties it.

Promises: a row that was given `flush_s` ago is on the disk, whatever ends the process; nothing of it waits for a
database; memory is bounded by `PENDING_ROWS`, the disk by `spill_bytes`, and a row that is lost to either bound is
counted and logged. Rows enter the spill twice in a `flush_s`, which leaves the other half to those who ask an engine
first (serving.api.billing).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from serving.metering.row import Row
from serving.metering.settings import LedgerSettings
from serving.metering.spill import Batch, Spill

WRITER: Final = ("-m", "serving.metering.writer")
# Between two flushes, and while the disk cannot be written: some 50 MB.
PENDING_ROWS: Final = 100_000
RESTART_S: Final = 5.0
# From the spill to the database: the writer's look, and a commit.
WRITTEN_S: Final = 2.0
STOP_S: Final = 5.0
# A fault that goes on is logged once in so long.
REPEAT_S: Final = 60.0

log = structlog.get_logger("galerne.ledger")


@dataclass(frozen=True, slots=True)
class LedgerState:
    """As it was at the last flush. `lag_s`: age of the oldest row that is not in the database."""

    spilled: int = 0
    dropped: int = 0
    behind: int = 0
    behind_bytes: int = 0
    lag_s: float = 0.0


class Ledger:
    """Takes rows from one event loop and writes them from a thread of its own."""

    def __init__(
        self,
        settings: LedgerSettings,
        gateway_id: str,
        *,
        now: Callable[[], float] = time.time,
        program: Sequence[str] | None = WRITER,
        stop_s: float = STOP_S,
    ) -> None:
        """`gateway_id`: unique among all gateways that ever were. `program` None: somebody else empties the spill.

        `stop_s`: what the writer has at the end to put into the database what is pending; the rest stays in the spill.
        """
        self.gateway_id = gateway_id
        self.flush_s = settings.flush_s
        self.settings = settings
        self._spill = Spill(settings.spill_dir)
        self._now = now
        self._program = program
        self._stop_s = stop_s
        # Appended to by the event loop, emptied by the thread: each is one step that nothing comes between.
        self._pending: deque[Row] = deque()
        self._files = 0
        self._full = False
        self._state = LedgerState()
        self._dropped = 0  # by the event loop alone
        self._dropped_full = 0  # by the thread alone
        self._said_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._writer: subprocess.Popen[bytes] | None = None
        self._writer_started_s = 0.0

    def start(self) -> None:
        """Begin to write."""
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def record(self, row: Row) -> None:
        """Take one row; returns at once."""
        pending = self._pending
        if len(pending) < PENDING_ROWS:
            pending.append(row)
        else:
            self._dropped += 1

    @property
    def lag_s(self) -> float:
        """So long after a request's end its row is in the database, where nothing is behind."""
        return self.flush_s + WRITTEN_S

    def state(self) -> LedgerState:
        """The state of the last flush, for metrics."""
        return self._state

    def close(self) -> None:
        """Write what is pending, give the writer a moment to put it into the database, and end."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * self._stop_s)
            self._thread = None

    def _run(self) -> None:
        while not self._ended.wait(self.settings.flush_s / 2):
            self._tick()
        self._tick()
        self._stop_writer()

    def _tick(self) -> None:
        try:
            self.flush()
            self._keep_writer()
        except Exception:
            # The thread is all that stands between rows and their loss: it goes on.
            self._complain("a flush of the ledger failed", exc_info=True)

    def flush(self) -> None:
        """Put what is pending on the disk, and look at what lies there."""
        rows = [self._pending.popleft() for _ in range(len(self._pending))]
        if rows and not self._full:
            try:
                self._files += 1
                self._spill.write(rows, f"{self.gateway_id}-{self._files}", self._now())
                self._state = _counted(self._state, spilled=len(rows))
            except OSError as error:
                self._complain("the ledger's spill cannot be written; rows wait in memory", reason=error.strerror)
                # Rows that came meanwhile stand behind these.
                self._pending.extendleft(reversed(rows))
        elif rows:
            self._dropped_full += len(rows)
            self._complain("the ledger's spill is full: usage is LOST", rows=self._dropped_full)
        self._look(self._spill.batches())

    def _look(self, batches: list[Batch]) -> None:
        size = sum(batch.size_bytes for batch in batches)
        self._full = size >= self.settings.spill_bytes
        if self._dropped:
            self._complain("too many rows of usage wait in memory: usage is LOST", rows=self._dropped)
        self._state = LedgerState(
            spilled=self._state.spilled,
            dropped=self._dropped + self._dropped_full,
            behind=sum(batch.rows for batch in batches) + len(self._pending),
            behind_bytes=size,
            lag_s=max(0.0, self._now() - batches[0].written_s) if batches else 0.0,
        )

    def _complain(self, event: str, **facts: object) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s >= REPEAT_S or not self._said_s:
            self._said_s = now_s
            log.error(event, directory=str(self._spill.directory), **facts)

    def _keep_writer(self) -> None:
        if self._program is None or (self._writer is not None and self._writer.poll() is None):
            return
        now_s = time.monotonic()
        if self._writer is not None:
            if now_s - self._writer_started_s < RESTART_S:
                return
            log.error("the ledger's writer ended and is started again", status=self._writer.returncode)
        self._writer_started_s = now_s
        self._writer = subprocess.Popen(  # noqa: S603 - this interpreter, a constant program
            [sys.executable, *self._program], stdin=subprocess.PIPE, start_new_session=True
        )
        told = {"url": self.settings.url, "spill_dir": str(self.settings.spill_dir)}
        if self._writer.stdin is not None:
            # The pipe stays open: its end tells the writer that this gateway is gone.
            self._writer.stdin.write(json.dumps(told).encode() + b"\n")
            self._writer.stdin.flush()

    def _stop_writer(self) -> None:
        if self._writer is None:
            return
        if self._writer.stdin is not None:
            self._writer.stdin.close()
        try:
            self._writer.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            # What it did not write stays in the spill.
            self._writer.kill()
            self._writer.wait()


def _counted(state: LedgerState, *, spilled: int) -> LedgerState:
    return LedgerState(state.spilled + spilled, state.dropped, state.behind, state.behind_bytes, state.lag_s)
