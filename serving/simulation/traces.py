"""Recorded loads as arrays: when requests came and how long they were, millions of them.

The readers of `loadtest.workloads` yield one request at a time with its text; a day of a service has millions and the
simulator reads no text. So what is shared with them is the form of the files and the laws behind the tables, not the
loop. A trace is recognised by what a file holds, not by its name.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from numpy.typing import NDArray

from loadtest.errors import LoadtestError
from loadtest.workloads.azure import _COLUMNS as AZURE_COLUMNS
from serving.simulation.engine import Floats

# A scaled trace repeats each request within so many seconds around its own time: the load's shape on longer scales is
# kept, and below them it is as smooth as many independent users are.
JITTER_S: Final = 5.0
# Requests beyond this many are thinned out, evenly, and the report says so.
MOST_REQUESTS: Final = 12_000_000
# Tokens of one request; more is no request of today's models.
MOST_TOKENS: Final = 4_000_000
_GZIP: Final = b"\x1f\x8b"
_SEED: Final = 20231116


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their coming, seconds from the trace's start."""

    name: str
    at_s: Floats
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    duration_s: float
    # Who asked, where the trace tells; names by number.
    client: NDArray[np.int32] | None = None
    clients: tuple[str, ...] = ()
    # What was done to it that a reader of the result must know.
    notes: tuple[str, ...] = ()
    # Time of day of its start, seconds.
    starts_at_s: float = field(default=0.0)

    def __len__(self) -> int:
        return len(self.at_s)


def open_text(path: Path) -> TextIO:
    """A text file, compressed or not."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    if packed:
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def part(trace: Trace, from_s: float, until_s: float) -> Trace:
    """The requests between two moments, the first of which is the new trace's start."""
    until_s = min(until_s, trace.duration_s)
    if not 0 <= from_s < until_s:
        raise LoadtestError(
            f"{trace.name}: from {from_s:g} s until {until_s:g} s is no part of its {trace.duration_s:g} s"
        )
    first, last = np.searchsorted(trace.at_s, [from_s, until_s])
    if first == last:
        raise LoadtestError(f"{trace.name}: no request between {from_s:g} s and {until_s:g} s")
    return replace(
        trace,
        at_s=trace.at_s[first:last] - from_s,
        prompt_tokens=trace.prompt_tokens[first:last],
        output_tokens=trace.output_tokens[first:last],
        client=None if trace.client is None else trace.client[first:last],
        duration_s=until_s - from_s,
        starts_at_s=trace.starts_at_s + from_s,
    )


def scaled(trace: Trace, factor: float) -> Trace:
    """So many times the requests in the same time: each repeated around its own time, or only some of them kept."""
    if factor == 1:
        return trace
    rng = np.random.default_rng(_SEED)
    whole = math.floor(factor)
    copies = np.full(len(trace), whole) + (rng.random(len(trace)) < factor - whole)
    picked = np.repeat(np.arange(len(trace)), copies)
    at_s = trace.at_s[picked]
    if factor > 1:
        at_s = at_s + rng.uniform(-JITTER_S, JITTER_S, len(at_s))
        # Folded back at both ends.
        at_s = np.abs(at_s)
        last = np.nextafter(trace.duration_s, 0.0)
        at_s = np.where(at_s > last, np.maximum(2 * last - at_s, 0.0), at_s)
    order = np.argsort(at_s, kind="stable")
    picked = picked[order]
    if not len(picked):
        raise LoadtestError(f"{trace.name}: nothing is left of it at {factor:g} times its rate")
    return replace(
        trace,
        at_s=at_s[order],
        prompt_tokens=trace.prompt_tokens[picked],
        output_tokens=trace.output_tokens[picked],
        client=None if trace.client is None else trace.client[picked],
        notes=(*trace.notes, f"at {factor:g} times its rate"),
    )


def read_file(path: Path) -> Trace:
    """An Azure CSV or a Mooncake JSONL, told by its first line. Raises LoadtestError with the line that is wrong."""
    try:
        with open_text(path) as file:
            first = file.readline()
        if first.lstrip().startswith("{"):
            trace = _mooncake(path)
        elif set(AZURE_COLUMNS) <= {name.strip() for name in first.split(",")}:
            trace = _azure(path)
        else:
            raise LoadtestError(
                f"{path}: not a trace that is known: needs the columns {', '.join(AZURE_COLUMNS)} (Azure), lines of "
                "JSON with timestamp, input_length and output_length (Mooncake), or rates of ServeGen as FILE:POOL"
            )
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LoadtestError(f"{path}: cannot be read: {error}") from error
    return trace


def from_rows(name: str, rows: Iterator[tuple[float, int, int]], where: Path) -> Trace:
    """A trace of (seconds, prompt, output), which need not ascend. Raises LoadtestError where there is none."""
    table = np.array(list(rows), dtype=np.float64).reshape(-1, 3)
    if not len(table):
        raise LoadtestError(f"{where}: holds no request")
    table = table[np.argsort(table[:, 0], kind="stable")]
    at_s = np.ascontiguousarray(table[:, 0] - table[0, 0])
    lengths = np.clip(table[:, 1:], 1, MOST_TOKENS).astype(np.int32)
    return Trace(
        name=name,
        at_s=at_s,
        prompt_tokens=np.ascontiguousarray(lengths[:, 0]),
        output_tokens=np.ascontiguousarray(lengths[:, 1]),
        duration_s=float(at_s[-1]) + 1e-6,
    )


def _azure(path: Path) -> Trace:
    def rows() -> Iterator[tuple[float, int, int]]:
        with open_text(path) as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            for row in reader:
                try:
                    moment = np.datetime64(_plain(row["TIMESTAMP"]), "ns").astype(np.int64)
                    yield float(moment - base) / 1e9, int(row["ContextTokens"]), int(row["GeneratedTokens"])
                except (TypeError, ValueError) as error:
                    raise LoadtestError(f"{path}:{reader.line_num}: not a row of this trace: {error}") from error

    with open_text(path) as file:
        first = next(csv.DictReader(file, skipinitialspace=True), None)
    try:
        # Subtracted before it becomes a float: nanoseconds since 1970 are more than one holds.
        base = int(np.datetime64(_plain(first["TIMESTAMP"]), "ns").astype(np.int64)) if first else 0
    except (TypeError, ValueError) as error:
        raise LoadtestError(f"{path}:2: not a row of this trace: {error}") from error
    trace = from_rows(path.stem, rows(), path)
    return replace(trace, starts_at_s=base / 1e9 % 86400)


def _plain(moment: Any) -> str:
    """A timestamp as numpy reads it: no zone (2024's Azure traces end in +00:00)."""
    return str(moment).strip().removesuffix("Z").removesuffix("+00:00").replace(" ", "T")


def _mooncake(path: Path) -> Trace:
    def rows() -> Iterator[tuple[float, int, int]]:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                    at_s = float(value["timestamp"]) / 1000
                    if not math.isfinite(at_s):
                        raise ValueError("a timestamp that is no number")  # noqa: TRY301  # with the file's line below
                    yield at_s, int(value["input_length"]), int(value["output_length"])
                except (KeyError, TypeError, ValueError) as error:
                    raise LoadtestError(f"{path}:{number}: not a line of this trace: {error!r}") from error

    return from_rows(path.stem, rows(), path)
