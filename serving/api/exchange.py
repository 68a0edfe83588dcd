"""One request under way: what the gateway knows of it from its acceptance to its row in the ledger."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from serving.admission.bounds import RequestFacts
from serving.admission.fair_share import Holding
from serving.admission.ticket import Ticket
from serving.api.upstream import Connection
from serving.metering.answers import COMPLETIONS
from serving.metering.usage import Usage
from serving.routing.asked import Asked
from serving.routing.replicas import Endpoint, Lease
from serving.routing.retry_budget import Turn

Outcome = Literal["completed", "rejected", "failed", "cancelled"]


class Sent(NamedTuple):
    """A request on an engine, and what it is called there."""

    engine: Endpoint
    request_id: str


@dataclass(slots=True)
class Exchange:
    """One request under way: what the relay is told, and what it found out."""

    model: str
    path: str
    body: bytes
    request_id: str
    started_s: float
    tenant: str = ""
    # The key's id, never the key.
    key_id: str = ""
    # What the gateway decides by; None where a test relays bytes alone.
    facts: RequestFacts | None = None
    # Whether an engine computes for it.
    computes: bool = True
    # What its replica is chosen by; None: by load alone.
    asked: Asked | None = None
    # An administrator wants to see why it went where it went.
    shows_route: bool = False
    # A whole header line for the engine, where requests are traced.
    traceparent: bytes = b""
    stream: bool = False
    # So long without a first byte, and another replica gets it too; None: never.
    hedge_after_s: float | None = None
    status: int = 0
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    # Events of a stream after those that came with its first bytes: one a token, by and large.
    later_events: int = 0
    sent_bytes: int = 0
    # Set when the relay returns, however it ended: as the engine counted, or a guess where it has not said so.
    usage: Usage | None = None
    usage_exact: bool = False
    # The engine that the request was sent to last, and what it is called there; empty: it was never sent.
    engine: Endpoint | None = None
    engine_request_id: str = ""
    # Another engine that had it too, before or beside that one, and of which the client got nothing.
    lost: Sent | None = None
    outcome: Outcome = "failed"
    cut: bool = False
    client_left: bool = False
    # It asked for more output tokens than its prompt left room for, and went to the engine without a number.
    lowered: bool = False
    # The answer's head went out while the request was held: from then on everything is an event.
    head_sent: bool = False
    # The replica that has it, those that lost it before they answered, and one that may only have met a bad request.
    replica: str = ""
    spent: frozenset[str] = frozenset()
    suspect: str = ""
    turn: Turn | None = field(default=None, repr=False)
    # It waits for more than one connection: its client's leaving ends it by `bound`.
    waits: bool = False
    bound: asyncio.Timeout | None = field(default=None, repr=False)
    ticket: Ticket | None = field(default=None, repr=False)
    # What its body takes of the bound on all bodies.
    holding: Holding | None = field(default=None, repr=False)
    connection: Connection | None = field(default=None, repr=False)
    lease: Lease | None = field(default=None, repr=False)

    def answered(self) -> None:
        """The answer has begun, so nobody needs the body any more: a long stream does not keep a large prompt."""
        self.body = b""
        if self.holding is not None:
            self.holding.end()
        if self.ticket is not None:
            self.ticket.answered()

    @property
    def result(self) -> Outcome:
        """How it ended: what was left unfinished because its client went is no failure."""
        return "cancelled" if self.outcome != "completed" and self.client_left else self.outcome

    @property
    def unanswered(self) -> bool:
        """Whether its client waited and no engine's answer began: that is the cluster's doing, and costs nothing."""
        return self.first_byte_s is None and not self.client_left

    @property
    def wants_no_token(self) -> bool:
        """Whether it asked for no token of an answer (`max_tokens: 0`), of which vLLM writes one all the same."""
        return self.facts is not None and self.facts.max_output_tokens == 0 and self.path == COMPLETIONS

    @property
    def expected_output_tokens(self) -> float:
        """Tokens that its answers were expected to have when it had its turn."""
        return 0.0 if self.ticket is None else self.ticket.output_tokens

    @property
    def named(self) -> str:
        """What the client asked for by name: the model, or an adapter of it."""
        return self.model if self.facts is None else self.facts.model
