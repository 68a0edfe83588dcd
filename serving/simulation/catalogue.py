"""Finds the trace that a user named: a bundled name, a pool of the ServeGen tables, or a file told by its content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from loadtest.errors import LoadtestError
from loadtest.workloads.draft import SHARED_VARIABLE, data_folder
from loadtest.workloads.servegen import RATES_FILE
from serving.simulation.servegen import is_rates, pools, read_pool
from serving.simulation.traces import MOST_REQUESTS, Trace, part, read_file, scaled

_FILES: Final = {"azure2023_conv": "azure2023_conv.csv", "mooncake_conversation": "mooncake_conversation.jsonl"}
_SERVEGEN: Final = "servegen:"


def find(
    name: str, *, scale: float = 1.0, from_s: float = 0.0, until_s: float = math.inf, most: int = MOST_REQUESTS
) -> Trace:
    """A part of the named trace at `scale` times its rate. Raises LoadtestError that says what is wrong or allowed."""
    if not (scale > 0 and math.isfinite(scale)):
        raise LoadtestError(f"a rate scale of {scale:g}; it must be above 0")
    if not 0 <= from_s < until_s:
        raise LoadtestError(f"from {from_s:g} s until {until_s:g} s is no part of a trace")
    if name.startswith(_SERVEGEN):
        rates, pool = _known(RATES_FILE), name.removeprefix(_SERVEGEN)
        return read_pool(rates, pool, scale=scale, from_s=from_s, until_s=until_s, most=most)
    path = _known(_FILES[name]) if name in _FILES else Path(name)
    if path.is_file():
        if is_rates(path):
            raise LoadtestError(f"{path}: a table of several pools: give one as {path}:POOL ({', '.join(pools(path))})")
        trace = part(read_file(path), from_s, until_s)
        kept = min(1.0, most / (len(trace) * scale))
        return scaled(trace, scale * kept)
    file, colon, pool = name.rpartition(":")
    if colon and Path(file).is_file():
        if not is_rates(Path(file)):
            raise LoadtestError(f"{file}: not a table of rates, so it has no pool {pool!r}")
        return read_pool(Path(file), pool, scale=scale, from_s=from_s, until_s=until_s, most=most)
    rates = data_folder() / RATES_FILE
    if rates.is_file() and name in pools(rates):
        return read_pool(rates, name, scale=scale, from_s=from_s, until_s=until_s, most=most)
    known = [*_FILES, *(f"{_SERVEGEN}{pool}" for pool in (pools(rates) if rates.is_file() else ()))]
    raise LoadtestError(f"{name}: no such file and no known trace; known: {', '.join(known)}, or a FILE, or RATES:POOL")


def _known(file: str) -> Path:
    path = data_folder() / file
    if not path.is_file():
        raise LoadtestError(f"{path}: there is no such file; set {SHARED_VARIABLE} to the folder whose data/ holds it")
    return path
