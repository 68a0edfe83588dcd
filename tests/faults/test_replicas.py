"""Replicas die, hang and lie under load: what clients notice, and that the books add up and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import time
from collections import Counter

import pytest

from serving.config import FakeEngineConfig, GatewayFaultsConfig
from serving.metrics.table import HEDGE_WINNERS
from serving.routing.ejection import PROBES
from tests.faults.replicas import (
    EJECTED_S,
    FLAT,
    MARGIN_S,
    PATH,
    ROUNDS,
    Memory,
    Rig,
    ask_many,
    head,
    report,
    rig,
)

# `make test-faults` asks for a thousand.
REQUESTS = int(os.environ.get("GALERNE_FAULT_REQUESTS", "300"))
QUICK = FakeEngineConfig(decode_ms=1, prefill_tokens_per_s=1e6)
# The first byte takes its time, and a request is little else.
THOUGHTFUL = FakeEngineConfig(decode_ms=400, prefill_tokens_per_s=1e6)
# Five seconds to the first byte, as with nobody else on it.
SLUGGISH = FakeEngineConfig(decode_ms=5000, prefill_tokens_per_s=1e6)
STEADY = FakeEngineConfig(decode_ms=10, prefill_tokens_per_s=1e6)
PROMPT_S = 30.0
# Streams that last until all of them run, on a machine that does other things too.
STREAM_TOKENS = 500


def prompt(seconds: float) -> bool:
    """Whether an ejection came in time; the figure itself is printed."""
    return seconds <= EJECTED_S + MARGIN_S


def test_probes_find_a_dead_replica_within_five_seconds() -> None:
    faults = GatewayFaultsConfig()
    assert faults.probe_interval_s + PROBES * max(faults.probe_interval_s, faults.probe_timeout_s) <= EJECTED_S


async def test_killed_before_it_accepts() -> None:
    async with rig(3, QUICK) as made:
        struck = made.strike(made.engines[0], signal.SIGKILL)
        seen = await ask_many(REQUESTS, 50, made.ask)
        ejected_s = await struck
        books = await made.settled()
        report("killed before it accepts", seen, books, ejected_s=round(ejected_s, 2))
        assert prompt(ejected_s)
        assert made.ejected == {"r0"}
        assert seen == {"done": REQUESTS}
        assert books["completed"] == REQUESTS


async def test_killed_without_load_is_out_by_probes() -> None:
    async with rig(2, QUICK) as made:
        ejected_s = await made.strike(made.engines[1], signal.SIGKILL)
        report("killed without load", {}, await made.settled(), ejected_s=round(ejected_s, 2))
        assert prompt(ejected_s)
        assert made.ejected == {"r1"}
        assert made.total("galerne_replica_ejections_total", reason="probes") == 1


async def test_killed_after_it_accepted_and_before_a_byte() -> None:
    async with rig(3, THOUGHTFUL) as made:
        asked = asyncio.create_task(ask_many(REQUESTS, 120, lambda: made.ask(1)))
        while not await made.engines[0].metric("vllm:num_requests_running"):
            assert not asked.done(), "the first replica got nothing to do"
            await asyncio.sleep(0.02)
        # In the middle of everybody's first token.
        struck = made.strike(made.engines[0], signal.SIGKILL)
        seen = await asked
        ejected_s = await struck
        books = await made.settled()
        retries = made.total("galerne_retries_total", end="sent")
        report("killed after it accepted", seen, books, retries=int(retries), ejected_s=round(ejected_s, 2))
        assert prompt(ejected_s)
        assert seen == {"done": REQUESTS}
        assert retries > 0
        assert made.total("galerne_retries_total") == retries
        assert "r0" in made.ejected


async def test_killed_in_the_middle_of_streams() -> None:
    async with rig(3, STEADY) as made:
        asked = asyncio.create_task(ask_many(60, 60, lambda: made.ask(STREAM_TOKENS)))
        while sum(n for n in made.gateway.replicas.snapshot()["chat"].values()) < 60 or not _all_run(made, 60):
            assert not asked.done(), "streams ended before all of them ran"
            await asyncio.sleep(0.02)
        lost = made.gateway.replicas.snapshot()["chat"]["r0"]
        struck = made.strike(made.engines[0], signal.SIGKILL)
        seen = await asked
        ejected_s = await struck
        books = await made.settled()
        report("killed in the middle of streams", seen, books, ejected_s=round(ejected_s, 2))
        assert prompt(ejected_s)
        # A stream of which a part was sent ends with an error event, never silently and never with another text.
        assert lost > 0
        assert seen == {"cut": lost, "done": 60 - lost}
        assert books["failed"] == lost == made.total("galerne_streams_cut_total")


def _all_run(made: Rig, count: int) -> bool:
    """Whether every stream has sent its first tokens to its client."""
    return made.total("galerne_time_to_first_token_seconds_count") >= count


async def test_stopped_and_continued() -> None:
    async with rig(3, STEADY, model={"faults": {"stall_s": 1.5}}) as made:
        streams = asyncio.create_task(ask_many(30, 30, lambda: made.ask(STREAM_TOKENS)))
        while not _all_run(made, 30):
            await asyncio.sleep(0.02)
        lost = made.gateway.replicas.snapshot()["chat"]["r0"]
        struck = made.strike(made.engines[0], signal.SIGSTOP)
        # Requests of after it was stopped: some are put on it before it is ejected.
        later = await ask_many(300, 30, made.ask)
        ejected_s = await struck
        seen = await streams
        books = await made.settled_but("r0")
        stalled = int(made.total("galerne_retries_total", kind="stalled", end="sent"))
        report("stopped", seen + later, books, retries=stalled, ejected_s=round(ejected_s, 2))
        assert prompt(ejected_s)
        assert made.ejected == {"r0"}
        assert lost > 0
        assert stalled > 0
        assert seen == {"cut": lost, "done": 30 - lost}
        assert later == {"done": 300}
        made.engines[0].signal(signal.SIGCONT)
        await made.settled()


async def test_a_slow_replica_is_hedged() -> None:
    async with rig(3, QUICK, first=SLUGGISH, model={"faults": {"hedge_after_s": 0.3}}) as made:
        late: Counter[bool] = Counter()

        async def ask() -> str:
            began_s = time.monotonic()
            answer = await made.ask(1)
            late[time.monotonic() - began_s >= SLUGGISH.decode_ms / 1e3] += 1
            return answer

        seen = await ask_many(REQUESTS, 12, ask)
        books = await made.settled()
        won = {won: int(made.total("galerne_hedges_total", won=won)) for won in HEDGE_WINNERS}
        report("a replica with 5 s to its first byte", seen, books, hedges=won, late=late[True])
        assert seen == {"done": REQUESTS}
        assert won["second"] > 0
        assert won["neither"] == 0
        assert made.ejected == frozenset()
        assert made.total("galerne_upstream_errors_total") == made.total("galerne_retries_total") == 0


async def test_random_disconnects() -> None:
    rng = random.Random(11)
    async with rig(2, STEADY) as made:
        seen = await ask_many(REQUESTS, 100, lambda: _leave(made, rng.uniform(0.0, 0.4)))
        books = await made.settled()
        report("disconnects", seen, books)
        assert seen["left"] > REQUESTS / 2
        assert books["cancelled"] > REQUESTS / 4
        assert books["failed"] == books["rejected"] == 0
        assert made.ejected == frozenset()


async def _leave(made: Rig, after_s: float) -> str:
    _, writer = await _begin(made, 20)
    await asyncio.sleep(after_s)
    writer.transport.abort()
    return "left"


async def _begin(made: Rig, max_tokens: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # The least that the kernel takes in advance, and the least that is read from it.
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", made.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    message = {"role": "user", "content": "hello"}
    body = json.dumps(
        {"model": "chat", "messages": [message], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    ).encode()
    writer.write(head("POST", PATH, len(body)) + body)
    return reader, writer


async def test_ten_times_too_much() -> None:
    async with rig(2, STEADY, max_ongoing_requests=20) as made:
        seen: Counter[str] = Counter()
        memory = Memory()
        for _ in range(ROUNDS):
            seen += await ask_many(REQUESTS, 200, lambda: made.ask(5))
            books = await made.settled()
            memory.take()
        # One of several tenants: it may not have the last of them.
        refused = int(made.total("galerne_requests_shed_total"))
        report("ten times too much", seen, books, refused=refused, mib=memory.mib, growth=f"{memory.growth:.1%}")
        assert seen == {"done": books["completed"], "503": refused}
        assert books["completed"] + refused == ROUNDS * REQUESTS
        assert refused > 0
        assert books["completed"] >= 20
        assert memory.growth < FLAT


async def test_slow_readers() -> None:
    async with rig(1, FakeEngineConfig(decode_ms=0), faults={"slow_reader_s": 1.0}) as made:
        cut, memory = 0, Memory()
        for _ in range(ROUNDS):
            readers = [await _begin(made, 30_000) for _ in range(4)]
            cut += len(readers)
            deadline_s = time.monotonic() + 60
            while made.total("galerne_slow_readers_total") < cut:
                assert time.monotonic() < deadline_s, "a client that does not read was not cut off"
                await asyncio.sleep(0.05)
            # The engine and the gateway are free again although no client has gone.
            books = await made.settled()
            memory.take()
            for _, writer in readers:
                writer.transport.abort()
        report("slow readers", Counter(cut=cut), books, mib=memory.mib, growth=f"{memory.growth:.1%}")
        assert books["cancelled"] == cut
        assert memory.growth < FLAT


@pytest.mark.faults
async def test_memory_is_flat_over_rounds() -> None:
    """Rounds of everything: the last ones need no more memory than those before."""
    rng = random.Random(5)
    async with rig(2, STEADY, max_ongoing_requests=100) as made:
        memory = Memory()
        for _ in range(8):
            seen = await ask_many(300, 150, lambda: made.ask(5))
            seen += await ask_many(300, 100, lambda: _leave(made, rng.uniform(0.0, 0.2)))
            books = await made.settled()
            memory.take()
        report("rounds", seen, books, mib=memory.mib, growth=f"{memory.growth:.1%}")
        assert memory.growth < FLAT


@pytest.mark.faults
async def test_a_late_event_loop_sheds_and_recovers() -> None:
    async with rig(2, STEADY) as made:
        streams = asyncio.create_task(ask_many(30, 30, lambda: made.ask(2000)))
        while not _all_run(made, 30):
            await asyncio.sleep(0.02)
        seen: Counter[str] = Counter()
        late_s = 0.0
        while not made.total("galerne_requests_shed_total", reason="event_loop"):
            # Work that does not give way, as a flood of requests would be: several timers in a row are late.
            for _ in range(5):
                time.sleep(1.0)
                late_s += 1.0
                await asyncio.sleep(0.01)
            assert late_s < 2 * PROMPT_S, "nothing was shed"
            seen[await made.ask(1)] += 1
        while (answer := await made.ask(1)) != "done":
            seen[answer] += 1
            await asyncio.sleep(0.1)
        seen += await streams
        books = await made.settled()
        report("late event loop", seen, books, late_s=round(late_s, 1))
        # Those under way go on, new ones are refused, and it ends when the loop is in time again.
        assert seen["done"] >= 30
        assert set(seen) == {"done", "503"}
