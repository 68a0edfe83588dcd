"""The ledger against counters as Prometheus has scraped them: what a replica computed between two of its scrapes. Pure.

A counter in Prometheus is known at moments. Between the first and the last of a window its increase is exact, whatever
it stood at before, so an engine's warm-up is not in it. Rows whose request ran wholly between the two must be in the
increase; a request that was under way at either is in it by an unknown part, from nothing to all. The same holds where
a counter began anew (its engine was restarted): what was counted between the scrapes around that is not in the
increase. So the balance is an interval, and what lies outside of it has no explanation.

Requests under way at the end have no row yet. Where a replica was idle at a scrape all that came before has its row:
the window ends there, or where it was told to if a later scrape was idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from serving.metering.reconcile import Tokens

# Clocks of a gateway and of Prometheus may differ, and an engine hears of a client that left a moment after its row.
MARGIN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Ran:
    """A row as it is held against counters: a prompt counts once an answer. Seconds since 1970."""

    began_s: float
    ended_s: float
    tokens: Tokens
    exact: bool = True
    # An attempt of which the client got nothing; `at_most`: nobody knows how many of the tokens its engine computed.
    lost: bool = False
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Increase:
    """What a replica counted in [from_s, until_s]; `gaps` within it that are not in `tokens`.

    `under_way`: as many requests at most ran at the end and may have no row yet.
    """

    from_s: float
    until_s: float
    tokens: Tokens
    gaps: tuple[tuple[float, float], ...] = ()
    resets: int = 0
    under_way: int = 0


@dataclass(slots=True)
class Follower:
    """Follows one replica's counters from scrape to scrape, in the order of time.

    A counter that began anew is known by a value below its last one. One that has passed that value again within a
    scrape's interval is not: no engine starts and computes so much in five seconds.
    """

    until_s: float
    _first_s: float | None = None
    _last_s: float = 0.0
    # By series: one a counter and rank.
    _prompt: dict[str, float] = field(default_factory=dict)
    _completion: dict[str, float] = field(default_factory=dict)
    _tokens: Tokens = field(default_factory=Tokens)
    _gaps: list[tuple[float, float]] = field(default_factory=list)
    _resets: int = 0
    _idle: Increase | None = None
    # The fewest requests that were there at any scrape since the end, the last one before it included.
    _least: int | None = None

    def scrape(
        self, at_s: float, prompt: Mapping[str, float], completion: Mapping[str, float], under_way: float
    ) -> None:
        """One scrape: the counters by series, and the requests that run or wait.

        Scrapes beyond `until_s` say only whether what was under way has ended.
        """
        if at_s > self.until_s:
            if self._least is not None:
                self._least = min(self._least, int(under_way))
            return
        counts, whole, resets = [], True, 0
        for before, now in ((self._prompt, prompt), (self._completion, completion)):
            grown, new, fallen = _follow(before, now)
            counts.append(grown)
            whole = whole and not new and not fallen
            resets = max(resets, fallen)
        self._tokens += Tokens(*counts)
        if self._first_s is None:
            self._first_s = at_s
        elif not whole:
            # What such a counter counted up to now was not seen from its beginning.
            self._gaps.append((self._last_s, at_s))
            self._resets += resets
        self._last_s, self._least = at_s, int(under_way)
        if not under_way:
            self._idle = self._now()

    def increase(self, *, gone: bool) -> Increase | None:
        """What is known; None without a scrape. `gone`: the replica is no more, so nothing of it is under way."""
        if self._first_s is None:
            return None
        if gone or not self._least:
            return self._now()
        if self._idle is not None:
            return self._idle
        return self._now(self._least)

    @property
    def last_s(self) -> float:
        """The last scrape within the window."""
        return self._last_s

    def _now(self, under_way: int = 0) -> Increase:
        first_s = self._last_s if self._first_s is None else self._first_s
        return Increase(first_s, self._last_s, self._tokens, tuple(self._gaps), self._resets, under_way)


def _follow(before: dict[str, float], now: Mapping[str, float]) -> tuple[int, int, int]:
    """What counters grew by, and how many of them are new and began anew; `before` is brought up to date."""
    grown, new, fallen = 0.0, 0, 0
    for series, value in now.items():
        last = before.get(series)
        if last is None:
            new += 1
        elif value < last:
            fallen += 1
        else:
            grown += value - last
        before[series] = value
    return int(grown), new, fallen


@dataclass(frozen=True, slots=True)
class Balance:
    """One replica: `ledger` is of rows wholly within, `edges` of rows that are so by an unknown part.

    `lost` are attempts wholly within of which the client got nothing; what of theirs is a bound is in `edges`.
    `unexplained`: tokens that were counted and have no row (above 0), or have one and were not counted (below).
    """

    engine: str
    increase: Increase
    ledger: Tokens
    edges: Tokens
    unexplained: Tokens
    guesses: int = 0
    lost: Tokens = field(default_factory=Tokens)

    @property
    def balanced(self) -> bool:
        """Whether nothing is left over that guesses could not account for."""
        return self.unexplained == Tokens() or self.guesses > 0


def balance(engine: str, increase: Increase, rows: Iterable[Ran], margin_s: float = MARGIN_S) -> Balance:
    """Hold a replica's increase against its rows."""
    within, lost, edges, guesses = Tokens(), Tokens(), Tokens(), 0
    for row in rows:
        if row.ended_s < increase.from_s - margin_s or row.began_s > increase.until_s + margin_s:
            continue
        guesses += not row.exact
        if row.at_most or not _wholly_within(row, increase, margin_s):
            edges += row.tokens
        elif row.lost:
            lost += row.tokens
        else:
            within += row.tokens
    counted = increase.tokens - lost
    left = Tokens(
        _beyond(counted.prompt, within.prompt, edges.prompt),
        _beyond(counted.completion, within.completion, edges.completion),
    )
    return Balance(engine, increase, within, edges, left, guesses, lost)


def _wholly_within(row: Ran, increase: Increase, margin_s: float) -> bool:
    if row.began_s < increase.from_s + margin_s or row.ended_s > increase.until_s - margin_s:
        return False
    return not any(
        row.ended_s > begin_s - margin_s and row.began_s < end_s + margin_s for begin_s, end_s in increase.gaps
    )


def _beyond(counted: int, least: int, more: int) -> int:
    """How far a count lies outside of [least, least + more]."""
    return min(counted - least, 0) or max(counted - least - more, 0)
