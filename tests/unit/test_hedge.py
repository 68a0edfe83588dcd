"""A request whose first byte is late goes to a second replica too: one answer, one of each book, and nothing left over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import product
from random import Random
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from serving.api.exchange import Exchange, Sent
from serving.api.hedge import Hedging, hedge_after_s
from serving.api.upstream import Connection, Pool, UpstreamError
from serving.api.watch import Watch
from serving.config import FakeEngineConfig, GalerneConfig, GatewayFaultsConfig, ModelConfig
from serving.metrics.gateway import GatewayMetrics
from serving.routing.health import Health
from serving.routing.replicas import Endpoint, Lease, ReplicaSet
from serving.routing.retry_budget import LEAST, RetryBudget, Turn
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, NO_HOLD, Rig, configuration, rig

STREAM = CHAT | {"stream": True}
SOON: dict[str, Any] = NO_HOLD | {"faults": {"hedge_after_s": 0.02}}
PATIENCE_S = 10.0

Does = Callable[[Any, Any, Any], Awaitable[None]]


class Stage:
    """What the engines do with the requests that come, in the order of coming; those after the last are answered."""

    def __init__(self, *does: str) -> None:
        self.does = does
        # Which engine got each.
        self.came: list[int] = []
        self.left: list[int] = []
        self._go = [asyncio.Event() for _ in does]
        self._engines = 0

    def wrap(self, app: Any) -> Any:
        engine = self._engines
        self._engines += 1

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            number = len(self.came)
            self.came.append(engine)
            does = self.does[number] if number < len(self.does) else "answers"
            if does == "answers":
                await app(scope, receive, send)
                return
            while (await receive()).get("more_body"):
                pass
            if does == "hangs":
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.left.append(number)
                return
            await self._go[number].wait()
            status = 500 if does == "fails" else 200
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            if does == "dies":
                return  # the server closes the connection on the unfinished answer
            await send({"type": "http.response.body", "body": b"data: late\n\n"})

        return wrapped

    def go(self, *numbers: int) -> None:
        """Let these of the requests that wait go on; without one all of them."""
        for number in numbers or range(len(self._go)):
            self._go[number].set()

    async def until(self, came: int) -> None:
        """Wait until so many requests have come."""
        await until(lambda: len(self.came) >= came)


async def ask(made: Rig, body: dict[str, Any] = STREAM) -> Any:
    return await made.http.post(COMPLETIONS, headers=AUTH, json=body)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.005)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each turn that was asked for, whether there was one."""
    asked: list[bool] = []
    turn = RetryBudget.turn

    async def told(budget: RetryBudget, wait_s: float) -> Turn | None:
        found = await turn(budget, wait_s)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(RetryBudget, "turn", told)
    return asked


async def test_a_slow_replica_is_overtaken_and_freed_and_not_blamed() -> None:
    # More in a row than what ejects a replica that fails.
    stage = Stage(*["hangs", "answers"] * 6)
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        for number in range(6):
            answer = await ask(made)
            assert answer.status_code == 200
            assert answer.text.count("[DONE]") == 1
            first, second = stage.came[2 * number :]
            assert first != second
        await made.settled()
        assert stage.left == [0, 2, 4, 6, 8, 10]
        assert made.total("galerne_hedges_total", model="chat", won="second") == 6
        assert made.total("galerne_hedges_total") == 6
        assert made.total("galerne_requests_finished_total", outcome="completed") == 6
        health = made.gateway.health["chat"]
        assert made.total("galerne_replica_ejections_total") == made.total("galerne_upstream_errors_total") == 0
        assert not health.ejections._records
        assert health.budget.retrying == 0


async def test_the_first_may_win_after_all() -> None:
    stage = Stage("late", "hangs")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        asked = asyncio.create_task(ask(made))
        await stage.until(2)
        stage.go()
        assert (await asked).text == "data: late\n\n"
        await made.settled()
        assert stage.left == [1]
        assert made.total("galerne_hedges_total", won="first") == made.total("galerne_hedges_total") == 1


@pytest.mark.parametrize("does", list(product(["dies", "fails"], repeat=2)))
async def test_both_fail_and_the_client_hears_it_once(does: tuple[str, str]) -> None:
    stage = Stage(*does)
    async with rig(FAST, FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        asked = asyncio.create_task(ask(made))
        await stage.until(2)
        stage.go()
        answer = await asked
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] in {"engine_failed", "stream_cut"}
        assert len(stage.came) == 2
        assert made.total("galerne_hedges_total", won="neither") == made.total("galerne_hedges_total") == 1
        assert made.total("galerne_upstream_errors_total") == 2
        assert made.total("galerne_retries_total") == made.total("galerne_retries_total", end="no_replica") == 1
        assert made.total("galerne_requests_finished_total", outcome="failed") == 1


