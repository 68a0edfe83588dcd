"""Fairness over several gateways: each tells the others, through Redis, what it gave to whom and what it has in flight.

Ten times a second while there is anything to tell, a gateway writes its totals of each busy model and reads those of
the others, in one round trip. What others gave is added to its own counters, so a tenant that is served at one gateway
has that counted at all; who waits or is served elsewhere counts as present when another tenant comes; and of what
engines compute at a time a gateway takes its part and borrows what the others leave (`gateway_part`). The bound on the
difference between two tenants' service grows by what engines give in SHARE_EVERY_S and a round trip, twice.

Without Redis, or while it does not answer, every gateway is fair by itself, and each gives its part.

Memory: totals of every tenant at every gateway that was seen within FORGET_S.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from serving.admission.hold import ModelHold
from serving.admission.holds import Hold
from serving.admission.quota_store import StoreDown
from serving.admission.redis_link import RedisLink

SHARE_EVERY_S = 0.1
# A gateway that has said nothing for so long has nothing in flight, or is gone.
SILENT_S = 3.0
FORGET_S = 60.0
# Of what another gateway had in flight so much still counts as its own at the next turn: a second after it has become
# idle a third of it.
LETS_GO = 0.9
KEY_LIFE_S = 600

log = structlog.get_logger("galerne.limits")


@dataclass(slots=True)
class _Other:
    """Another gateway, as last heard of."""

    turn: int
    heard_s: float
    tokens: float = 0.0
    sequences: float = 0.0
    wants: bool = False
    active: frozenset[str] = frozenset()
    service: dict[str, float] = field(default_factory=dict)


class SharedService:
    """One gateway's part in it. Used from one event loop only."""

    def __init__(self, hold: Hold, link: RedisLink, name: str, clock: Callable[[], float]) -> None:
        """`name` is this gateway's, never used before."""
        self._hold = hold
        self._link = link
        self._name = name
        self._clock = clock
        self._turn = 0
        self._others: dict[str, dict[str, _Other]] = {}
        # Models of which the others know that something is in flight here.
        self._told: set[str] = set()

    async def run(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """For ever."""
        while True:
            await sleep(SHARE_EVERY_S)
            try:
                await self.share()
            except StoreDown:
                self._alone()
            except Exception:
                log.exception("what gateways tell one another cannot be read")
                self._alone()

    async def share(self) -> None:
        """Tell and hear once; StoreDown where the store is away."""
        busy = {model: hold for model, hold in self._hold.items() if hold.turns or len(hold.queue)}
        models = [*busy, *(model for model in self._told if model not in busy)]
        if not models:
            return
        self._turn += 1
        told = {model: self._record(self._hold[model]) for model in models}

        async def work(redis: Any) -> list[Any]:
            pipe = redis.pipeline(transaction=False)
            for model, record in told.items():
                key = f"galerne:service:{model}"
                pipe.hset(key, self._name, record)
                pipe.expire(key, KEY_LIFE_S)
                pipe.hgetall(key)
            found: list[Any] = await pipe.execute()
            return found

        answers = await self._link.call(work)
        self._told = set(busy)
        forgotten: dict[str, list[str]] = {}
        for model, rows in zip(models, answers[2::3], strict=True):
            if gone := self._take(model, {_text(name): row for name, row in rows.items()}):
                forgotten[model] = gone
        for model, names in forgotten.items():
            await self._forget(f"galerne:service:{model}", names)

    async def _forget(self, key: str, names: list[str]) -> None:
        await self._link.call(lambda redis: redis.hdel(key, *names))

    def _record(self, hold: ModelHold) -> str:
        return json.dumps(
            {
                "turn": self._turn,
                "tokens": round(hold.in_flight.tokens, 1),
                "sequences": hold.in_flight.sequences,
                "wants": hold.in_flight.wants(somebody_waits=bool(hold.queue)),
                "active": [lane.tenant for lane in hold.queue.lanes() if lane.waiting or lane.in_flight],
                "service": {lane.tenant: round(lane.service, 1) for lane in hold.queue.lanes()},
            }
        )

    def _take(self, model: str, rows: Mapping[str, Any]) -> list[str]:
        """Take the others' records of a model; returns the gateways that are to be forgotten."""
        now_s, hold = self._clock(), self._hold[model]
        others = self._others.setdefault(model, {})
        for name, row in rows.items():
            if name == self._name:
                continue
            record = json.loads(row)
            other = others.get(name)
            if other is None:
                # What it gave before it was seen is nobody's credit.
                other = others[name] = _Other(0, now_s, service=dict(record["service"]))
            if record["turn"] == other.turn:
                continue
            other.turn, other.heard_s = record["turn"], now_s
            # What another has in flight goes up and down as sequences end; what it leaves for a moment it takes again.
            other.tokens = max(float(record["tokens"]), LETS_GO * other.tokens)
            other.sequences = max(float(record["sequences"]), LETS_GO * other.sequences)
            other.wants = bool(record["wants"])
            other.active = frozenset(record["active"])
            for tenant, service in record["service"].items():
                hold.queue.charge_elsewhere(tenant, service - other.service.get(tenant, 0.0))
            other.service = dict(record["service"])
        gone = [name for name, other in others.items() if now_s - other.heard_s > FORGET_S]
        for name in gone:
            del others[name]
        heard = [other for other in others.values() if now_s - other.heard_s <= SILENT_S]
        hold.queue.elsewhere(tenant for other in heard for tenant in other.active)
        hold.in_flight.others(
            sum(other.tokens for other in heard),
            sum(other.sequences for other in heard),
            wanted=any(other.wants for other in heard),
        )
        hold.look_again()
        return gone

    def _alone(self) -> None:
        for _, hold in self._hold.items():
            hold.queue.elsewhere(())
            hold.in_flight.alone()
            hold.look_again()


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
