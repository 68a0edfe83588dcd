"""ServeGen's clients as arrays: millions of requests drawn from a pool's tables in seconds.

The laws are those of `loadtest.workloads.servegen`: for each client and ten minutes a rate and a CV of gamma gaps, the
first from the equilibrium distribution, lengths on straight lines between the known quantiles. A pool beyond the number
of requests that is worth simulating is thinned as if each request were kept with one probability p: a rate becomes p
times itself and a squared CV becomes 1 - p + p CV², so a client that came in bursts still does, as far as its fewer
requests can show it.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np

from loadtest.errors import LoadtestError
from loadtest.workloads.servegen import _LEVELS, LENGTHS_FILE, RATES_FILE, WINDOW_S
from serving.simulation.engine import Floats
from serving.simulation.traces import MOST_REQUESTS, Trace, open_text

_RATE_COLUMNS: Final = ("pool", "client", "t_s", "rate_rps", "cv")
_SEED: Final = 1
_LEVELS_KNOWN: Final = np.array(tuple(_LEVELS.values()))
_CLOCK_CV: Final = 1e-4


def is_rates(path: Path) -> bool:
    """Whether a file is a table of rates."""
    try:
        with open_text(path) as file:
            first = file.readline()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LoadtestError(f"{path}: cannot be read: {error}") from error
    return set(_RATE_COLUMNS) <= {name.strip() for name in first.split(",")}


def pools(path: Path) -> list[str]:
    """The pools of a table of rates."""
    return sorted({row["pool"] for row in _rows(path)})


def read_pool(
    rates: Path, pool: str, *, scale: float, from_s: float, until_s: float, most: int = MOST_REQUESTS
) -> Trace:
    """A part of a pool at `scale` times its rate, thinned to about `most` requests. Raises LoadtestError."""
    try:
        rows = _windows(rates, pool, from_s, until_s)
        quantiles, without = _quantiles(rates.parent / rates.name.replace(RATES_FILE, LENGTHS_FILE), pool)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadtestError(f"{rates}: not a table of rates: {error!r}") from error
    expected = float(rows[:, 2].sum()) * WINDOW_S * scale
    kept = min(1.0, most / expected) if expected else 1.0
    numbers = sorted({int(client) for client in rows[:, 0]})
    index = {client: i for i, client in enumerate(numbers)}
    unknown = [client for client in numbers if client not in quantiles]
    prompts = np.array([quantiles.get(client, without)["input_tokens"] for client in numbers])
    outputs = np.array([quantiles.get(client, without)["output_tokens"] for client in numbers])
    rows[:, 0] = [index[int(client)] for client in rows[:, 0]]
    rows[:, 2] *= scale * kept
    thinned = min(1.0, scale * kept)
    rows[:, 3] = np.sqrt(np.maximum(0.0, 1 - thinned + thinned * rows[:, 3] ** 2))
    start_s = max(from_s, float(rows[:, 1].min()))
    end_s = min(until_s, float(rows[:, 1].max()) + WINDOW_S)
    room = int(rows[:, 2].sum() * WINDOW_S * 1.2) + 10_000
    at_s, client, n = _drawn(rows, room, _SEED, WINDOW_S)
    at_s, client = at_s[:n], client[:n]
    inside = (at_s >= start_s) & (at_s < end_s)
    at_s, client = at_s[inside] - start_s, client[inside]
    order = np.argsort(at_s, kind="stable")
    at_s, client = at_s[order], client[order]
    if not len(at_s):
        raise LoadtestError(f"{rates}: pool {pool} has no request between {from_s:g} s and {until_s:g} s")
    rng = np.random.default_rng(_SEED)
    notes = []
    if scale != 1:
        notes.append(f"at {scale:g} times its rate")
    if kept < 1:
        notes.append(
            f"THINNED evenly to {kept:.3%} of its requests ({len(at_s):,} of about {expected:,.0f}): "
            "every count of replicas and GPU-hours is for that share of the load"
        )
    if unknown:
        notes.append(f"{len(unknown)} of {len(numbers)} clients have no lengths in the table: given the pool's median")
    return Trace(
        name=f"servegen:{pool}",
        at_s=at_s,
        prompt_tokens=_lengths(prompts, client, rng.random(len(at_s))),
        output_tokens=_lengths(outputs, client, rng.random(len(at_s))),
        duration_s=end_s - start_s,
        client=client,
        clients=tuple(str(number) for number in numbers),
        notes=tuple(notes),
        starts_at_s=start_s,
    )


@numba.njit(cache=True)  # type: ignore[untyped-decorator]  # numba has no types
def _drawn(rows: Any, room: int, seed: int, window_s: float) -> Any:
    """Times and clients of all windows; the arrays grow where more came than there was room for."""
    np.random.seed(seed)
    at_s = np.empty(room)
    client = np.empty(room, dtype=np.int32)
    n = 0
    for row in range(len(rows)):
        rate = rows[row, 2]
        if rate <= 0:
            continue
        # As in the load tester: of n gaps none has a CV above sqrt(n - 1).
        cv = min(rows[row, 3], math.sqrt(max(1.0, rate * window_s - 1)))
        if cv < _CLOCK_CV:
            offset_s, shape, scale = np.random.random() / rate, 0.0, 1 / rate
        else:
            shape, scale = 1 / (cv * cv), cv * cv / rate
            offset_s = np.random.random() * np.random.gamma(shape + 1, scale)
        while offset_s < window_s:
            if n == len(at_s):
                at_s = np.append(at_s, np.empty(n // 2 + 1))
                client = np.append(client, np.empty(n // 2 + 1, dtype=np.int32))
            at_s[n] = rows[row, 1] + offset_s
            client[n] = int(rows[row, 0])
            n += 1
            offset_s += scale if shape == 0.0 else np.random.gamma(shape, scale)
    return at_s, client, n


def _lengths(quantiles: Floats, client: Any, level: Floats) -> Any:
    """Straight lines between the quantiles of each request's client; p1 and p99 at the ends."""
    above = np.clip(np.searchsorted(_LEVELS_KNOWN, level), 1, len(_LEVELS_KNOWN) - 1)
    low, high = _LEVELS_KNOWN[above - 1], _LEVELS_KNOWN[above]
    share = np.clip((level - low) / (high - low), 0.0, 1.0)
    first, second = quantiles[client, above - 1], quantiles[client, above]
    return np.maximum(1, np.rint(first + share * (second - first))).astype(np.int32)


