"""A run over several processes: the plan is dealt round robin to workers that start at one time.

The plan is made in full before the run and read back from a file by each worker, so that making it costs nothing while
the clock runs. Records go to a file as they come about: a long run holds none of them in memory.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from loadtest.closed_loop import Users
from loadtest.errors import LoadtestError
from loadtest.plan import PlannedRequest
from loadtest.records import Record
from loadtest.request import Target
from loadtest.self_check import WorkerSample
from loadtest.sender import LoopSettings, Tally
from loadtest.worker import Done, Failed, Progress, Ready, Work, unpickled, work

# Between the last worker's being ready and the run's start.
START_IN_S = 0.3
# How often the caller is told of the progress, at least.
POLL_S = 0.25

_NS = 1e9


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run is carried out."""

    loop: LoopSettings = field(default_factory=LoopSettings)
    # Processes, each on a core of its own at best.
    workers: int = 1
    # A closed loop of so many users over all workers; None for the plan's own times.
    users: Users | None = None
    # The plan's times are divided by it.
    speed: float = 1.0


@dataclass(slots=True)
class RunOutcome:
    """What a run came to."""

    # In the plan's order, one for each planned request.
    records: list[Record]
    samples: list[WorkerSample]
    # Requests that found all connections taken.
    waited: int
    # Ended by hand before its time.
    interrupted: bool
    # The run's zero on this machine's monotonic clock, nanoseconds.
    start_ns: int


@dataclass(slots=True)
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    tally: Tally = field(default_factory=Tally)
    ready: bool = False
    done: Done | None = None


def run(
    planned: Iterable[PlannedRequest],
    target_of: Callable[[str], Target],
    settings: RunSettings,
    on_progress: Callable[[Tally, float], None] = lambda _tally, _now_s: None,
) -> RunOutcome:
    """Send all planned requests from `settings.workers` processes and give every one's record.

    `target_of` gives a tenant's target (TENANT/CLIENT asks for TENANT's). `on_progress` is called some times a second
    with the counts so far and the run's time in seconds. SIGINT and SIGTERM end the run: nothing more is sent, what
    is in flight is cut, and the records are given all the same; the second one raises KeyboardInterrupt.
    Raises LoadtestError for a plan or limits that cannot be, and when a worker died.
    """
    count = settings.workers if settings.users is None else min(settings.workers, settings.users.count)
    if count < 1 or settings.speed <= 0:
        raise LoadtestError(f"{count} workers at speed {settings.speed:g}: both must be more than 0")
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="galerne-loadtest-")))
        total, tenants = _deal(planned, folder, count, settings.speed)
        if not total:
            raise LoadtestError("the plan holds no request; check the scenario's rates and duration")
        targets = {tenant: target_of(tenant) for tenant in sorted(tenants)}
        signals = held.enter_context(_signals())
        workers = [
            held.enter_context(_started(_work(number, folder, targets, settings, count))) for number in range(count)
        ]
        watched = _Run(workers, signals, on_progress)
        watched.follow()
        records = sorted(
            (record for worker in workers for record in _records(folder, worker.number)), key=lambda one: one.index
        )
        expected = total if settings.users is None else sum(worker.done.planned for worker in workers if worker.done)
        _check_all_recorded(records, expected)
        waited = sum(worker.done.waited for worker in workers if worker.done is not None)
        return RunOutcome(records, watched.samples, waited, watched.stopped, watched.start_ns or 0)


