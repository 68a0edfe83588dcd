"""Runs two targets under the same load in turns: A B, B A, A B… after a discarded warm-up of both.

Alternating keeps what drifts (clocks, caches, neighbours on the machine) from favouring one target;
turning the order round each repeat keeps "always second" from favouring one either. A run with a
failed request ends the benchmark: a gateway that drops requests is fast.

Streams start one after another, spread over the time of one request. Started together, streams of equal
length would stay in step and ask in bursts for ever, and the first token's time would be that of a queue
which no independent clients form.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.client import RequestResult, StreamClient
from loadtest.errors import LoadtestError
from loadtest.measures import Cell, Pair, Run, compare, measure
from loadtest.processes import ProcessGroups
from loadtest.request import RequestTemplate, Target

# Between runs, so that the last one's closing connections are not the next one's load.
SETTLE_S = 0.3
# Requests each stream makes at least while all are at work, however long one takes.
LEAST_REQUESTS_PER_STREAM = 2


@dataclass(frozen=True, slots=True)
class Side:
    """A target with its prepared requests; both sides hold the same prompts in the same order."""

    target: Target
    templates: tuple[RequestTemplate, ...]


@dataclass(frozen=True, slots=True)
class CellSpec:
    """One load: so many streams at once, each with one request after another in flight."""

    name: str
    # What the report says of the load (streams, prompt size, …).
    load: Mapping[str, Any]
    streams: int
    # How long a run should last, seconds; the requests per stream follow from it.
    run_s: float
    repeats: int
    request_timeout_s: float


async def run_cell(
    spec: CellSpec,
    direct: Side,
    gateway: Side,
    *,
    processes: ProcessGroups,
    cores: int,
    numbers: Iterator[int],
    progress: Callable[[str], None],
) -> Cell:
    """Measure one load on both targets; `numbers` makes every prompt of the benchmark unique.

    Raises LoadtestError when a request failed or a process ended.
    """
    found = await run_ways(spec, [Way(direct, processes), Way(gateway, processes)], numbers=numbers, progress=progress)
    direct_runs, gateway_runs = (_runs(found[side.target.name]) for side in (direct, gateway))
    pairs = [Pair(first, second) for first, second in zip(direct_runs, gateway_runs, strict=True)]
    return compare(spec.name, spec.load, pairs, cores=cores)


@dataclass(frozen=True, slots=True)
class Way:
    """A side with the processes that are accounted while it is at work."""

    side: Side
    processes: ProcessGroups


async def run_ways(
    spec: CellSpec, ways: Sequence[Way], *, numbers: Iterator[int], progress: Callable[[str], None]
) -> dict[str, list[Run] | LoadtestError]:
    """Measure one load on every way in turns; the runs of each by its target's name, one a repeat.

    The order is turned by one each repeat. A way whose run fails is measured no further, and its error is given in
    place of its runs. The first way's pace tells how many requests fill a run: raises LoadtestError where it fails.
    """
    found: dict[str, list[Run] | LoadtestError] = {}
    # The warm-up opens what is lazily opened on every way.
    first, *others = ways
    warm = await _run(spec, first, numbers, per_stream=LEAST_REQUESTS_PER_STREAM, spread_s=0.0)
    found[first.side.target.name] = []
    for way in others:
        await _try(spec, way, found, numbers, per_stream=LEAST_REQUESTS_PER_STREAM, spread_s=0.0, discard=True)
    per_stream = max(LEAST_REQUESTS_PER_STREAM, math.ceil(spec.run_s / warm.e2e_p50_s))
    for repeat in range(spec.repeats):
        turn = repeat % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            progress(f"{spec.name}: repeat {repeat + 1} of {spec.repeats}, {way.side.target.name}")
            await _try(spec, way, found, numbers, per_stream=per_stream, spread_s=warm.e2e_p50_s)
    return found


async def _try(
    spec: CellSpec,
    way: Way,
    found: dict[str, list[Run] | LoadtestError],
    numbers: Iterator[int],
    *,
    per_stream: int,
    spread_s: float,
    discard: bool = False,
) -> None:
    held = found.setdefault(way.side.target.name, [])
    if isinstance(held, LoadtestError):
        return
    try:
        ran = await _run(spec, way, numbers, per_stream=per_stream, spread_s=spread_s)
    except LoadtestError as problem:
        found[way.side.target.name] = problem
    else:
        if not discard:
            held.append(ran)


def _runs(held: list[Run] | LoadtestError) -> list[Run]:
    if isinstance(held, LoadtestError):
        raise held
    return held


async def _run(
    spec: CellSpec,
    way: Way,
    numbers: Iterator[int],
    *,
    per_stream: int,
    spread_s: float,
) -> Run:
    side, processes = way.side, way.processes
    await asyncio.sleep(SETTLE_S)
    clients = [StreamClient(side.target.host, side.target.port) for _ in range(spec.streams)]
    # A refused connection shows again, as a result, with the first request.
    await asyncio.gather(*(client.open() for client in clients), return_exceptions=True)
    # A collection in mid-run would be a pause that the targets did not make.
    gc.collect()
    gc.disable()
    try:
        before = processes.read()
        # Not from the reading: the readings' own work is not the client's.
        cpu_before_s = time.process_time()
        streams = await closed_loop(
            clients,
            side.templates,
            per_stream,
            numbers,
            spread_s=spread_s,
            timeout_s=spec.request_timeout_s,
        )
        client_cpu_s = time.process_time() - cpu_before_s
        after = processes.read()
    finally:
        gc.enable()
        await asyncio.gather(*(client.close() for client in clients))
    try:
        return measure(
            streams,
            reconnects=sum(client.connects - 1 for client in clients),
            client_cpu_s=client_cpu_s,
            before=before,
            after=after,
        )
    except LoadtestError as problem:
        raise LoadtestError(f"{spec.name}, {side.target.name}: {problem}") from problem


async def closed_loop(
    clients: Sequence[StreamClient],
    templates: Sequence[RequestTemplate],
    per_stream: int,
    numbers: Iterator[int],
    *,
    spread_s: float,
    timeout_s: float,
) -> list[list[RequestResult]]:
    """Requests on each client, one at a time; results by client.

    The clients' first requests are spread evenly over `spread_s`. A client repeats its first prompt until the
    last client has started, then makes `per_stream` requests with the templates in turn: from there on all
    are at work, with the same prompts whatever the target's speed. The first failure anywhere keeps every
    client from its next request; what is in flight ends.
    """
    failed = False
    started = 0

    async def stream(index: int, client: StreamClient) -> list[RequestResult]:
        nonlocal failed, started
        results: list[RequestResult] = []
        await asyncio.sleep(spread_s * index / len(clients))
        started += 1
        turn = 0
        while turn < per_stream and not failed:
            template = templates[(index + turn) % len(templates)]
            turn += started == len(clients)
            results.append(await client.request(template.numbered(next(numbers)), timeout_s=timeout_s))
            failed = failed or results[-1].failure is not None
        return results

    return await asyncio.gather(*(stream(index, client) for index, client in enumerate(clients)))
