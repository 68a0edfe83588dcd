"""Chooses among the replicas of one model, and keeps what that choice needs: loads, cached prefixes, recent work.

The gateway and the simulator run this same code; nothing here knows of sockets. The work of a choice is bounded
whatever the number of replicas: beyond `ALL_LOOKED_AT` of them it looks at those that hold most of the prompt and at
some at random, as power of two choices does.

Loads are everybody's: this gateway's own requests, exactly, and those of others as each replica's port said last.

Promises: every `Turn` that begins ends, and takes back exactly what it added; a replica that has left is not chosen.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from random import Random
from typing import Any, Final, NamedTuple

from serving.config import RoutingConfig
from serving.engine.load import Said
from serving.routing.choice import NOTHING, Choice, Reason, Wanted
from serving.routing.policies import Candidate, Demand, Speeds, bounded_walk, cost_s, least_cost, less_loaded_of_two
from serving.routing.prefix_index import Held, Prefix, PrefixIndex
from serving.routing.ring import Ring
from serving.routing.seat import Seat

ALL_LOOKED_AT: Final = 16
HOLDERS_LOOKED_AT: Final = 4
DRAWN: Final = 4
# An adapter that a replica does not hold is read, checked and moved while everybody on it waits: an assumption of the
# order of what an engine needs for one of some ten megabytes.
ADAPTER_LOAD_S: Final = 0.2
# Work counts as recent for about so long.
RECENT_S: Final = 600.0
_RESCALE_AT: Final = 1e12
DEFAULT_KV_TOKENS: Final = 262_144


class _Seen(NamedTuple):
    """What a policy is shown for one request; `candidates` in the order of `seats`."""

    seats: list[Seat]
    candidates: list[Candidate]
    demand: Demand
    most_cached_tokens: int


class Turn:
    """One request on its replica, from the choice to its end."""

    __slots__ = ("_answered", "_ended", "_router", "choice", "prefix", "uncached_tokens")

    def __init__(self, router: Router, choice: Choice, wanted: Wanted) -> None:
        self._router = router
        self.choice = choice
        prefix = self.prefix = wanted.prefix
        self.uncached_tokens = 0 if prefix is None else prefix.tokens - choice.cached_tokens
        self._answered = self._ended = False
        router._begin(choice.seat, prefix, self.uncached_tokens)
        if wanted.adapter is not None:
            router._hold(choice.seat, wanted.adapter)

    def answered(self) -> None:
        """The first byte is here: the prompt is computed."""
        if not self._answered:
            self._answered = True
            self.choice.seat.waiting_tokens -= self.uncached_tokens

    def end(self) -> None:
        """The request has left its replica; without `answered`, its prompt was not computed."""
        if not self._ended:
            self._ended = True
            self._router._end(self.choice, self.prefix, computed=self._answered)
            self.answered()


class Router:
    """The replicas of one model. Used from one event loop only."""

    def __init__(
        self,
        config: RoutingConfig,
        *,
        speeds: Speeds,
        clock: Callable[[], float],
        rng: Random,
        adapters_held: int = 0,
    ) -> None:
        """`adapters_held`: LoRA adapters that each replica keeps in memory."""
        self._config = config
        self.speeds = speeds
        self._adapters_held = adapters_held
        self._holders: dict[str, dict[int, Seat]] = {}
        self._clock = clock
        self._rng = rng
        self.index = PrefixIndex(config.index_blocks)
        # Whether other gateways are to hear what is placed where.
        self.shares = False
        self.seats: list[Seat] = []
        self._by_slot: dict[int, Seat] = {}
        self._ring = Ring(())
        self._turns = 0
        self._in_flight = 0
        self._others_in_flight = 0
        self._recent = 0.0
        self._since_s = clock()
        # Requests under way by the blocks of their prompts.
        self._sharers: dict[int, int] = {}

    @property
    def in_flight(self) -> int:
        """This gateway's requests on all replicas."""
        return self._in_flight

    @property
    def sharing_blocks(self) -> int:
        """Blocks of the requests under way, each counted once."""
        return len(self._sharers)

    # -- replicas

    def join(self, name: str, kv_tokens: int = DEFAULT_KV_TOKENS) -> Seat:
        """A replica that takes requests from now on."""
        seat = Seat(name, self.index.join(kv_tokens))
        # As if it had worked like the others: an empty one is found by its queue, not flooded.
        seat.recent = self._recent / len(self.seats) if self.seats else 0.0
        self._recent += seat.recent
        self._by_slot[seat.slot] = seat
        self._seated([*self.seats, seat])
        return seat

    def leave(self, seat: Seat) -> None:
        """A replica that takes none any more; its requests end as they end."""
        self.index.leave(seat.slot)
        del self._by_slot[seat.slot]
        for adapter in seat.adapters:
            del self._holders[adapter][seat.slot]
        seat.adapters.clear()
        self._recent -= seat.recent
        self._in_flight -= seat.in_flight
        self._others_in_flight += seat.hear(None, self._clock())
        self._seated([other for other in self.seats if other is not seat])
        seat.place = -1

    def _seated(self, seats: list[Seat]) -> None:
        self.seats = seats
        for place, seat in enumerate(seats):
            seat.place = place
        if self._config.policy == "session":
            self._ring = Ring(seat.name for seat in seats)

    def hear(self, seat: Seat, said: Said) -> None:
        """What a replica's port says now of its load and of other gateways' requests."""
        if seat.place >= 0:
            self._others_in_flight += seat.hear(said, self._clock())

    def learn(self, seat: Seat, prefix: Prefix) -> None:
        """Another gateway has sent this prompt there."""
        if seat.place >= 0 and self._config.policy == "cost":
            self.index.touch(seat.slot, prefix)

    def forget_said(self, older_than_s: float) -> None:
        """What was said longer ago than so many seconds counts for nothing."""
        now_s = self._clock()
        for seat in self.seats:
            if seat.said is not None and now_s - seat.said_s > older_than_s:
                self._others_in_flight += seat.hear(None, now_s)

    # -- the choice

    def choose(self, wanted: Wanted = NOTHING, exclude: Collection[str] = ()) -> Choice | None:
        """The replica for a request, none of `exclude`; None where none is left. Only round robin's turn changes."""
        seats = [seat for seat in self.seats if seat.name not in exclude] if exclude else self.seats
        if not seats:
            return None
        policy = self._config.policy
        if policy == "cost":
            return self._cheapest(seats, wanted, exclude)
        if len(seats) == 1:
            return Choice(seats[0], "only")
        if policy == "round-robin":
            self._turns += 1
            return Choice(seats[self._turns % len(seats)], "turn")
        if policy == "session" and wanted.session is not None:
            return self._of_session(wanted.session, exclude)
        two = self._rng.sample(seats, 2)
        return Choice(two[less_loaded_of_two([seat.requests for seat in two], self._rng)], "load")

    def _cheapest(self, seats: list[Seat], wanted: Wanted, exclude: Collection[str]) -> Choice:
        seen = self._seen(seats, wanted, exclude, self._rng)
        if len(seats) == 1:
            return Choice(seats[0], "only", seen.candidates[0].cached_tokens, seen.most_cached_tokens)
        best = least_cost(seen.candidates, seen.demand, self.speeds, self._config.reuse_weight)
        chosen = seen.candidates[best]
        return Choice(seen.seats[best], _reason(seen.candidates, best), chosen.cached_tokens, seen.most_cached_tokens)

    def _seen(self, seats: list[Seat], wanted: Wanted, exclude: Collection[str], rng: Random) -> _Seen:
        """What a policy is shown, in random order, so that of equals not always the same comes first."""
        prefix, adapter = wanted.prefix, wanted.adapter
        held = [] if prefix is None else self.index.match(prefix)
        most = held[0].tokens if held else 0
        if len(seats) <= ALL_LOOKED_AT:
            first = rng.randrange(len(seats))
            seats = seats[first:] + seats[:first]
        else:
            seats = self._some(seats, held, self._holders.get(adapter or "", {}), exclude, rng)
        scale = self._scale()
        mean = self._recent / len(self.seats)
        load = 0.0 if adapter is None else ADAPTER_LOAD_S * self.speeds.prefill_tokens_per_s
        candidates = [
            Candidate(
                seat.waiting_tokens + (others := seat.others).waiting_tokens,
                seat.in_flight + others.in_flight,
                seat.in_flight_tokens + others.tokens,
                _held_by(held, seat) if held else 0,
                (seat.recent - mean) / scale,
                load if load and adapter not in seat.adapters else 0.0,
            )
            for seat in seats
        ]
        demand = Demand(0 if prefix is None else prefix.tokens, self._sharing(prefix, most))
        return _Seen(seats, candidates, demand, most)

    def explain(self, wanted: Wanted) -> dict[str, Any]:
        """What is known of the replicas and which would be chosen for a request now; nothing is changed by asking."""
        found: dict[str, Any] = {"policy": self._config.policy, "replicas": len(self.seats), "chosen": None}
        if not self.seats:
            return found | {"prompt_tokens": wanted.prompt_tokens, "candidates": []}
        # Draws of its own: asking moves no request to another replica.
        seen = self._seen(self.seats, wanted, (), Random(0))  # noqa: S311 - no secret depends on it
        weight = self._config.reuse_weight
        rows = [
            {
                "replica": seat.name,
                "cost_s": round(cost_s(candidate, seen.demand, self.speeds, weight), 4),
                "cached_tokens": candidate.cached_tokens,
                "waiting_tokens": candidate.waiting_tokens,
                "in_flight": candidate.in_flight,
                "in_flight_tokens": candidate.in_flight_tokens,
                "recent_surplus_tokens": round(candidate.surplus_tokens),
            }
            | _said(seat)
            | ({} if wanted.adapter is None else {"adapter_loaded": not candidate.to_load_tokens})
            for seat, candidate in zip(seen.seats, seen.candidates, strict=True)
        ]
        if self._config.policy == "cost":
            best = least_cost(seen.candidates, seen.demand, self.speeds, weight)
            reason = "only" if len(self.seats) == 1 else _reason(seen.candidates, best)
            found["chosen"] = rows[best] | {"reason": reason}
        elif self._config.policy == "session" and wanted.session is not None:
            choice = self._of_session(wanted.session, ())
            found["chosen"] = {"replica": choice.seat.name, "reason": choice.reason}
        rows.sort(key=lambda row: str(row["replica"]))
        return found | {
            "prompt_tokens": seen.demand.tokens,
            "requests_sharing_the_prefix": seen.demand.sharers,
            "candidates": rows,
        }

    def _some(
        self,
        seats: list[Seat],
        held: list[Held],
        holders: Mapping[int, Seat],
        exclude: Collection[str],
        rng: Random,
    ) -> list[Seat]:
        """Those that hold most of the prompt, some that hold its adapter, and some at random; no replica twice."""
        found: dict[int, Seat] = {}
        for _, replicas in held:
            # Of many that hold the same, not always the same are looked at: from a random bit down.
            left = replicas
            if left.bit_count() > HOLDERS_LOOKED_AT:
                left &= (2 << rng.randrange(left.bit_length())) - 1
            while left and len(found) < HOLDERS_LOOKED_AT:
                slot = left.bit_length() - 1
                left ^= 1 << slot
                seat = self._by_slot[slot]
                if not exclude or seat.name not in exclude:
                    found[slot] = seat
            if len(found) >= HOLDERS_LOOKED_AT:
                break
        if holders:
            loaded = (item for item in holders.items() if item[1].name not in exclude)
            found.update(islice(loaded, HOLDERS_LOOKED_AT))
        draw, n = rng.random, len(seats)
        for _ in range(DRAWN):
            seat = seats[int(draw() * n)]
            found[seat.slot] = seat
        return list(found.values())

    def _sharing(self, prefix: Prefix | None, most: int) -> int:
        """Requests under way that begin as this one does, as far as it is cached anywhere."""
        if prefix is None or not most:
            return 0
        last = bisect_left(prefix.ends, most)
        return self._sharers.get(prefix.hashes[last], 0) if last < len(prefix.hashes) else 0

    def _of_session(self, session: str, exclude: Collection[str]) -> Choice:
        seats = self.seats

        def places() -> Iterator[int]:
            return (place for place in self._ring.walk(session) if seats[place].name not in exclude)

        total = self._in_flight + self._others_in_flight
        place = bounded_walk(places(), lambda i: seats[i].requests, total, len(seats), self._config.session_load)
        return Choice(seats[place], "session")

    def begin(self, choice: Choice, wanted: Wanted = NOTHING) -> Turn:
        """The request goes to the chosen replica."""
        return Turn(self, choice, wanted)

    # -- what a turn changes

    def _begin(self, seat: Seat, prefix: Prefix | None, uncached: int) -> None:
        seat.in_flight += 1
        self._in_flight += 1
        if prefix is None:
            return
        seat.in_flight_tokens += prefix.tokens
        seat.waiting_tokens += uncached
        work = uncached * self._scale()
        seat.recent += work
        self._recent += work
        if self._config.policy != "cost":
            return
        # Taken as computed from here on: who asks for the same meanwhile finds it done when its turn comes.
        self.index.touch(seat.slot, prefix)
        if self.shares and prefix.hashes:
            seat.placed.append(prefix.hashes)
        sharers = self._sharers
        for name in prefix.hashes:
            sharers[name] = sharers.get(name, 0) + 1

    def _end(self, choice: Choice, prefix: Prefix | None, *, computed: bool) -> None:
        seat = choice.seat
        seat.in_flight -= 1
        here = seat.place >= 0
        if here:
            self._in_flight -= 1
        if prefix is None:
            return
        seat.in_flight_tokens -= prefix.tokens
        if self._config.policy != "cost":
            return
        sharers = self._sharers
        for name in prefix.hashes:
            left = sharers.get(name, 0) - 1
            if left > 0:
                sharers[name] = left
            else:
                sharers.pop(name, None)
        if not here:
            return
        if computed:
            # Engines free a prompt's blocks at its end: then they are the most recently used.
            self.index.touch(seat.slot, prefix)
        else:
            self.index.forget(seat.slot, prefix, choice.cached_tokens)
            with suppress(ValueError):  # told already, or not to be told
                seat.placed.remove(prefix.hashes)

    def _hold(self, seat: Seat, adapter: str) -> None:
        """The engine loads the adapter, if it has not; the one used longest ago makes room."""
        if seat.place < 0:
            return
        seat.adapters[adapter] = None
        seat.adapters.move_to_end(adapter)
        self._holders.setdefault(adapter, {})[seat.slot] = seat
        while len(seat.adapters) > self._adapters_held:
            oldest, _ = seat.adapters.popitem(last=False)
            del self._holders[oldest][seat.slot]

    def _scale(self) -> float:
        """What a token computed now counts among recent work: older ones count less, by growing what is new."""
        now_s = self._clock()
        scale = math.exp((now_s - self._since_s) / RECENT_S)
        if scale > _RESCALE_AT:
            for seat in self.seats:
                seat.recent /= scale
            self._recent = sum(seat.recent for seat in self.seats)
            self._since_s, scale = now_s, 1.0
        return scale


def _said(seat: Seat) -> dict[str, Any]:
    """For whoever asks why: what of the loads is other gateways', and the engine's own word; None where it has none."""
    engine = None if seat.said is None else seat.said.engine
    return {
        "others_in_flight": seat.others.in_flight,
        "others_waiting_tokens": seat.others.waiting_tokens,
        "engine_running": None if engine is None else engine.running,
        "engine_waiting": None if engine is None else engine.waiting,
        "engine_kv_use": None if engine is None else engine.kv_use,
    }


def _held_by(held: list[Held], seat: Seat) -> int:
    for tokens, replicas in held:
        if replicas >> seat.slot & 1:
            return tokens
    return 0


def _reason(candidates: list[Candidate], best: int) -> Reason:
    waiting, in_flight, _, cached, _, to_load = candidates[best]
    adapter = load = False
    for other in candidates:
        if other.cached_tokens < cached:
            return "prefix"
        if other.to_load_tokens > 0 and not to_load:
            adapter = True
        if other.waiting_tokens != waiting or other.in_flight != in_flight:
            load = True
    return "adapter" if adapter else "load" if load else "tie"