async def test_one_that_fails_leaves_it_to_the_other() -> None:
    stage = Stage("fails", "late")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        asked = asyncio.create_task(ask(made))
        await stage.until(2)
        stage.go(0)
        await until(lambda: made.total("galerne_upstream_errors_total", kind="server_error"))
        assert not made.gateway.health["chat"].ejections._records
        stage.go(1)
        assert (await asked).text == "data: late\n\n"
        assert made.total("galerne_hedges_total", won="second") == made.total("galerne_hedges_total") == 1
        # The other's answer shows that the request was good: the failure is the replica's.
        assert made.gateway.health["chat"].ejections._records[f"r{stage.came[0]}"].failures == 1
        assert made.total("galerne_retries_total") == 0


async def test_a_client_that_leaves_frees_both() -> None:
    stage = Stage("hangs", "hangs")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        asked = asyncio.create_task(ask(made))
        await stage.until(2)
        asked.cancel()
        await made.settled()
        assert sorted(stage.left) == [0, 1]
        assert made.total("galerne_hedges_total", won="neither") == made.total("galerne_hedges_total") == 1
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == 1
        assert made.gateway.health["chat"].budget.retrying == 0


async def test_a_client_that_leaves_before_the_hedge_frees_the_first() -> None:
    stage = Stage("hangs")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=NO_HOLD | {"faults": {"hedge_after_s": 500.0}}) as made:
        asked = asyncio.create_task(ask(made))
        await stage.until(1)
        asked.cancel()
        await made.settled()
        assert stage.left == [0]
        assert made.total("galerne_hedges_total") == 0
        assert made.total("galerne_requests_finished_total", outcome="cancelled") == 1


async def test_without_budget_there_is_no_hedge(turns: list[bool]) -> None:
    stage = Stage("late")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        taken = [await made.gateway.health["chat"].budget.turn(0) for _ in range(LEAST)]
        asked = asyncio.create_task(ask(made))
        # It is asked for again and again.
        await until(lambda: len(turns) > LEAST + 2)
        stage.go()
        assert (await asked).text == "data: late\n\n"
        assert turns[:LEAST] == [True] * LEAST
        assert not any(turns[LEAST:])
        assert len(stage.came) == 1
        assert made.total("galerne_hedges_total") == 0
        for turn in taken:
            assert turn is not None
            turn.end()


async def test_a_hedge_comes_when_there_is_room_for_it(turns: list[bool]) -> None:
    stage = Stage("hangs")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON) as made:
        taken = [await made.gateway.health["chat"].budget.turn(0) for _ in range(LEAST)]
        asked = asyncio.create_task(ask(made))
        await until(lambda: len(turns) > LEAST)
        for turn in taken:
            assert turn is not None
            turn.end()
        assert (await asked).status_code == 200
        assert made.total("galerne_hedges_total", won="second") == 1


async def test_a_second_replica_that_cannot_be_reached_is_none(turns: list[bool]) -> None:
    stage = Stage("late")
    async with rig(FAST, dead=1, wrap=stage.wrap, chat=SOON) as made:
        asked = asyncio.create_task(ask(made))
        await until(lambda: turns and not made.gateway.health["chat"].budget.retrying)
        assert made.total("galerne_upstream_errors_total", kind="connect") > 0
        stage.go()
        assert (await asked).text == "data: late\n\n"
        assert made.total("galerne_hedges_total") == made.total("galerne_retries_total") == 0


async def test_a_first_that_fails_alone_is_retried_as_ever() -> None:
    stage = Stage("dies")
    stage.go()
    async with rig(FAST, FAST, wrap=stage.wrap, chat=NO_HOLD | {"faults": {"hedge_after_s": 500.0}}) as made:
        assert (await ask(made)).status_code == 200
        assert made.total("galerne_retries_total", kind="broken", end="sent") == 1
        assert made.total("galerne_hedges_total") == 0


async def test_no_answer_in_time_is_a_timeout_and_counts_from_the_first_sending() -> None:
    stage = Stage("hangs", "hangs")
    async with rig(FAST, FAST, wrap=stage.wrap, chat=SOON, response_timeout_s=0.3) as made:
        assert (await ask(made)).status_code == 504
        await made.settled()
        assert sorted(stage.left) == [0, 1]
        assert made.total("galerne_hedges_total", won="neither") == 1
        # The one that had the whole time.
        assert made.gateway.health["chat"].ejections.out == {f"r{stage.came[0]}"}


