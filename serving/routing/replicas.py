"""The live replicas of every model, with the requests this gateway has in flight on each.

The cluster layer pushes endpoint lists as replicas come and go; a request holds a lease on one replica
until it ends. A replica that has left keeps counting its leases until they end, so nothing leaks and
nothing goes below zero when it returns.

Which replica gets a request is its model's `Router`'s to say. Of several gateways each has routers of its own, and
learns at replicas' ports how many requests others have there (serving.engine.load) and which prompts they have sent
(serving.engine.placements).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from serving.config import FakeEngineConfig, ModelConfig, RoutingConfig
from serving.engine.load import Said
from serving.routing.asked import Asked
from serving.routing.choice import NOTHING, Choice, Wanted
from serving.routing.fingerprint import ENDS
from serving.routing.policies import CHUNK_TOKENS, Speeds
from serving.routing.prefix_index import Prefix
from serving.routing.router import DEFAULT_KV_TOKENS, Router, Turn
from serving.routing.seat import Seat


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine replica's own OpenAI app listens."""

    replica_id: str
    host: str
    port: int


class Lease:
    """One request's hold on a replica; released exactly once, at the end of its `with` block."""

    __slots__ = ("_endpoint", "_turn")

    def __init__(self, endpoint: Endpoint, turn: Turn) -> None:
        self._endpoint = endpoint
        self._turn = turn

    @property
    def endpoint(self) -> Endpoint:
        """The leased replica's address."""
        return self._endpoint

    @property
    def choice(self) -> Choice:
        """Why it is this replica."""
        return self._turn.choice

    @property
    def tokens(self) -> tuple[int, int]:
        """Of the prompt, and of those what its replica is not taken to hold."""
        prefix = self._turn.prefix
        return (0 if prefix is None else prefix.tokens), self._turn.uncached_tokens

    def answered(self) -> None:
        """The answer's first byte is here, so the prompt has been computed."""
        self._turn.answered()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turn.end()


