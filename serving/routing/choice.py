"""What the router is told of a request, and what it answers: a replica, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from serving.routing.prefix_index import Prefix
from serving.routing.seat import Seat

# Why a replica was chosen. prefix: the prompt's beginning is there; adapter: the request's adapter is; load: it had the
# least to do; tie: nothing told it from others; session: of its x-session-id; turn: it was its turn; only: there was
# no other.
Reason = Literal["prefix", "adapter", "load", "tie", "session", "turn", "only"]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the router is told of a request; all of it may be unknown."""

    prefix: Prefix | None = None
    session: str | None = None
    # Its LoRA adapter's name.
    adapter: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length; 0 where it is unknown."""
        return 0 if self.prefix is None else self.prefix.tokens


NOTHING: Final = Wanted()


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica, why, and how many tokens of the prompt it is taken to hold."""

    seat: Seat
    reason: Reason
    cached_tokens: int = 0
    # The most that any replica holds.
    most_cached_tokens: int = 0

    def described(self) -> bytes:
        """As a header's value, for administrators."""
        held = f"cached_tokens={self.cached_tokens}, most_cached_tokens={self.most_cached_tokens}"
        others = f"others_in_flight={self.seat.others.in_flight}"
        return f"replica={self.seat.name}, reason={self.reason}, {held}, {others}".encode("latin-1", "replace")
