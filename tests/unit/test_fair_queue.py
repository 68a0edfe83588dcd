"""Who is next: service by weight within the proven bound, no credit for staying away, classes, and nobody starves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.capacity import Capacity
from serving.admission.fair_queue import (
    INPUT_WEIGHT,
    NEAR,
    OUTPUT_WEIGHT,
    PATIENCE,
    FairQueue,
    Standing,
    service_of,
)
from serving.admission.in_flight import BUSY, LEAST_FACTOR, WINDOW, InFlight


@dataclass(eq=False)
class Job:
    """A request of the simulated engine; `output_tokens` is what it will really write."""

    tenant: str
    input_tokens: float
    output_tokens: float
    written: int = 0


@dataclass
class Engine:
    """Virtual time: at each step every running sequence writes a token, then whoever fits is dispatched."""

    queue: FairQueue[Job]
    kv_tokens: float
    running: list[Job] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    most_tokens: float = 0.0
    # Seen after every charge, as the theorem counts.
    seen: Callable[[], None] = lambda: None

    def tokens(self) -> float:
        return sum(job.input_tokens + job.output_tokens for job in self.running)

    def dispatch(self) -> None:
        while (job := self.queue.next()) is not None:
            if self.running and self.tokens() + job.input_tokens + job.output_tokens > self.kv_tokens:
                break
            self.queue.take(job)
            self.running.append(job)
            self.order.append(job.tenant)
            self.most_tokens = max(self.most_tokens, self.tokens())
            self.seen()

    def step(self) -> None:
        for job in list(self.running):
            job.written += 1
            self.queue.charge(job.tenant, 0.0, 1.0)
            self.seen()
            if job.written >= job.output_tokens:
                self.running.remove(job)
                self.queue.done(job.tenant)
        self.dispatch()


TENANTS = "abcd"
lengths = st.tuples(st.integers(1, 400), st.integers(1, 60))
arrivals = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(TENANTS), st.integers(1, 12), lengths), min_size=4, max_size=30
)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries({t: st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0]) for t in TENANTS}),
    arrivals,
    st.integers(300, 3000),
)
def test_backlogged_tenants_stay_within_the_proven_bound(
    weights: dict[str, float], plan: list[tuple[int, str, int, tuple[int, int]]], kv_tokens: int
) -> None:
    queue: FairQueue[Job] = FairQueue({t: Standing(w) for t, w in weights.items()})
    engine = Engine(queue, kv_tokens)
    # Of each pair that waits: least and most that the one was ahead of the other since both began to wait.
    ahead: dict[tuple[str, str], tuple[float, float]] = {}
    worst: dict[tuple[str, str], float] = {}

    def look() -> None:
        lanes = {t: queue.lane(t) for t in TENANTS}
        for pair in combinations(TENANTS, 2):
            f, g = (lanes[t] for t in pair)
            if not f.waiting or not g.waiting:
                ahead.pop(pair, None)
                continue
            now = f.service / f.weight - g.service / g.weight
            least, most = ahead.get(pair, (now, now))
            ahead[pair] = least, most = min(least, now), max(most, now)
            worst[pair] = max(worst.get(pair, 0.0), most - least)

    engine.seen = look
    longest = max(prompt for *_, (prompt, _) in plan)
    by_step: dict[int, list[tuple[str, int, tuple[int, int]]]] = {}
    for gap, tenant, count, length in plan:
        by_step.setdefault(gap * 10, []).append((tenant, count, length))
    steps = 0
    while steps <= max(by_step) or queue or engine.running:
        for tenant, count, (prompt, output) in by_step.get(steps, []):
            for _ in range(count):
                queue.push(Job(tenant, prompt, output))
                look()
                engine.dispatch()
        engine.step()
        steps += 1
    for (f, g), gap in worst.items():
        bound = 2 * max(INPUT_WEIGHT * longest, OUTPUT_WEIGHT * engine.most_tokens) / min(weights[f], weights[g])
        assert gap <= bound + 1e-6
    # And the books: what was asked for was charged, neither more nor less.
    for tenant in TENANTS:
        asked = sum(n * service_of(p, o) for _, t, n, (p, o) in plan if t == tenant)
        assert abs(queue.lane(tenant).service - asked) < 1e-6
        assert queue.lane(tenant).in_flight == 0


def flood(weights: dict[str, float], count: int, kv_tokens: int = 1000, **standing: Any) -> Engine:
    engine = Engine(FairQueue({t: Standing(w, **standing) for t, w in weights.items()}), kv_tokens)
    for tenant in weights:
        for _ in range(count):
            engine.queue.push(Job(tenant, 50, 50))
    return engine


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


def test_four_backlogged_tenants_get_service_by_their_weights() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
    engine = flood(weights, 2000)
    engine.dispatch()
    for _ in range(4000):
        engine.step()
    assert all(engine.queue.lane(t).waiting for t in weights)
    assert jain([engine.queue.lane(t).service / w for t, w in weights.items()]) > 0.999


def test_a_flood_before_somebody_who_sends_little_does_not_stand_before_it() -> None:
    engine = flood({"heavy": 1.0}, 500)
    engine.dispatch()
    before = 0
    for step in range(2000):
        if step % 100 == 0:
            engine.queue.push(Job("light", 50, 50))
            before = len(engine.order)
        engine.step()
        if step % 100 == 99:
            # Of those dispatched since it came the light one was the first.
            assert engine.order[before] == "light"
            assert engine.order[before:].count("light") == 1


def test_who_stays_away_saves_nothing_up() -> None:
    engine = flood({"a": 1.0}, 400)
    engine.dispatch()
    for _ in range(500):
        engine.step()
    done = engine.queue.lane("a").service
    for _ in range(100):
        engine.queue.push(Job("b", 50, 50))
    for _ in range(200):
        engine.step()
    # From then on both get the same; b is not given what a had before it came.
    gained = engine.queue.lane("a").service - done
    assert abs(engine.queue.lane("b").service - gained) <= 2 * OUTPUT_WEIGHT * 1000
    assert gained > 1000


def test_classes_are_strict_and_a_tenth_goes_through() -> None:
    queue: FairQueue[Job] = FairQueue(
        {
            "person": Standing(priority="interactive"),
            "app": Standing(priority="standard"),
            "night": Standing(priority="batch"),
        }
    )
    engine = Engine(queue, 1000)
    for tenant in ("night", "person"):
        for _ in range(400):
            queue.push(Job(tenant, 50, 50))
    engine.dispatch()
    for _ in range(1000):
        engine.step()
    person, night = (queue.lane(t).service for t in ("person", "night"))
    assert engine.order[0] == "person"
    assert 1 / (PATIENCE + 2) < night / person < 1 / (PATIENCE - 2)
    # Nothing is above those who wait alone.
    while queue.lane("person").waiting:
        queue.remove(queue.lane("person").waiting[0])
    before = len(engine.order)
    for _ in range(200):
        engine.step()
    assert set(engine.order[before:]) == {"night"}


def test_service_at_other_gateways_counts_and_lifts() -> None:
    queue: FairQueue[Job] = FairQueue()
    queue.charge_elsewhere("busy", 5000.0)
    queue.elsewhere({"busy"})
    # Whoever comes is lifted to those who wait anywhere: it has saved nothing up.
    queue.push(Job("fresh", 10, 10))
    assert queue.lane("fresh").counter == 5000.0
    queue.push(Job("busy", 10, 10))
    assert queue.lane("busy").counter == 5000.0
    queue.charge_elsewhere("busy", 100.0)
    assert queue.next() is queue.lane("fresh").waiting[0]


def test_a_reload_changes_weight_and_class_of_those_who_wait() -> None:
    queue: FairQueue[Job] = FairQueue({"a": Standing(), "b": Standing()})
    queue.push(Job("a", 10, 10))
    queue.push(Job("b", 10, 10))
    queue.charge("a", 1.0, 0.0)
    assert queue.next() is queue.lane("b").waiting[0]
    queue.update({"a": Standing(2.0, "interactive"), "b": Standing()})
    assert queue.next() is queue.lane("a").waiting[0]
    assert queue.lane("a").weight == 2.0
    queue.remove(queue.lane("a").waiting[0])
    queue.update({"b": Standing()})
    assert [lane.tenant for lane in queue.lanes()] == ["b"]


# -- what is in flight


@given(st.lists(st.tuples(st.sampled_from(["push", "next", "near", "leave", "end"]), st.integers(0, 39)), max_size=120))
def test_parts_are_of_those_who_are_there_and_few_are_looked_at(steps: list[tuple[str, int]]) -> None:
    weights = {f"t{i}": 1.0 + i % 3 for i in range(40)}
    queue: FairQueue[Job] = FairQueue({t: Standing(w) for t, w in weights.items()})
    waiting: list[Job] = []
    running: list[Job] = []
    for step, number in steps:
        job = Job(f"t{number}", 10 + number, 5)
        match step:
            case "push":
                # Several at a time, or nobody ever has company.
                for i in range(number):
                    waiting.append(Job(f"t{i}", 10, 5))
                    queue.push(waiting[-1])
            case "next" if (first := queue.next()) is not None:
                queue.take(first)
                waiting.remove(first)
                running.append(first)
            case "near" if (first := queue.next()) is not None:
                near = list(queue.near(first))
                assert len(near) <= NEAR
                assert first.tenant not in {other.tenant for other in near}
                counters = [queue.lane(other.tenant).counter for other in near]
                assert counters == sorted(counters)
            case "leave" if waiting:
                queue.remove(waiting.pop(number % len(waiting)))
            case "end" if running:
                queue.done(running.pop(number % len(running)).tenant)
        there = {other.tenant for other in waiting + running}
        own = weights[job.tenant]
        expected = own / max(own, sum(weights[tenant] for tenant in there))
        assert abs(queue.fair_part(queue.lane(job.tenant)) - expected) < 1e-9


def test_as_much_is_in_flight_as_the_engines_compute() -> None:
    flight = InFlight(Capacity(64, 10_000))
    assert flight.room(1, 1, reserve=False)  # a request always fits where nothing is in flight
    flight.resize(2)
    taken = 0
    while flight.room(50, 1, reserve=False):
        flight.take(50, 1)
        taken += 1
    assert taken == 127  # of 128 slots one is kept
    assert flight.room(50, 1, reserve=True)
    flight.divide(2)
    assert not flight.room(50, 1, reserve=True)
    # What other gateways leave is ours, in ten turns.
    for _ in range(10):
        flight.others(0.0, 0, wanted=False)
    assert flight.room(50, 1, reserve=True)
    flight.others(0.0, 40, wanted=False)
    assert not flight.room(50, 1, reserve=True)
    flight.alone()
    for _ in range(taken):
        flight.give(50, 1)
    assert (flight.tokens, flight.sequences, flight.requests) == (0.0, 0, 0)


def test_more_slots_are_kept_where_more_sequences_end_in_a_step() -> None:
    flight = InFlight(Capacity(256, None))
    flight.resize(1)
    assert flight.sequences_limit() - flight.sequences_limit(keep=True) == 1
    flight.turnover(48.0)
    # In a step 256 / 48 end, and their successors travel.
    assert flight.sequences_limit() == 261
    assert flight.sequences_limit(keep=True) == 255
    # Long answers: hardly one ends in a step.
    flight.turnover(1024.0)
    assert flight.sequences_limit() - flight.sequences_limit(keep=True) == 1
    flight.turnover(16.0)
    assert flight.sequences_limit(keep=True) == 272 - 6  # never more than a fortieth of all is kept
    flight.divide(2)
    assert flight.sequences_limit(keep=True) == (272 - 6) // 2


def test_tokens_bind_and_one_that_is_larger_than_all_is_not_kept_out() -> None:
    flight = InFlight(Capacity(64, 1000))
    flight.resize(1)
    flight.take(900, 1)
    assert not flight.room(200, 1, reserve=True)
    assert not flight.room(5000, 1, reserve=True)
    flight.give(900, 1)
    flight.take(400, 1)
    assert flight.room(5000, 1, reserve=True)


def answers(flight: InFlight, delay_s: float, now_s: float, **seen: bool) -> float:
    for i in range(WINDOW):
        at_s = now_s + i * 0.01
        flight.first_byte(at_s - delay_s, at_s, **{"somebody_waits": True} | seen)
    return now_s + 1.0


def test_the_bound_shrinks_when_engines_queue_and_recovers() -> None:
    flight = InFlight(Capacity(64, 1000), first_byte_s=1.0)
    flight.resize(1)
    flight.take(900, 40)
    flight.room(200, 1, reserve=True)
    now_s = answers(flight, 0.2, 100.0)
    assert flight.factor > 1.0
    now_s = answers(flight, 5.0, now_s + 10)
    shrunk = flight.factor
    assert shrunk < 1.0
    # Of requests that were sent before the correction nothing is learnt.
    now_s = answers(flight, 5.0, now_s)
    assert flight.factor == shrunk
    for _ in range(50):
        now_s = answers(flight, 5.0, now_s + 10)
    assert flight.factor == LEAST_FACTOR
    for _ in range(50):
        now_s = answers(flight, 0.2, now_s + 10)
    assert flight.factor >= 1.0


def test_an_engine_that_is_slow_with_little_to_do_is_not_held_back() -> None:
    flight = InFlight(Capacity(64, 100_000), first_byte_s=1.0)
    flight.resize(1)
    flight.take(100, int(64 * BUSY) - 1)
    answers(flight, 9.0, 100.0)
    assert flight.factor == 1.0
    # Nor one whose best is slow: long prompts take their time.
    flight.take(100, 30)
    answers(flight, 9.0, 200.0)
    assert flight.factor == 1.0


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 30)), max_size=200))
def test_whatever_is_seen_the_bound_stays_within_its_limits(seen: list[tuple[bool, float]]) -> None:
    flight, now_s, rng = InFlight(Capacity(8, 1000)), 0.0, Random(1)
    flight.resize(1)
    for waits, delay_s in seen:
        now_s += delay_s
        if flight.room(rng.uniform(1, 300), 1, reserve=waits):
            flight.take(10.0, 1)
        flight.first_byte(now_s - delay_s, now_s, somebody_waits=waits)
        limit = flight.tokens_limit()
        assert limit is not None
        assert 250 <= limit <= 4000
        assert 1 <= flight.sequences_limit() <= 8
