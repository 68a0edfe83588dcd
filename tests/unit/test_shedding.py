"""When a gateway sheds, when it stops, and that it does so before it answers anything else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission.shedding import (
    LEAST_IN_FLIGHT,
    LOOKS_A_TRIM,
    WINDOW,
    WORTH_TRIMMING_BYTES,
    Bounds,
    Load,
    Reason,
    Shedder,
    decide,
    resident_bytes,
)
from serving.config import FakeEngineConfig
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, rig

BOUNDS = Bounds(lag_s=0.5, memory_bytes=1000)
BUSY = LEAST_IN_FLIGHT
LATE, SOME, CALM = (0.6,) * WINDOW, (0.4,) * WINDOW, (0.1,) * WINDOW


@pytest.mark.parametrize(
    ("present", "lags_s", "memory_bytes", "in_flight", "expected"),
    [
        (None, CALM, 500, BUSY, None),
        (None, SOME, 1000, BUSY, None),
        (None, LATE, 500, BUSY, "event_loop"),
        # One stall is a burst, not a queue; two of three are not all.
        (None, (0.0, 5.0, 0.0), 500, BUSY, None),
        (None, (0.6, 0.6), 500, BUSY, None),
        # It ends well below where it began.
        ("event_loop", SOME, 500, BUSY, "event_loop"),
        ("event_loop", CALM, 500, BUSY, None),
        (None, CALM, 1001, BUSY, "memory"),
        ("memory", CALM, 950, BUSY, "memory"),
        ("memory", CALM, 900, BUSY, None),
        ("memory", LATE, 900, BUSY, "event_loop"),
        # With nothing under way it would help nobody.
        (None, LATE, 2000, BUSY - 1, None),
        ("memory", LATE, 2000, 0, None),
    ],
)
def test_decisions(
    present: Reason | None, lags_s: tuple[float, ...], memory_bytes: int, in_flight: int, expected: Reason | None
) -> None:
    assert decide(present, Load(lags_s, memory_bytes, in_flight), BOUNDS) == expected


LAGS = st.lists(st.floats(0, 5), max_size=WINDOW).map(tuple)


@given(LAGS, st.integers(0, 3000), st.integers(0, 100))
def test_what_begins_it_also_keeps_it_on(lags_s: tuple[float, ...], memory_bytes: int, in_flight: int) -> None:
    load = Load(lags_s, memory_bytes, in_flight)
    begun = decide(None, load, BOUNDS)
    if begun is not None:
        assert decide(begun, load, BOUNDS) == begun


def test_a_shedder_follows_its_window() -> None:
    in_flight = BUSY
    shedder = Shedder(BOUNDS, lambda: in_flight, memory=lambda: 0)
    reasons = []
    for lag_s in (0.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1):
        shedder.observe(lag_s)
        reasons.append(shedder.reason)
    late = "event_loop"
    assert reasons == [None, None, None, late, late, late, late, None]
    shedder = Shedder(BOUNDS, lambda: in_flight, memory=resident_bytes)
    shedder.observe(0.0)
    assert shedder.reason == "memory"
    in_flight = 0
    shedder.observe(0.0)
    assert shedder.reason is None


class Process:
    """Memory of which a part is free and only kept by the allocator."""

    def __init__(self, used: int, kept: int) -> None:
        self.used, self.kept, self.trims = used, kept, 0

    def memory(self) -> int:
        return self.used + self.kept

    def trim(self) -> None:
        self.kept, self.trims = 0, self.trims + 1


def test_what_the_allocator_keeps_is_given_back_before_anybody_is_refused() -> None:
    process = Process(used=400, kept=5000)
    shedder = Shedder(BOUNDS, lambda: BUSY, memory=process.memory, trim=process.trim)
    shedder.observe(0.0)
    assert (shedder.reason, process.memory(), process.trims) == (None, 400, 1)
    # What is really used is not talked away, and looking costs no trim each time.
    process.used = 2000
    for _ in range(3 * LOOKS_A_TRIM):
        shedder.observe(0.0)
    assert shedder.reason == "memory"
    assert process.trims <= 5


def test_memory_goes_back_when_many_bodies_have_gone() -> None:
    held, process = 0, Process(used=100, kept=0)
    shedder = Shedder(Bounds(0.5, 10**9), lambda: BUSY, lambda: held, process.memory, process.trim)
    shedder.observe(0.0)
    held = 2 * WORTH_TRIMMING_BYTES
    shedder.observe(0.0)
    assert process.trims == 0
    held = WORTH_TRIMMING_BYTES
    shedder.observe(0.0)
    shedder.observe(0.0)
    assert process.trims == 1


def test_freed_blocks_leave_the_process() -> None:
    """As a gateway that read large bodies while small things came and went: in a process of its own."""
    program = """
import json, sys
from serving.admission import heap
from serving.admission.shedding import resident_bytes
heap.tune()
before = resident_bytes()
bodies, small = [], []
for size in (200_000, 3_000_000) * 40:
    bodies.append(bytearray(b"x" * size)); small.append(bytes(1000 + len(small)))
held = resident_bytes(); bodies.clear(); heap.trim()
print(json.dumps([before, held, resident_bytes()]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, held, after = json.loads(ran.stdout)
    assert held - before > 100_000_000
    assert after - before < 0.1 * (held - before)


async def test_a_gateway_that_sheds_answers_503_and_goes_on_with_what_it_has() -> None:
    async with rig(FakeEngineConfig(decode_ms=20), faults={"shed_memory_bytes": 1}) as made:
        made.gateway.start()
        body = CHAT | {"stream": True, "max_tokens": 2000, "ignore_eos": True}
        async with contextlib.AsyncExitStack() as streams:
            begun = []
            for _ in range(LEAST_IN_FLIGHT):
                asked = made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body)
                begun.append((await streams.enter_async_context(asked)).aiter_lines())
                await anext(begun[-1])
            async with asyncio.timeout(20):
                while (answer := await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200:
                    pass
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
            assert made.total("galerne_requests_shed_total", reason="memory") == 1
            await anext(begun[0])
        # Nothing is under way any more: nothing is shed.
        async with asyncio.timeout(20):
            while (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code != 200:
                pass
