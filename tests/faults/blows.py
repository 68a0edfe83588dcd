"""One of a kind of process is killed or stopped under load."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Final

import psutil

from tests.faults.books import Books, balanced
from tests.faults.cluster import Cluster
from tests.faults.kinds import Kind
from tests.faults.traffic import Traffic, ask, traffic
from tests.integration.running import KEY

SIGNALS: Final = (signal.SIGKILL, signal.SIGSTOP)
BACK_S: Final = 180.0


def tell(kind: Kind, number: signal.Signals, load: Traffic, books: Books, **more: object) -> None:
    """One line: what clients saw, what the ledger says."""
    details = Counter(answer.detail for answer in load.answers if answer.outcome != "completed")
    slowest_s = max(answer.ended_s - answer.began_s for answer in load.answers)
    rest = "".join(f", {name} {value}" for name, value in more.items())
    print(
        f"\n{kind.name}, {number.name}: sent {len(load.answers)}, clients {books.clients}, ledger {books.ledger}, "
        f"no row {books.unbooked}, silent cuts {books.clients.get('silent', 0)}, slowest {slowest_s:.1f} s"
        f"{rest}{f', {dict(details)}' if details else ''}"
    )


async def whole(cluster: Cluster, replicas: int, gateways: int) -> None:
    """Wait until everything is there and answers."""
    await cluster.until(
        lambda: len(cluster.engines()) == replicas and len(cluster.gateways()) == gateways, "the whole cluster", BACK_S
    )
    for _ in range(int(BACK_S)):
        outcome, _ = await ask(cluster.port, KEY, "f-whole", 2, stream=True)
        if outcome == "completed":
            return
        await asyncio.sleep(1.0)
    raise AssertionError("the cluster does not answer")


def retries(cluster: Cluster) -> int:
    """Requests that gateways gave to a second replica."""
    return sum(cluster.gateway_metrics("galerne_retries_total", end="sent"))


async def struck(
    cluster: Cluster, ledger: Path, kind: Kind, number: signal.Signals, clients: int, tokens: int
) -> tuple[Traffic, Books, float]:
    """One of the kind is killed or stopped under load; the load, its books, and for how long nothing was answered."""
    async with traffic(cluster.port, KEY, clients, tokens) as load:
        await cluster.until(lambda: len(load.answers) >= 2 * clients, "answers before the blow")
        before = kind.find(cluster)
        victim = before[0]
        moment_s = load.now_s()
        victim.send_signal(number)
        if number == signal.SIGSTOP and kind.stopped_s is not None:
            await asyncio.sleep(kind.stopped_s)
            victim.send_signal(signal.SIGCONT)
        elif kind.replaced:
            await cluster.until(lambda: _succeeded(kind.find(cluster), victim, before), "its successor", BACK_S)
        later_s = load.now_s()
        await cluster.until(lambda: load.begun_since(later_s)["completed"] >= 2 * clients, "answers after it", BACK_S)
    # Over with: nobody who came after it met anything of it.
    assert load.begun_since(later_s).keys() == {"completed"}
    books = await balanced(ledger, load, may_miss=kind.has_requests)
    return load, books, load.outage_s(moment_s)


def _succeeded(found: list[psutil.Process], victim: psutil.Process, before: list[psutil.Process]) -> bool:
    """Whether there are as many again without it."""
    return victim not in found and len(found) >= len(before)


def given_to_one_other(cluster: Cluster, books: Books, before: dict[str, int], sent: int) -> None:
    """What the victim had went to one other replica of that time, or to none; never to itself or to its successor."""
    again = [row for row in books.rows if row.lost_engine]
    assert retries(cluster) - sent == len(again)
    for row in again:
        assert row.engine != row.lost_engine
        assert row.engine in before