class ReplicaSet:
    """Replicas by model id. Used from one event loop only."""

    def __init__(
        self,
        models: Iterable[ModelConfig | str],
        rng: Random,
        *,
        clock: Callable[[], float] = lambda: 0.0,
        on_choice: Callable[[str, Choice, Wanted], None] = lambda *_: None,
        key: bytes = b"",
    ) -> None:
        """`on_choice(model, choice, wanted)` is told of every lease. A model given by its id alone has the defaults.

        `key` is that of prompts' hashes: gateways that tell one another of prompts have the same.
        """
        self._models = {m if isinstance(m, str) else m.id: _Model(m, clock, rng) for m in models}
        self._on_choice = on_choice
        self._key = key
        self._at: dict[Endpoint, tuple[Router, Seat]] = {}
        self.known = False  # whether the cluster has reported at all

    def update(self, model: str, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        """Take the cluster's current list for a model; returns the endpoints that left."""
        self.known = True
        its = self._models[model]
        gone = its.update({endpoint.replica_id: endpoint for endpoint in endpoints})
        for endpoint in gone:
            self._at.pop(endpoint, None)
        self._at |= {endpoint: (its.router, its.seats[name]) for name, endpoint in its.endpoints.items()}
        return gone

    def hear(self, endpoint: Endpoint, said: Said) -> None:
        """What a replica's port says of its load, with any answer's head; of one that has left it is not heard."""
        found = self._at.get(endpoint)
        if found is not None:
            router, seat = found
            router.hear(seat, said)

    def forget_said(self, older_than_s: float) -> None:
        """What replicas said longer ago counts for nothing."""
        for its in self._models.values():
            its.router.forget_said(older_than_s)

    def lease(self, model: str, exclude: frozenset[str] = frozenset(), asked: Asked | None = None) -> Lease | None:
        """A lease on the chosen replica, none of `exclude`; None where no replica is left."""
        its = self._models[model]
        wanted = NOTHING if asked is None else self.wanted(model, asked)
        choice = its.router.choose(wanted, exclude)
        if choice is None:
            return None
        self._on_choice(model, choice, wanted)
        return Lease(its.endpoints[choice.seat.name], its.router.begin(choice, wanted))

    def wanted(self, model: str, asked: Asked) -> Wanted:
        """A request to this model as its router takes it."""
        return asked.wanted(reads_prompts=self._models[model].reads_prompts, key=self._key)

    def share(self, several: bool) -> None:
        """Whether there are other gateways, who are to hear what is placed where."""
        for its in self._models.values():
            its.router.shares = several
            if not several:
                for seat in its.router.seats:
                    seat.placed.clear()

    def shared(self) -> list[Endpoint]:
        """Replicas that other gateways choose among too; none where there are no others, or nothing to choose."""
        models = (its for its in self._models.values() if its.router.shares and len(its.endpoints) > 1)
        return [endpoint for its in models for endpoint in its.endpoints.values()]

    def placed(self, endpoint: Endpoint) -> deque[tuple[int, ...]]:
        """Prompts placed there that others have not been told of; who tells them takes them out."""
        found = self._at.get(endpoint)
        return deque() if found is None else found[1].placed

    def learn(self, endpoint: Endpoint, chains: Iterable[tuple[int, ...]]) -> None:
        """Other gateways have sent these prompts there."""
        found = self._at.get(endpoint)
        if found is not None:
            router, seat = found
            for chain in chains:
                router.learn(seat, Prefix(chain[: len(ENDS)], ENDS, 0))

    def ready(self, model: str) -> int:
        """Replicas of the model that take requests."""
        return len(self._models[model].endpoints)

    def in_flight(self, model: str) -> Mapping[str, int]:
        """Requests on each of the model's replicas that take requests, by its id; all gateways', as far as is known."""
        return {name: seat.requests for name, seat in self._models[model].seats.items()}

    def endpoints(self, model: str) -> frozenset[Endpoint]:
        """Where the model's replicas listen."""
        return frozenset(self._models[model].endpoints.values())

    def snapshot(self) -> Mapping[str, Mapping[str, int]]:
        """Requests in flight by model and replica id."""
        return {m: {i: s.in_flight for i, s in its.seats.items()} for m, its in self._models.items()}

    def blocks(self) -> Mapping[str, int]:
        """Blocks in each model's prefix index."""
        return {m: its.router.index.blocks for m, its in self._models.items()}

    def router(self, model: str) -> Router:
        """The router of a model; KeyError where there is no such model."""
        return self._models[model].router

    def reads_prompts(self, model: str) -> bool:
        """Whether prompts of this model are compared."""
        return self._models[model].reads_prompts

    def wants_kv_tokens(self, model: str) -> bool:
        """Whether it is worth asking a replica how much its KV cache holds."""
        its = self._models[model]
        return its.reads_prompts and not its.kv_known

    def told_kv_tokens(self, model: str) -> int | None:
        """What a replica has said that its cache holds; None: none has."""
        its = self._models[model]
        return its.kv_tokens if its.kv_told else None

    def learned_kv_tokens(self, model: str, endpoint: Endpoint, kv_tokens: int) -> None:
        """A replica has said how much its KV cache holds; the next ones are taken to be alike until they say."""
        its = self._models[model]
        its.kv_tokens, its.kv_told = kv_tokens, True
        if its.endpoints.get(endpoint.replica_id) == endpoint:
            its.router.index.resize(its.seats[endpoint.replica_id].slot, kv_tokens)


class _Model:
    """One model's endpoints and their seats at its router."""

    def __init__(self, model: ModelConfig | str, clock: Callable[[], float], rng: Random) -> None:
        config = RoutingConfig() if isinstance(model, str) else model.routing
        self.kv_tokens, self.kv_known = (DEFAULT_KV_TOKENS, True) if isinstance(model, str) else _kv_tokens(model)
        self.kv_told = False
        several = isinstance(model, str) or max(model.replicas.min, model.replicas.max or 0) > 1
        self.reads_prompts = several and config.policy == "cost"
        self.router = Router(
            config,
            speeds=Speeds() if isinstance(model, str) else _speeds(model),
            clock=clock,
            rng=rng,
            adapters_held=0 if isinstance(model, str) else model.lora.in_memory,
        )
        self.endpoints: dict[str, Endpoint] = {}
        self.seats: dict[str, Seat] = {}

    def update(self, endpoints: Mapping[str, Endpoint]) -> tuple[Endpoint, ...]:
        gone = [endpoint for name, endpoint in self.endpoints.items() if endpoints.get(name) != endpoint]
        for endpoint in gone:
            self.router.leave(self.seats.pop(endpoint.replica_id))
        for name in endpoints:
            if name not in self.seats:
                self.seats[name] = self.router.join(name, self.kv_tokens)
        self.endpoints = dict(endpoints)
        return tuple(gone)


def _speeds(model: ModelConfig) -> Speeds:
    """One replica's, as configured; the fake engine knows its own."""
    capacity = model.autoscaling.capacity if model.autoscaling is not None else None
    budget = model.engine.get("max_num_batched_tokens")
    chunk_tokens = budget if isinstance(budget, int) and budget > 0 else CHUNK_TOKENS
    if capacity is not None:
        return Speeds(
            prefill_tokens_per_s=capacity.prefill_tokens_per_s,
            decode_s=capacity.decode_ms / 1e3,
            decode_s_per_sequence=capacity.decode_ms_per_sequence / 1e3,
            decode_s_per_context_token=capacity.decode_ms_per_1k_context_tokens / 1e6,
            chunk_tokens=chunk_tokens,
        )
    if model.is_fake:
        fake = model.fake or FakeEngineConfig()
        return Speeds(
            prefill_tokens_per_s=fake.prefill_tokens_per_s,
            decode_s=fake.decode_ms / 1e3,
            decode_s_per_sequence=fake.decode_ms_per_sequence / 1e3,
            chunk_tokens=fake.prefill_chunk_tokens,
        )
    return Speeds(chunk_tokens=chunk_tokens)


def _kv_tokens(model: ModelConfig) -> tuple[int, bool]:
    """Tokens of one replica's KV cache, and whether that is known."""
    capacity = model.autoscaling.capacity if model.autoscaling is not None else None
    configured = model.routing.kv_tokens or (capacity.kv_tokens if capacity is not None else None)
    return (configured, True) if configured else (DEFAULT_KV_TOKENS, False)
