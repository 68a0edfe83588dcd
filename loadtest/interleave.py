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
    # The warm-up opens what is lazily opened on both ways, and tells how many requests fill a run.
    warm = await _run(spec, direct, processes, numbers, per_stream=LEAST_REQUESTS_PER_STREAM, spread_s=0.0)
    await _run(spec, gateway, processes, numbers, per_stream=LEAST_REQUESTS_PER_STREAM, spread_s=0.0)
    per_stream = max(LEAST_REQUESTS_PER_STREAM, math.ceil(spec.run_s / warm.e2e_p50_s))
    pairs = []
    for repeat in range(spec.repeats):
        order = (direct, gateway) if repeat % 2 == 0 else (gateway, direct)
        runs = {}
        for side in order:
            progress(f"{spec.name}: repeat {repeat + 1} of {spec.repeats}, {side.target.name}")
            runs[side.target.name] = await _run(
                spec, side, processes, numbers, per_stream=per_stream, spread_s=warm.e2e_p50_s
            )
        pairs.append(Pair(direct=runs[direct.target.name], gateway=runs[gateway.target.name]))
    return compare(spec.name, spec.load, pairs, cores=cores)


async def _run(
    spec: CellSpec,
    side: Side,
    processes: ProcessGroups,
    numbers: Iterator[int],
    *,
    per_stream: int,
    spread_s: float,
) -> Run:
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
