"""One worker process of a run: sends its part of the plan, and watches itself while it does."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import uvloop

from loadtest.closed_loop import ClosedLoop, Users
from loadtest.errors import LoadtestError
from loadtest.limits import raise_open_files
from loadtest.open_loop import OpenLoop
from loadtest.request import Target
from loadtest.self_check import WorkerSample
from loadtest.sender import LoopSettings, Sender, Tally

# How often the event loop's lag is looked at, and how often a sample is told.
TICK_S = 0.02
SAMPLE_S = 1.0

# Collections that walk through everything would be pauses that the target did not make; the objects of a request
# are almost all freed without one.
_GC_THRESHOLDS = (50_000, 50, 1_000)
_NS = 1e9


@dataclass(frozen=True, slots=True)
class Work:
    """One worker's part. Goes to it over a pipe: keys are neither in a file nor on a command line."""

    number: int
    # Pickled (index, request), ascending in time.
    plan: Path
    # Where the records go.
    records: Path
    # By tenant.
    targets: Mapping[str, Target]
    settings: LoopSettings
    users: Users | None


# What a worker tells its parent. The parent answers Ready with the run's start (monotonic clock, nanoseconds), and
# ends the run with None.


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is imported and allowed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """About every second."""

    tally: Tally
    sample: WorkerSample


@dataclass(frozen=True, slots=True)
class Done:
    """All records are written."""

    tally: Tally
    planned: int
    waited: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The run cannot be."""

    reason: str


def work(own: Work, pipe: Connection) -> None:
    """The process's whole life; never raises for what a user can do wrong."""
    try:
        raise_open_files(own.settings.max_connections * len(own.targets))
        pipe.send(Ready())
        start_ns: int = pipe.recv()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        pipe.send(uvloop.run(_work(own, pipe, start_ns)))
    except LoadtestError as problem:
        pipe.send(Failed(str(problem)))
    except (EOFError, BrokenPipeError):
        # The parent is gone, and with it whoever wanted the records.
        os._exit(1)


async def _work(own: Work, pipe: Connection, start_ns: int) -> Done:
    with own.plan.open("rb") as plan, own.records.open("wb") as records:
        sender = Sender(
            own.targets,
            own.settings,
            lambda record: pickle.dump(record, records, pickle.HIGHEST_PROTOCOL),
            start_ns=start_ns,
        )
        part = OpenLoop(sender) if own.users is None else ClosedLoop(sender, own.users)
        asyncio.get_running_loop().add_reader(pipe.fileno(), _heed, pipe, part)
        watching = asyncio.create_task(_watch(own.number, sender, pipe))
        try:
            planned = await part.run(unpickled(plan))
        finally:
            watching.cancel()
            asyncio.get_running_loop().remove_reader(pipe.fileno())
        return Done(sender.tally(), planned, sender.waited)


def _heed(pipe: Connection, part: OpenLoop | ClosedLoop) -> None:
    try:
        pipe.recv()
    except EOFError:
        os._exit(1)
    part.stop()


async def _watch(number: int, sender: Sender, pipe: Connection) -> None:
    """Tell the parent every second how things are."""
    begin_s, cpu_s = time.monotonic(), time.process_time()
    lags_s: list[float] = []
    tick_s = begin_s + TICK_S
    while True:
        await asyncio.sleep(max(0.0, tick_s - time.monotonic()))
        now_s = time.monotonic()
        # Every tick that a stall covers has its own lag: a stall weighs by its length, not as one late tick.
        while tick_s <= now_s:
            lags_s.append(now_s - tick_s)
            tick_s += TICK_S
        if now_s - begin_s >= SAMPLE_S:
            used_s = time.process_time() - cpu_s
            sample = WorkerSample(number, sender.now_s(), used_s / (now_s - begin_s), tuple(lags_s))
            pipe.send(Progress(sender.tally(), sample))
            begin_s, cpu_s, lags_s = now_s, cpu_s + used_s, []


def unpickled(file: BinaryIO) -> Iterator[Any]:
    """All objects of a file of this run, one at a time."""
    while True:
        try:
            yield pickle.load(file)  # noqa: S301  # a file of this run, in a folder that only we can read
        except EOFError:
            return
