"""The load tester against the truth: a server that stamps what it does, on the clock that the client reads.

Compared is what the server really did, not what it was asked to do: on a busy machine both shift together. What the
kernel and a busy processor put between the server's stamp and the client's is not the load tester's error: a few
milliseconds are allowed for it, and a run that was disturbed by more is made again. A wrong measure is wrong in
every run.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest

from loadtest.plan import PlannedRequest
from loadtest.records import Outcome
from loadtest.reports.model import Figure, figures
from loadtest.request import Target
from loadtest.self_check import self_check
from loadtest.sender import LoopSettings
from loadtest.stats import quantiles
from loadtest.workers import RunOutcome, RunSettings, run
from tests.unit.test_loadtest_client import DONE, END, HEAD, USAGE, token

# As many as the usage says.
TOKENS = 5
GAP_S = 0.03
RELATIVE = 0.02
ABSOLUTE_S = 0.004
ATTEMPTS = 5


class Truth(threading.Thread):
    """A server in a thread of its own: first token after `ttft_s(number)`, then a token every GAP_S.

    `stamps[number]` are the monotonic times, nanoseconds, at which it handed each token to the kernel.
    """

    def __init__(self, ttft_s: Callable[[int], float]) -> None:
        super().__init__(daemon=True)
        self._ttft_s = ttft_s
        self.stamps: dict[int, list[int]] = {}
        self.port = 0
        self._up = threading.Event()
        self._stall: tuple[int, float] | None = None
        self._stalled_until_ns = 0
        self._loop = asyncio.new_event_loop()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.run_until_complete(asyncio.start_server(self._handle, "127.0.0.1", 0, backlog=1024))
        self.port = listening.sockets[0].getsockname()[1]
        self._up.set()
        self._loop.run_forever()
        listening.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    def begin(self) -> None:
        self.start()
        assert self._up.wait(10)

    def stall_at(self, number: int, seconds: float) -> None:
        """From the arrival of this request on nothing at all is answered for so long."""
        self._stall = number, seconds

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join(10)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                content = json.loads(body)["messages"][0]["content"]
                number = int(content) if content.isdigit() else len(self.stamps)
                stamps = self.stamps[number] = []
                if self._stall is not None and self._stall[0] == number:
                    self._stalled_until_ns = time.monotonic_ns() + int(self._stall[1] * 1e9)
                await asyncio.sleep(self._ttft_s(number))
                for position in range(TOKENS):
                    while (left_s := (self._stalled_until_ns - time.monotonic_ns()) / 1e9) > 0:
                        await asyncio.sleep(left_s)
                    stamps.append(time.monotonic_ns())
                    writer.write((HEAD if position == 0 else b"") + token("a"))
                    await asyncio.sleep(GAP_S)
                writer.write(USAGE + DONE + END)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@contextmanager
def truth(ttft_s: Callable[[int], float]) -> Iterator[Truth]:
    server = Truth(ttft_s)
    server.begin()
    try:
        yield server
    finally:
        server.end()


def evenly(count: int, every_s: float) -> list[PlannedRequest]:
    """Each says its number, so that the server's stamps and the client's record can be held together."""
    return [PlannedRequest(index * every_s, "t", "m", str(index), TOKENS) for index in range(count)]


def measured(
    server: Truth, plan: Sequence[PlannedRequest], *, workers: int = 1, max_connections: int = 200
) -> RunOutcome:
    settings = RunSettings(LoopSettings(timeout_s=30.0, drain_s=20.0, max_connections=max_connections), workers=workers)
    outcome = run(plan, lambda tenant: Target(tenant, "127.0.0.1", server.port), settings)
    assert [record.outcome for record in outcome.records] == [Outcome.COMPLETED] * len(plan)
    assert [record.index for record in outcome.records] == list(range(len(plan)))
    return outcome


def untrue(server: Truth, plan: Sequence[PlannedRequest], outcome: RunOutcome) -> dict[str, object]:
    """The reported percentiles that are not the server's own, counted from the same scheduled times."""
    found = figures(outcome.records)
    first_s = [(server.stamps[n][0] - outcome.start_ns) / 1e9 - plan[n].at_s for n in range(len(plan))]
    gaps_s = [(b - a) / 1e9 for n in range(len(plan)) for a, b in pairwise(server.stamps[n])]
    mean_gaps_s = [(server.stamps[n][-1] - server.stamps[n][0]) / 1e9 / (TOKENS - 1) for n in range(len(plan))]
    wrong: dict[str, object] = {}
    for kind, true in (("ttft", first_s), ("itl", gaps_s), ("tpot", mean_gaps_s)):
        reported = [found[f"{kind}_p{level}_s"] for level in (50, 95, 99)]
        expected = list(quantiles(true, 0.5, 0.95, 0.99))
        if reported != pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE_S):
            wrong[kind] = {"reported": reported, "true": expected}
    return wrong


def hold(
    ttft_s: Callable[[int], float],
    plan: Sequence[PlannedRequest],
    *,
    stall: tuple[int, float] | None = None,
    workers: int = 1,
    max_connections: int = 200,
) -> RunOutcome:
    """A run whose every reported percentile is true."""
    disturbed = []
    for _ in range(ATTEMPTS):
        with truth(ttft_s) as server:
            if stall is not None:
                server.stall_at(*stall)
            outcome = measured(server, plan, workers=workers, max_connections=max_connections)
            wrong = untrue(server, plan, outcome)
        if not wrong:
            return outcome
        disturbed.append(wrong)
    pytest.fail(f"not within {RELATIVE:.0%} of the truth in {ATTEMPTS} runs: {disturbed}")


def seconds(found: dict[str, Figure], key: str) -> float:
    value = found[key]
    assert value is not None
    return value


def test_a_fixed_latency_is_reported_as_it_was() -> None:
    found = figures(hold(lambda _number: 0.05, evenly(200, 0.01), workers=2).records)
    assert seconds(found, "ttft_p50_s") >= 0.05


def test_two_modes_are_reported_as_they_were() -> None:
    found = figures(hold(lambda number: 0.2 if number % 10 == 9 else 0.02, evenly(200, 0.01)).records)
    # A tenth is slow: the median is of the quick ones, the 95th percentile of the slow.
    assert seconds(found, "ttft_p50_s") < seconds(found, "ttft_p95_s")
    assert seconds(found, "ttft_p95_s") >= 0.2


def test_a_stall_counts_for_every_request_that_it_kept_waiting() -> None:
    found = figures(hold(lambda _number: 0.01, evenly(300, 0.01), stall=(100, 1.0)).records)
    # A third of the plan was due while the server stood still. A client that waits for an answer before it asks
    # again would have had a handful of slow requests.
    assert seconds(found, "ttft_p95_s") > 0.5


def test_a_client_out_of_connections_tells_the_truth_and_that_the_run_is_invalid() -> None:
    outcome = hold(lambda _number: 0.05, evenly(150, 0.01), max_connections=5)
    found = figures(outcome.records)
    reasons = self_check(outcome.records, outcome.samples, waited=outcome.waited)
    assert outcome.waited
    assert any(reason.startswith("client saturation") for reason in reasons)
    assert any(reason.startswith("the client sent requests late") for reason in reasons)
    # Five at a time, 0.14 s and more each: the last of the plan were late by more than the server ever took.
    assert seconds(found, "late_p99_s") > 1.0
    assert seconds(found, "ttft_p99_s") > seconds(found, "late_p99_s")
