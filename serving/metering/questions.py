"""What a gateway asks of the ledger, and what it hears: a line of JSON each, between two processes."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

# What sums may be grouped by, as the ledger calls it.
Group = Literal["day", "model", "key_id"]
# Why there is no answer: the database is away, it took too long, or there are more rows than were asked for.
Trouble = Literal["away", "slow", "many"]

# Of a database's own time; a process that has to be started and a connection to be made come on top.
WITHIN_S: Final = 5.0
# 31 days of 64 models, or a year of five: an answer of half a megabyte.
MOST_ROWS: Final = 2000


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Sums of one tenant's requests that began in [since_s, until_s), seconds since 1970; without `models` of all.

    `ended_before_s`: of those alone that had ended by then.
    """

    tenant: str
    since_s: int
    until_s: int
    by: tuple[Group, ...] = ()
    models: tuple[str, ...] = ()
    ended_before_s: float | None = None
    most_rows: int = MOST_ROWS
    within_s: float = WITHIN_S


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """One group; what it was not grouped by is None. `day` as 2026-11-01, UTC; `estimated`: rows that are no count."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    estimated: int
    day: str | None = None
    model: str | None = None
    key_id: str | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The groups, ordered as they were asked for; or why there are none, with a reason for the operator."""

    sums: tuple[Sums, ...] = ()
    trouble: Trouble | None = None
    reason: str = ""


class NoAnswer(Exception):
    """The ledger did not answer a question."""

    def __init__(self, trouble: Trouble | Literal["busy"], reason: str = "") -> None:
        """`busy`: the tenant has a question under way."""
        super().__init__(trouble, reason)
        self.trouble = trouble
        self.reason = reason