def _windows(rates: Path, pool: str, from_s: float, until_s: float) -> Floats:
    """Client, start, rate and CV of each window of a pool within the part."""
    found, known = [], set()
    for row in _rows(rates):
        known.add(row["pool"])
        if row["pool"] == pool:
            start_s, rate, cv = float(row["t_s"]), float(row["rate_rps"]), float(row["cv"])
            if not (math.isfinite(start_s) and 0 <= rate < math.inf and 0 <= cv < math.inf):
                raise ValueError(f"{row}")
            if from_s - WINDOW_S < start_s < until_s:
                found.append((float(int(row["client"])), start_s, rate, cv))
    if pool not in known:
        raise LoadtestError(f"{rates}: there is no pool {pool!r}; allowed: {', '.join(sorted(known))}")
    if not found:
        raise LoadtestError(f"{rates}: pool {pool} has nothing between {from_s:g} s and {until_s:g} s")
    return np.array(sorted(found))


def _quantiles(path: Path, pool: str) -> tuple[dict[int, dict[str, list[float]]], dict[str, Any]]:
    """By client the quantiles of both lengths, and the pool's median of them for clients without."""
    if not path.is_file():
        raise LoadtestError(f"{path}: there is no such file; the table of lengths must lie beside the table of rates")
    found: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for row in _rows(path):
        if row["pool"] == pool:
            found[int(row["client"])][row["field"]] = [float(row[level]) for level in _LEVELS]
    fields = ("input_tokens", "output_tokens")
    whole = {client: values for client, values in found.items() if all(name in values for name in fields)}
    if not whole:
        raise LoadtestError(f"{path}: there are no lengths of pool {pool!r}")
    return whole, {name: np.median([values[name] for values in whole.values()], axis=0) for name in fields}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open_text(path) as file:
            yield from csv.DictReader(file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LoadtestError(f"{path}: cannot be read: {error}") from error
