"""The ledger against the engines' own counters: every difference has a cause, or is one to look into.

An engine counts a prompt for each of its answers, counts requests that did not come through a gateway (its own
warm-up), and counts tokens as they are made, where a row comes when a request has ended. All of these are known to the
token. So are attempts of which the client got nothing, because the request went to another replica, where their engine
could be asked; else they cost between nothing and a bound. Rows that are guesses (their engine died or did not answer)
are the only cause without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from serving.metering.row import Row

PROMPT: Final = "vllm:prompt_tokens_total"
COMPLETION: Final = "vllm:generation_tokens_total"
_SAMPLE: Final = re.compile(r"^(vllm:(?:prompt|generation)_tokens_total)(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of prompts and of answers."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


@dataclass(frozen=True, slots=True)
class Lost:
    """Tokens of attempts at requests that another replica answered: between `least` and `most`.

    `unbounded`: attempts for which nobody can say how many at most; `most` is without them.
    """

    least: Tokens = Tokens()
    most: Tokens = Tokens()
    unbounded: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.least + other.least, self.most + other.most, self.unbounded + other.unbounded)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one engine replica.

    `ledger` as billed, `unbilled` prompts beyond the first of each answer and what was computed in vain, `waiting` rows
    that are not in the database, `others` without a gateway, `under_way` now; `guesses` rows that are no count; `lost`
    attempts of rows that another engine answered.
    """

    engine: str
    counted: Tokens
    ledger: Tokens
    unbilled: Tokens
    waiting: Tokens
    others: Tokens
    under_way: Tokens
    guesses: int = 0
    lost: Lost = Lost()


@dataclass(frozen=True, slots=True)
class Verdict:
    """One engine's balance. `unexplained`: what no cause accounts for; of guesses it may be their error."""

    evidence: Evidence
    unexplained: Tokens

    @property
    def balanced(self) -> bool:
        """Whether nothing is left over that guesses could not account for."""
        return self.unexplained == Tokens() or self.evidence.guesses > 0 or self.evidence.lost.unbounded > 0


def verdict(evidence: Evidence) -> Verdict:
    """Hold one engine's counters against everything that is known of them."""
    e = evidence
    rest = e.counted - (e.ledger + e.unbilled + e.waiting + e.others + e.under_way)
    least, most = e.lost.least, e.lost.most
    return Verdict(
        e,
        Tokens(
            _outside(rest.prompt, least.prompt, most.prompt),
            _outside(rest.completion, least.completion, most.completion),
        ),
    )


def _outside(rest: int, least: int, most: int) -> int:
    """How far it is above `most`, or below `least` (negative)."""
    return rest - min(max(rest, least), most)


def lost_of(rows: Iterable[Row]) -> Lost:
    """What the other attempts of these rows cost."""
    lost = Lost()
    for row in rows:
        most = Tokens(row.lost_prompt_tokens or 0, row.lost_completion_tokens or 0)
        unbounded = row.lost_prompt_tokens is None or row.lost_completion_tokens is None
        lost += Lost(most if row.lost_exact else Tokens(), most, int(unbounded))
    return lost


def counters(exposition: str) -> Tokens:
    """An engine's counters out of its /metrics, summed over its ranks."""
    found = {PROMPT: 0, COMPLETION: 0}
    for name, value in _SAMPLE.findall(exposition):
        found[name] += int(float(value))
    return Tokens(found[PROMPT], found[COMPLETION])
