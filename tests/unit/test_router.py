"""The router of one model: what each policy chooses, and that its books balance whatever happens."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.config import RoutingConfig, RoutingPolicy
from serving.engine.load import EngineLoad, Said, Share
from serving.routing.choice import Wanted
from serving.routing.policies import Candidate, Demand, Speeds, bounded_walk, cost_s, least_cost
from serving.routing.prefix_index import Prefix
from serving.routing.router import ALL_LOOKED_AT, Router

ENDS = range(100, 100_000, 100)


def prefix(*hashes: int) -> Prefix:
    return Prefix(hashes, ENDS, 100 * max(1, len(hashes)))


def router(policy: RoutingPolicy = "cost", replicas: int = 4, seed: int = 0, **fields: float) -> Router:
    made = Router(
        RoutingConfig.model_validate({"policy": policy} | fields),
        speeds=Speeds(),
        clock=lambda: 0.0,
        rng=Random(seed),
    )
    for i in range(replicas):
        made.join(f"r{i}")
    return made


def send(to: Router, *hashes: int, session: str | None = None, end: bool = True) -> str:
    wanted = Wanted(prefix(*hashes), session)
    choice = to.choose(wanted)
    assert choice is not None
    turn = to.begin(choice, wanted)
    if end:
        turn.answered()
        turn.end()
    return choice.seat.name


# -- adapters


def adapted(replicas: int, held: int) -> Router:
    made = Router(RoutingConfig(), speeds=Speeds(), clock=lambda: 0.0, rng=Random(1), adapters_held=held)
    for i in range(replicas):
        made.join(f"r{i}")
    return made


def ask(to: Router, adapter: str, tokens: int = 100, exclude: frozenset[str] = frozenset()) -> tuple[str, str]:
    wanted = Wanted(Prefix((), ENDS, tokens), adapter=adapter)
    choice = to.choose(wanted, exclude)
    assert choice is not None
    turn = to.begin(choice, wanted)
    turn.answered()
    turn.end()
    return choice.seat.name, choice.reason


@pytest.mark.parametrize("replicas", [3, 3 * ALL_LOOKED_AT])
def test_an_adapter_stays_where_it_is_loaded(replicas: int) -> None:
    made = adapted(replicas, held=2)
    (first, _), *later = [ask(made, "style") for _ in range(6)]
    assert later == [(first, "adapter")] * 5
    # A queue longer than a load takes is reason enough for a second copy.
    busy = made.begin(made.choose(Wanted(Prefix((), ENDS, 100), adapter="style")), Wanted(Prefix((), ENDS, 50_000)))
    second, _ = ask(made, "style")
    assert second != first
    busy.end()
    assert ask(made, "style", exclude=frozenset({first, second}))[0] not in {first, second}


def test_the_adapter_used_longest_ago_makes_room() -> None:
    made = adapted(1, held=2)
    for name in ("a", "b", "a", "c"):
        ask(made, name)
    assert list(made.seats[0].adapters) == ["a", "c"]
    (row,) = made.explain(Wanted(Prefix((), ENDS, 100), adapter="b"))["candidates"]
    assert row["adapter_loaded"] is False
    (row,) = made.explain(Wanted(Prefix((), ENDS, 100), adapter="a"))["candidates"]
    assert row["adapter_loaded"] is True


def test_a_replica_that_left_holds_no_adapter() -> None:
    made = adapted(2, held=2)
    name, _ = ask(made, "style")
    made.leave(next(seat for seat in made.seats if seat.name == name))
    other, reason = ask(made, "style")
    assert (other != name, reason) == (True, "only")


# -- cost, the pure function

IDLE = Candidate(0, 0, 0)
SPEEDS = Speeds()


@pytest.mark.parametrize(
    ("candidates", "demand", "chosen"),
    [
        ([Candidate(500, 1, 500), IDLE], Demand(1000), 1),
        ([IDLE._replace(cached_tokens=900), IDLE], Demand(1000), 0),
        # Worth a wait of 24 times the saved computation, and no longer.
        ([Candidate(20_000, 2, 0, 900), IDLE], Demand(1000), 0),
        ([Candidate(22_000, 2, 0, 900), IDLE], Demand(1000), 1),
        # The more share the prefix, the sooner it is copied.
        ([Candidate(20_000, 2, 0, 900), IDLE], Demand(1000, sharers=2), 1),
        ([Candidate(800, 2, 0, 900), IDLE], Demand(1000, sharers=9), 0),
        ([Candidate(1000, 2, 0, 900), IDLE], Demand(1000, sharers=9), 1),
        # Where all else is equal, who has worked less; never against a queue longer than the prompt.
        ([Candidate(0, 0, 0, 0, 5000), Candidate(0, 0, 0, 0, -5000)], Demand(1000), 1),
        ([Candidate(2500, 0, 0, 0, -1e9), Candidate(0, 0, 0, 0, 1e9)], Demand(1000), 1),
        ([Candidate(0, 3, 0), Candidate(0, 2, 0)], Demand(0), 1),
    ],
)
def test_the_cheapest(candidates: list[Candidate], demand: Demand, chosen: int) -> None:
    assert least_cost(candidates, demand, SPEEDS, 24.0) == chosen
    turned = [*candidates[1:], candidates[0]]
    assert turned[least_cost(turned, demand, SPEEDS, 24.0)] == candidates[chosen]


def test_a_cost_is_in_seconds() -> None:
    alone = cost_s(
        IDLE, Demand(10_000), Speeds(prefill_tokens_per_s=10_000, decode_s=0.0, decode_s_per_sequence=0.0), 1
    )
    assert alone == pytest.approx(1.0)
    # Every pass of 2,048 tokens gives 10 running answers their tokens too.
    busy = cost_s(Candidate(0, 10, 0), Demand(2048), Speeds(2048, decode_s=0.01, decode_s_per_sequence=0.001), 1)
    assert busy == pytest.approx(1.02)


# -- the router


def test_a_conversation_stays_and_new_ones_spread() -> None:
    made = router()
    home = {talk: send(made, talk, end=False) for talk in range(4)}
    assert len(set(home.values())) == 4
    for turn in range(1, 6):
        for talk, replica in home.items():
            assert send(made, *range(talk, talk + 1), *(talk * 100 + i for i in range(turn))) == replica


def test_a_popular_prefix_spreads_when_its_replica_has_a_queue() -> None:
    made = router()
    seen = [send(made, 1, 2, 3, 1000 + i, end=False) for i in range(40)]
    assert set(seen) == {"r0", "r1", "r2", "r3"}
    assert max(seen.count(name) for name in set(seen)) <= 14


def test_the_reason_is_told() -> None:
    made = router(replicas=2)
    first = made.choose(Wanted(prefix(1, 2)))
    assert first is not None
    assert (first.reason, first.cached_tokens) == ("tie", 0)
    made.begin(first, Wanted(prefix(1, 2))).answered()
    again = made.choose(Wanted(prefix(1, 2, 3)))
    assert again is not None
    assert (again.seat, again.reason, again.cached_tokens, again.most_cached_tokens) == (first.seat, "prefix", 200, 200)
    assert b"reason=prefix" in again.described()
    other = made.choose(Wanted(prefix(7)))
    assert other is not None
    assert (other.reason, other.seat is first.seat) == ("load", False)
    left = made.choose(Wanted(prefix(1, 2, 3)), {first.seat.name})
    assert left is not None
    assert (left.reason, left.seat is first.seat, left.most_cached_tokens) == ("only", False, 200)
    assert made.choose(Wanted(), {"r0", "r1"}) is None


def test_a_prompt_that_was_not_computed_is_not_remembered() -> None:
    made = router()
    choice = made.choose(Wanted(prefix(1, 2)))
    assert choice is not None
    turn = made.begin(choice, Wanted(prefix(1, 2)))
    assert made.index.match(prefix(1, 2)), "who asks for the same meanwhile finds it"
    turn.end()
    assert not made.index.match(prefix(1, 2))


def test_others_are_told_of_what_is_placed_and_not_of_what_failed() -> None:
    made = router(replicas=1)
    send(made, 1, 2)
    made.shares = True
    send(made, 3, 4)
    send(made)
    choice = made.choose(Wanted(prefix(5, 6)))
    assert choice is not None
    turn = made.begin(choice, Wanted(prefix(5, 6)))
    assert list(made.seats[0].placed) == [(3, 4), (5, 6)]
    turn.end()
    assert list(made.seats[0].placed) == [(3, 4)]


def test_a_replica_that_leaves_is_forgotten_with_what_it_held() -> None:
    made = router(replicas=2)
    name = send(made, 1, 2, 3)
    made.leave(next(seat for seat in made.seats if seat.name == name))
    assert send(made, 1, 2, 3) != name
    assert made.index.blocks == 3


def test_many_replicas_are_not_all_looked_at_and_holders_are_found() -> None:
    made = router(replicas=10 * ALL_LOOKED_AT)
    home = send(made, 1, 2, 3)
    assert {send(made, 1, 2, 3, 100 + i) for i in range(30)} == {home}
    assert len({send(made, 1000 + i, end=False) for i in range(100)}) > 50


def test_round_robin_takes_turns() -> None:
    made = router("round-robin", replicas=3)
    seen = [send(made, 1) for _ in range(9)]
    assert sorted(seen[:3]) == ["r0", "r1", "r2"]
    assert seen[:3] * 3 == seen


def test_sessions_stay_and_few_move_when_a_replica_goes() -> None:
    made = router("session", replicas=5)
    home = {f"s{i}": send(made, session=f"s{i}") for i in range(200)}
    assert set(home.values()) == {f"r{i}" for i in range(5)}
    assert {name: send(made, session=name) for name in home} == home
    assert {name: send(router("session", replicas=5, seed=9), session=name) for name in list(home)[:20]}.items() <= (
        home.items()
    ), "the same in every gateway"
    made.leave(made.seats[2])
    moved = {name for name in home if send(made, session=name) != home[name]}
    assert moved == {name for name, replica in home.items() if replica == "r2"}


def test_a_session_has_its_replica_only_as_far_as_load_allows() -> None:
    made = router("session", replicas=4, session_load=1.25)
    seen = [send(made, session="one", end=False) for _ in range(100)]
    assert max(seen.count(name) for name in set(seen)) <= 32  # 1.25 x 100 / 4, rounded up
    assert len(set(seen)) == 4


def test_a_walk_ends_with_the_first_where_nobody_has_room() -> None:
    assert bounded_walk([2, 0, 1], lambda i: 99, 3, 3, 1.25) == 2
    with pytest.raises(ValueError, match="without replicas"):
        bounded_walk([], lambda i: 0, 0, 1, 1.25)


# -- other gateways' requests


def said(in_flight: int = 0, tokens: int = 0, waiting: int = 0) -> Said:
    return Said(EngineLoad(running=in_flight, kv_use=0.25), Share(in_flight, tokens, waiting))


@pytest.mark.parametrize("policy", ["cost", "power-of-two", "session"])
def test_what_others_have_on_a_replica_counts_as_load(policy: RoutingPolicy) -> None:
    made = router(policy, replicas=2)
    made.hear(made.seats[0], said(40, 40_000, 40_000))
    assert {send(made, 1000 + i, session=f"s{i}", end=False) for i in range(10)} == {"r1"}
    made.hear(made.seats[0], said())
    made.hear(made.seats[1], said(40, 40_000, 40_000))
    assert {send(made, 2000 + i, session=f"t{i}", end=False) for i in range(10)} == {"r0"}


def test_others_running_answers_count_in_step_time() -> None:
    made = Router(RoutingConfig(), speeds=Speeds(decode_s_per_context_token=1e-6), clock=lambda: 0.0, rng=Random(1))
    for i in range(2):
        made.join(f"r{i}")
    made.hear(made.seats[0], said(0, 50_000, 0))
    assert {send(made, 1000 + i) for i in range(5)} == {"r1"}


@pytest.mark.parametrize("policy", ["cost", "power-of-two", "session", "round-robin"])
def test_alone_it_chooses_as_if_nothing_were_said(policy: RoutingPolicy) -> None:
    told, untold = router(policy), router(policy)
    for i in range(200):
        for seat in told.seats:
            told.hear(seat, said())
        hashes = (i % 7, 100 + i % 13, 1000 + i)
        assert send(told, *hashes, session=f"s{i % 9}", end=i % 3 > 0) == send(
            untold, *hashes, session=f"s{i % 9}", end=i % 3 > 0
        )


def test_what_was_said_ages_and_goes_with_its_replica() -> None:
    now_s = 0.0
    made = Router(RoutingConfig(policy="session"), speeds=Speeds(), clock=lambda: now_s, rng=Random(1))
    for i in range(3):
        made.join(f"r{i}")
    first, second, third = made.seats
    made.hear(first, said(5))
    now_s = 4.0
    made.hear(second, said(7))
    now_s = 6.0
    made.forget_said(5.0)
    assert (first.requests, second.requests) == (0, 7)
    made.leave(second)
    made.hear(second, said(9))
    made.hear(third, said(2))
    made.leave(third)
    assert made._others_in_flight == 0


def test_what_others_have_is_explained() -> None:
    made = router(replicas=2)
    made.hear(made.seats[0], said(3, 900, 300))
    choice = made.choose(Wanted(prefix(1, 2)))
    assert choice is not None
    assert b"others_in_flight=0" in choice.described()
    first, second = made.explain(Wanted(prefix(1, 2)))["candidates"]
    assert (first["in_flight"], first["others_in_flight"], first["others_waiting_tokens"]) == (3, 3, 300)
    assert (first["engine_running"], first["engine_waiting"], first["engine_kv_use"]) == (3, 0, 0.25)
    assert (second["others_in_flight"], second["engine_running"]) == (0, None)


def test_what_another_gateway_has_placed_is_held_there() -> None:
    made = router(replicas=2)
    made.learn(made.seats[1], Prefix((1, 2, 3), ENDS, 0))
    choice = made.choose(Wanted(prefix(1, 2, 3, 4)))
    assert choice is not None
    assert (choice.seat.name, choice.reason, choice.cached_tokens) == ("r1", "prefix", 300)
    assert not made.seats[1].placed
    left = made.seats[1]
    made.leave(left)
    made.learn(left, Prefix((7,), ENDS, 0))
    assert made.index.blocks == 0


class Books(RuleBasedStateMachine):
    """Requests begin, are answered or not, end; replicas come and go, some with requests on them."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.router = Router(RoutingConfig(index_blocks=200), speeds=Speeds(), clock=lambda: self.now_s, rng=Random(1))
        self.turns: list[object] = []
        self.names = 0

    @rule()
    def come(self) -> None:
        self.router.join(f"n{self.names}", 2000)
        self.names += 1

    @precondition(lambda self: self.router.seats)
    @rule(which=st.integers(0, 100))
    def go(self, which: int) -> None:
        self.router.leave(self.router.seats[which % len(self.router.seats)])

    @precondition(lambda self: self.router.seats)
    @rule(path=st.lists(st.integers(0, 2), max_size=6), seconds=st.sampled_from([0.0, 1.0, 50_000.0]))
    def begin(self, path: list[int], seconds: float) -> None:
        self.now_s += seconds
        names = tuple(hash(tuple(path[: i + 1])) for i in range(len(path)))
        choice = self.router.choose(Wanted(prefix(*names)))
        assert choice is not None
        self.turns.append(self.router.begin(choice, Wanted(prefix(*names))))

    @precondition(lambda self: self.turns)
    @rule(which=st.integers(0, 100), answered=st.booleans())
    def end(self, which: int, answered: bool) -> None:
        turn = self.turns.pop(which % len(self.turns))
        if answered:
            turn.answered()  # type: ignore[attr-defined]
        turn.end()  # type: ignore[attr-defined]
        turn.end()  # type: ignore[attr-defined]

    @invariant()
    def nothing_below_zero(self) -> None:
        for seat in self.router.seats:
            assert seat.in_flight >= 0
            assert seat.waiting_tokens >= 0
            assert seat.in_flight_tokens >= 0
        assert self.router.index.blocks <= 200

    def teardown(self) -> None:
        while self.turns:
            self.end(0, answered=True)
        for seat in self.router.seats:
            assert (seat.in_flight, seat.waiting_tokens, seat.in_flight_tokens) == (0, 0, 0)
        assert self.router.in_flight == 0
        assert self.router.sharing_blocks == 0
        while self.router.seats:
            self.router.leave(self.router.seats[0])
        assert self.router.index.blocks == 0
        super().teardown()


TestBooks = Books.TestCase