class _Run:
    """The parent's side of a run under way."""

    def __init__(self, workers: list[_Worker], signals: list[int], on_progress: Callable[[Tally, float], None]) -> None:
        self._workers = workers
        self._signals = signals
        self._on_progress = on_progress
        self.samples: list[WorkerSample] = []
        self.start_ns: int | None = None
        self.stopped = False

    def follow(self) -> None:
        """Start the workers together, and wait until all are done."""
        while any(worker.done is None for worker in self._workers):
            self._heed_signals()
            if self.start_ns is None and all(worker.ready for worker in self._workers):
                self.start_ns = time.monotonic_ns() + int(START_IN_S * _NS)
                self._tell_all(self.start_ns)
                if self.stopped:
                    self._tell_all(None)
            left = {worker.pipe: worker for worker in self._workers if worker.done is None}
            for pipe in multiprocessing.connection.wait(left, POLL_S):
                self._take(left[pipe])  # type: ignore[index]  # only pipes were waited for
            self._report()

    def _take(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            raise LoadtestError(
                f"worker {worker.number} died (exit code {worker.process.exitcode}); the run has failed: "
                "its requests have no records"
            ) from None
        match message:
            case Ready():
                worker.ready = True
            case Progress(tally, sample):
                worker.tally = tally
                self.samples.append(sample)
            case Done():
                worker.tally, worker.done = message.tally, message
            case Failed(reason):
                raise LoadtestError(reason)

    def _heed_signals(self) -> None:
        if len(self._signals) > 1:
            raise KeyboardInterrupt
        if self._signals and not self.stopped:
            self.stopped = True
            if self.start_ns is not None:
                self._tell_all(None)

    def _tell_all(self, message: int | None) -> None:
        for worker in self._workers:
            if worker.done is None:
                try:
                    worker.pipe.send(message)
                except OSError:
                    continue  # it died, which its own pipe tells next

    def _report(self) -> None:
        if self.start_ns is not None:
            tally = Tally()
            for worker in self._workers:
                tally.add(worker.tally)
            self._on_progress(tally, (time.monotonic_ns() - self.start_ns) / _NS)


def _deal(planned: Iterable[PlannedRequest], folder: Path, count: int, speed: float) -> tuple[int, set[str]]:
    """Write each worker's part; the count of requests, and their tenants."""
    total, tenants = 0, set()
    with ExitStack() as opened:
        files = [opened.enter_context(_plan_file(folder, number).open("wb")) for number in range(count)]
        for index, (request, file) in enumerate(zip(planned, itertools.cycle(files), strict=False)):
            timed = request if speed == 1.0 else replace(request, at_s=request.at_s / speed)
            pickle.dump((index, timed), file, pickle.HIGHEST_PROTOCOL)
            total += 1
            tenants.add(request.tenant.partition("/")[0])
    return total, tenants


def _work(number: int, folder: Path, targets: dict[str, Target], settings: RunSettings, count: int) -> Work:
    users = settings.users
    if users is not None:
        users = replace(users, count=users.count // count + (number < users.count % count))
    return Work(
        number=number,
        plan=_plan_file(folder, number),
        records=_records_file(folder, number),
        targets=targets,
        settings=replace(settings.loop, max_connections=-(-settings.loop.max_connections // count)),
        users=users,
    )


@contextmanager
def _started(own: Work) -> Iterator[_Worker]:
    """A worker process; ended, if need be by force, when the context ends."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(own, theirs), name=f"loadtest-{own.number}", daemon=True)
    # Ctrl-C and the end of a container reach every process of the group. Blocked in the worker from its first
    # instruction on: it ends when it is told to, with its records.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # Only the worker holds the other end, so that its death closes the pipe.
    theirs.close()
    try:
        yield _Worker(own.number, process, pipe)
        process.join(1.0)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        pipe.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked this process to end, in a list that grows; only the main thread can be asked."""
    seen: list[int] = []
    earlier: dict[int, Any] = {}
    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            earlier[wanted] = signal.signal(wanted, lambda got, _frame: seen.append(got))
    except ValueError:
        pass  # not the main thread
    try:
        yield seen
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _check_all_recorded(records: list[Record], planned: int) -> None:
    distinct = len({record.index for record in records})
    if not len(records) == distinct == planned:
        raise LoadtestError(
            f"{planned} requests were planned, and {len(records)} records of {distinct} requests came back: "
            "the load tester itself is at fault"
        )


def _records(folder: Path, number: int) -> Iterator[Record]:
    with _records_file(folder, number).open("rb") as file:
        yield from unpickled(file)


def _plan_file(folder: Path, number: int) -> Path:
    return folder / f"plan-{number}"


def _records_file(folder: Path, number: int) -> Path:
    return folder / f"records-{number}"
