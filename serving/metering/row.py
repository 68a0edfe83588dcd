"""One row of the ledger: an accepted request, and what is charged for it."""

from __future__ import annotations

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """As it lies in the spill and, but for the date's type, in the database."""

    # Unique among all rows of all gateways: a row that is written twice is there once.
    id: str
    # The client's own id, or one that was made up for it; a client may repeat its ids.
    request_id: str
    tenant: str
    key_id: str
    # As the client asked for it: a model, or an adapter of one.
    model: str
    route: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    # Prompt tokens as the engine's own counter took them: a prompt with n answers n times. For reconciliation.
    counted_prompt_tokens: int
    # Whether the engine counted these tokens; else they are a guess.
    exact: bool
    # HTTP status; 499: the client left first.
    status: int
    outcome: str
    stream: bool
    # Seconds since 1970, UTC.
    started_at: float
    # None: no byte of an answer came.
    ttft_s: float | None
    duration_s: float
    gateway_id: str
    # The engine replica it was sent to last, or whose answer was relayed; empty: to none.
    engine: str
    # Another replica that had the request too and of which the client got nothing (a retry's first, a hedge's loser);
    # empty: none had. What it computed is charged to nobody; it is here for reconciliation.
    lost_engine: str = ""
    # As that engine counted them; where `lost_exact` is false so many at most, and None where nobody can say.
    lost_prompt_tokens: int | None = 0
    lost_completion_tokens: int | None = 0
    lost_exact: bool = True
    # Tokens of answers as the engine's own counter took them where they are not billed, because no answer came of it or
    # none was asked for; None: as billed. For reconciliation.
    counted_completion_tokens: int | None = None

    @property
    def computed_completion_tokens(self) -> int:
        """As the engine's own counter took them."""
        counted = self.counted_completion_tokens
        return self.completion_tokens if counted is None else counted