@pytest.mark.parametrize(
    ("task", "stream", "hedged"),
    [("generate", True, True), ("generate", False, False), ("embed", False, True)],
)
def test_only_what_answers_soon_is_hedged(task: Any, stream: bool, hedged: bool) -> None:
    model = ModelConfig.model_validate({"id": "m", "source": "fake:m", "task": task, "faults": {"hedge_after_s": 2.0}})
    assert hedge_after_s(model, stream=stream) == (2.0 if hedged else None)
    assert hedge_after_s(ModelConfig(id="m", source="fake:m", task=task), stream=stream) is None


async def test_a_text_in_one_piece_goes_to_one_replica() -> None:
    stage = Stage()
    slow = FakeEngineConfig(decode_ms=20)
    async with rig(slow, slow, wrap=stage.wrap, chat=SOON) as made:
        assert (await ask(made, CHAT)).status_code == 200
        assert len(stage.came) == 1


def test_a_hedge_later_than_the_timeout_is_refused() -> None:
    with pytest.raises(ValidationError, match="response_timeout_s"):
        configuration({"faults": {"hedge_after_s": 5.0}}, response_timeout_s=5.0)
    assert isinstance(configuration({"faults": {"hedge_after_s": 5.0}}, response_timeout_s=5.1), GalerneConfig)


# -- every order of everything that two replicas can do, without sockets

Came = Literal["answer", "500", "event", "broken", "nothing"]
BYTES: dict[Came, bytes] = {
    "answer": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata: 1\n\n",
    "500": b"HTTP/1.1 500 X\r\ncontent-length: 1\r\n\r\nx",
    "event": b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata: {"error": {"code": 500}}\n\n',
}


class Wire(asyncio.Transport):
    """A transport without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def writelines(self, list_of_data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class Bench:
    """A hedge between two connections that do what they are told."""

    def __init__(self, response_timeout_s: float = PATIENCE_S) -> None:
        model = ModelConfig(id="chat", source="fake:chat")
        clock = time.monotonic
        metrics = GatewayMetrics(clock)
        self.endpoints = (Endpoint("r0", "127.0.0.1", 1), Endpoint("r1", "127.0.0.1", 2))
        self.replicas = ReplicaSet([model], Random(1), clock=clock)
        self.replicas.update("chat", self.endpoints)
        self.health = Health([model], clock, metrics)
        self.health.update("chat", self.endpoints)
        pool = Pool(1.0)
        faults = GatewayFaultsConfig()
        self.watch = Watch(pool, self.health, faults, engine_token="", clock=clock, on_slow=lambda _: None)
        self.connected = asyncio.Event()
        self.failures: list[str] = []
        self.hedges: list[str] = []
        self.wires: list[Wire] = []
        self.connections = [self._connection(), self._connection()]
        self.exchange = Exchange("chat", COMPLETIONS, b"{}", "id", started_s=clock(), stream=True)
        self.hedging = Hedging(
            self.replicas,
            pool,
            self.health,
            self.watch,
            self._connect,
            response_timeout_s=response_timeout_s,
            on_failure=lambda _, kind: self.failures.append(kind),
            on_hedge=lambda _, won: self.hedges.append(won),
        )

    def _connection(self) -> Connection:
        made = Connection(asyncio.get_running_loop(), lambda _: None)
        self.wires.append(Wire())
        made.connection_made(self.wires[-1])
        made.send(b"", b"")
        return made

    async def _connect(self, exchange: Exchange, without: frozenset[str]) -> tuple[Lease, Connection] | None:
        self.connected.set()
        lease = self.replicas.lease("chat", without)
        if lease is None:
            return None
        exchange.engine_request_id = "second"
        return lease, self.connections[1]

    def begin(self, after_s: float) -> asyncio.Task[tuple[Lease, Connection]]:
        lease = self.replicas.lease("chat")
        assert lease is not None
        self.first = lease.endpoint
        self.second = next(e for e in self.endpoints if e != self.first)
        self.exchange.engine_request_id = "first"
        return asyncio.ensure_future(self.hedging.leader(self.exchange, lease, self.connections[0], after_s))

    def comes(self, which: int, what: Came) -> None:
        if what == "broken":
            self.connections[which].connection_lost(None)
        elif what != "nothing":
            self.connections[which].data_received(BYTES[what])

    def balanced(self, leader: Lease | None) -> None:
        """Nothing is left over but the leader's own."""
        busy = {name: n for name, n in self.replicas.in_flight("chat").items() if n}
        assert busy == ({} if leader is None else {leader.endpoint.replica_id: 1})
        assert self.health["chat"].budget.retrying == 0
        assert not self.watch._attempts
        assert not self.exchange.waits


