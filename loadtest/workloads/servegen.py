"""Clients of a production service as ServeGen describes them (Alibaba, Apache-2.0; derived tables).

Each client has a rate and a burstiness (CV of the gaps) for every ten minutes, and quantiles of its lengths.
Requests are drawn from these laws, client by client: what is heavy, bursty or idle is so for as long as it was.
There is no text: prompts are filler.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from loadtest.arrivals import gamma, until
from loadtest.errors import LoadtestError
from loadtest.workloads.draft import Count, Draft, Setting, Workload

LENGTHS_FILE = "servegen_client_lengths.csv.gz"
RATES_FILE = "servegen_client_rates_10min.csv.gz"
WINDOW_S = 600.0

_LEVELS = {
    "p1": 0.01,
    "p5": 0.05,
    "p10": 0.1,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p95": 0.95,
    "p99": 0.99,
}

# Start in seconds, requests a second, CV.
_Window = tuple[float, float, float]
# A client's quantiles at _LEVELS, of prompts and of outputs.
_ClientLengths = dict[str, tuple[float, ...]]


class ServegenWorkload(Workload):
    """The busiest `top` clients of a pool (or the named ones), at `rate_scale` times their recorded rates.

    With `tenant_per_client` each client is a tenant of its own, named TENANT/CLIENT after the stream's tenant,
    whose key it uses; otherwise all are the stream's tenant.
    """

    timed: ClassVar[bool] = True

    kind: Literal["servegen"]
    pool: str = "m-mid"
    top: Count = 10
    clients: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] | None = None
    rate_scale: Annotated[float, Field(gt=0)] = 1.0
    tenant_per_client: bool = False

    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """The clients merged by time, within the setting's part of the trace; memory grows with its ten-minute windows.

        Raises LoadtestError for a pool or a client that the tables do not hold.
        """
        try:
            lengths = _lengths(setting, self.pool)
            windows = _windows(setting, self.pool, lengths)
        except (KeyError, TypeError, ValueError) as error:
            raise LoadtestError(f"{setting.data}: not the tables of servegen: {error!r}") from error
        chosen = self._chosen(windows, lengths)
        clients = (self._client(setting, client, windows.get(client, ()), lengths[client]) for client in chosen)
        yield from heapq.merge(*clients, key=lambda draft: draft.at_s or 0.0)

    def _chosen(self, windows: Mapping[int, Sequence[_Window]], lengths: Mapping[int, object]) -> list[int]:
        if self.clients is None:
            return sorted(windows, key=lambda client: (-sum(rate for _, rate, _ in windows[client]), client))[
                : self.top
            ]
        if unknown := [client for client in self.clients if client not in lengths]:
            raise LoadtestError(f"clients {unknown} have no lengths in pool {self.pool}; allowed: {sorted(lengths)}")
        return list(dict.fromkeys(self.clients))

    def _client(
        self, setting: Setting, client: int, windows: Sequence[_Window], lengths: _ClientLengths
    ) -> Iterator[Draft]:
        rng = setting.rng(f"servegen/{client}")
        number = 0
        for start_s, recorded_rps, recorded_cv in windows:
            rate_rps = recorded_rps * self.rate_scale
            # Of n gaps none has a CV above sqrt(n - 1). A client scaled down keeps the CV only up to there, or
            # a whole run would wait for one burst that hardly ever comes.
            cv = min(recorded_cv, math.sqrt(max(1.0, rate_rps * WINDOW_S - 1)))
            for offset_s in until(gamma(rate_rps, cv, rng), WINDOW_S):
                number += 1
                yield Draft(
                    at_s=start_s + offset_s,
                    prompt_tokens=_drawn(lengths["input_tokens"], rng.random()),
                    output_tokens=_drawn(lengths["output_tokens"], rng.random()),
                    write=partial(setting.text, f"servegen/{client}/{number}"),
                    client=str(client) if self.tenant_per_client else None,
                )


def _drawn(quantiles: Sequence[float], level: float) -> int:
    # Straight lines between the known quantiles. What lies beyond p1 and p99 is not known and not invented:
    # the one longest request in a hundred is drawn too short.
    levels = tuple(_LEVELS.values())
    above = bisect_right(levels, level)
    if above in {0, len(levels)}:
        return max(1, round(quantiles[min(above, len(levels) - 1)]))
    share = (level - levels[above - 1]) / (levels[above] - levels[above - 1])
    return max(1, round(quantiles[above - 1] + share * (quantiles[above] - quantiles[above - 1])))


def _lengths(setting: Setting, pool: str) -> dict[int, _ClientLengths]:
    found: dict[int, _ClientLengths] = {}
    pools = set()
    for row in _rows(setting, LENGTHS_FILE):
        pools.add(row["pool"])
        if row["pool"] == pool:
            values = tuple(float(row[level]) for level in _LEVELS)
            found.setdefault(int(row["client"]), {})[row["field"]] = values
    if not found:
        raise LoadtestError(f"there is no pool {pool!r} in {LENGTHS_FILE}; allowed: {', '.join(sorted(pools))}")
    return {client: fields for client, fields in found.items() if len(fields) == 2}  # noqa: PLR2004  # in and out


def _windows(setting: Setting, pool: str, known: Mapping[int, object]) -> dict[int, list[_Window]]:
    found: dict[int, list[_Window]] = {}
    pools = set()
    for row in _rows(setting, RATES_FILE):
        pools.add(row["pool"])
        if row["pool"] != pool:
            continue
        start_s, client = float(row["t_s"]), int(row["client"])
        if client in known and setting.from_s - WINDOW_S < start_s < setting.until_s:
            found.setdefault(client, []).append((start_s, float(row["rate_rps"]), float(row["cv"])))
    if pool not in pools:
        raise LoadtestError(f"there is no pool {pool!r} in {RATES_FILE}; allowed: {', '.join(sorted(pools))}")
    for windows in found.values():
        windows.sort()
    return found


def _rows(setting: Setting, name: str) -> Iterator[dict[str, Any]]:
    path = setting.file(name)
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, EOFError) as error:
        raise LoadtestError(f"{path}: cannot be read as gzip: {error}") from error