EVENTS: tuple[Came, ...] = ("answer", "500", "event", "broken", "nothing")


@pytest.mark.parametrize("order", [(0, 1), (1, 0), None])
@pytest.mark.parametrize(("first", "second"), list(product(EVENTS, repeat=2)))
async def test_every_race_has_one_end(first: Came, second: Came, order: tuple[int, int] | None) -> None:
    what = (first, second)
    bench = Bench(response_timeout_s=0.2 if "answer" not in what and "nothing" in what else PATIENCE_S)
    race = bench.begin(0.001)
    await bench.connected.wait()
    await asyncio.sleep(0)
    for which in order or (0, 1):
        bench.comes(which, what[which])
        if order is not None:
            # Several turns of the loop: it is dealt with before the other comes.
            for _ in range(5):
                await asyncio.sleep(0)
    lease, connection = await race
    await asyncio.sleep(0)
    bench.balanced(lease)

    good = [which for which in order or (0, 1) if what[which] == "answer"]
    bad = [which for which in order or (0, 1) if what[which] in {"500", "event", "broken"}]
    if good:
        expected, won = good[0], ("first", "second")[good[0]]
    else:
        # Neither: the failure that came last, or the silence of who is left, is what the client hears.
        expected, won = (bad[-1] if len(bad) == 2 else 1 - bad[0] if bad else 0), "neither"
    assert connection is bench.connections[expected]
    assert bench.hedges == [won]
    other = 1 - expected
    ends = (Sent(bench.first, "first"), Sent(bench.second, "second"))
    assert (bench.exchange.engine, bench.exchange.engine_request_id) == ends[expected]
    assert bench.exchange.lost == ends[other]
    assert bench.wires[other].aborted or what[other] == "broken"
    # Held against a replica is that it failed before the race was decided, and never that it was slow.
    late = {1 - good[0]} if good and order is not None and order[0] == good[0] else set()
    blamed = [which for which in bad if which != expected and which not in late]
    assert bench.exchange.spent == {ends[w].engine.replica_id for w in blamed}
    assert len(bench.failures) == len(blamed)
    if won == "neither":
        kind = {"500": None, "event": None, "broken": "broken", "nothing": "timeout"}[what[expected]]
        if kind is not None:
            with pytest.raises(UpstreamError) as error:
                await connection.begun()
            assert error.value.kind == kind
    else:
        assert await connection.read() == b"data: 1\n\n"


@pytest.mark.parametrize("first", [True, False])
async def test_a_byte_in_the_turn_in_which_the_time_is_up_saves_the_hedge(first: bool) -> None:
    bench = Bench()
    race = bench.begin(0.01)
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.009 if first else 0.011, bench.comes, 0, "answer")
    # Both timers are due before the loop looks again.
    time.sleep(0.02)
    lease, connection = await race
    assert connection is bench.connections[0]
    assert not bench.connected.is_set()
    assert bench.hedges == []
    assert bench.exchange.lost is None
    bench.balanced(lease)


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_a_replica_with_as_much_to_do_gets_no_hedge(others: int) -> None:
    bench = Bench()
    race = bench.begin(0.001)
    elsewhere = [bench.replicas.lease("chat", frozenset({bench.first.replica_id})) for _ in range(others)]
    await bench.connected.wait()
    bench.comes(0, "answer")
    _, connection = await race
    await asyncio.sleep(0)
    assert connection is bench.connections[0]
    # With one that has nothing to do there were two to answer.
    assert bench.hedges == ([] if others else ["first"])
    assert len(elsewhere) == others
    assert bench.health["chat"].budget.retrying == 0


async def test_a_race_that_is_cancelled_leaves_nothing_behind() -> None:
    bench = Bench()
    race = bench.begin(0.001)
    await bench.connected.wait()
    await asyncio.sleep(0)
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    await asyncio.sleep(0)
    bench.balanced(None)
    assert all(wire.aborted for wire in bench.wires)
    assert bench.hedges == ["neither"]
    # What the ledger asks about: the first as the request's own, the second as lost.
    assert bench.exchange.engine == bench.first
    assert bench.exchange.lost == Sent(bench.second, "second")
