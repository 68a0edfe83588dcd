"""Which of a model's replicas get no new requests because of how they behave: outlier ejection, as a state machine.

Evidence is what this gateway sees itself: requests that failed before their first byte, answers that did not come in
time, health probes. A replica is out for a penalty that doubles each time, and comes back by a probe that is good
after it, on trial: its first failure then ejects it again. Promises: of `n` replicas at most `share` of them are out,
and never all; where more deserve it, those that do not even answer probes go first. Verdicts and what is applied of
them are kept apart, so a replica that leaves or comes changes nothing about the others' guilt.

After Envoy's outlier detection; pure but for the clock that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal

FAILURES: Final = 5  # requests in a row
PROBES: Final = 3  # probes in a row: with one a second a dead replica is out in under 5 s
PENALTY_S: Final = 30.0
LONGEST_PENALTY_S: Final = 300.0

Reason = Literal["failures", "stalled", "probes"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One replica that deserves to be out: whether it answers probes, and until when at least, seconds."""

    dark: bool
    until_s: float


def penalty_s(ejections: int) -> float:
    """How long the n-th ejection in a row lasts at least, from 1."""
    return min(LONGEST_PENALTY_S, PENALTY_S * 2.0 ** min(ejections - 1, 16))


def applied(verdicts: Mapping[str, Verdict], total: int, share: float) -> frozenset[str]:
    """Those of the guilty that are out, of `total` replicas: the dark before the others, then the latest punished."""
    room = min(int(total * share), total - 1)
    if room <= 0 or not verdicts:
        return frozenset()
    order = sorted(verdicts, key=lambda r: (not verdicts[r].dark, -verdicts[r].until_s, r))
    return frozenset(order[:room])


@dataclass(slots=True)
class _Record:
    failures: int = 0
    probes: int = 0
    # In a row, without a calm time as long as the last penalty between them.
    ejections: int = 0
    verdict: Verdict | None = None
    back_s: float | None = None
    trial: bool = False

    @property
    def clean(self) -> bool:
        return not (self.failures or self.probes or self.ejections)


class Ejections:
    """The replicas of one model; `out` are the ids that get no new requests."""

    def __init__(
        self,
        share: float,
        clock: Callable[[], float],
        on_ejected: Callable[[str, Reason], None],
        on_out: Callable[[frozenset[str]], None] = lambda _: None,
    ) -> None:
        """`on_ejected(replica, reason)` is called for each verdict, applied or not; `on_out(replicas)` whenever those
        that are out become others.
        """
        self._share = share
        self._clock = clock
        self._on_ejected = on_ejected
        self._on_out = on_out
        self._live: frozenset[str] = frozenset()
        # Only replicas about which there is something to remember.
        self._records: dict[str, _Record] = {}
        self.out: frozenset[str] = frozenset()

    def update(self, live: Collection[str]) -> None:
        """Take the model's replicas as they are now; what has left is forgotten."""
        self._live = frozenset(live)
        self._records = {r: record for r, record in self._records.items() if r in self._live}
        self._apply()

    def answered(self, replica: str) -> None:
        """A request got its first byte."""
        record = self._records.get(replica)
        if record is not None:
            record.failures = 0
            record.trial = False

    def failed(self, replica: str) -> None:
        """A request failed before its first byte, by the replica's fault."""
        if replica in self._live:
            record = self._record(replica)
            record.failures += 1
            if record.failures >= FAILURES or record.trial:
                self._eject(replica, record, "failures")

    def stalled(self, replica: str) -> None:
        """A request's first byte did not come in time: there is no second sign to wait for."""
        if replica in self._live:
            self._eject(replica, self._record(replica), "stalled")

    def probed(self, replica: str, healthy: bool) -> None:
        """A health probe ended."""
        if replica not in self._live:
            return
        record = self._records.get(replica)
        if healthy:
            if record is not None:
                self._good_probe(replica, record)
            return
        record = record or self._record(replica)
        record.probes += 1
        if record.probes == PROBES or (record.trial and record.verdict is None):
            self._eject(replica, record, "probes")

    def _good_probe(self, replica: str, record: _Record) -> None:
        record.probes = 0
        verdict = record.verdict
        if verdict is None:
            if record.clean:
                del self._records[replica]
            return
        if self._clock() < verdict.until_s:
            record.verdict = Verdict(False, verdict.until_s)
        else:
            record.verdict, record.failures = None, 0
            record.back_s, record.trial = self._clock(), True
        self._apply()

    def _eject(self, replica: str, record: _Record, reason: Reason) -> None:
        now_s, dark = self._clock(), reason == "probes"
        if record.verdict is not None:
            # It is judged already; that it has gone dark meanwhile decides who goes first.
            record.verdict = Verdict(record.verdict.dark or dark, record.verdict.until_s)
        else:
            if record.back_s is not None and now_s - record.back_s > penalty_s(max(1, record.ejections)):
                record.ejections = 0
            record.ejections += 1
            record.verdict = Verdict(dark, now_s + penalty_s(record.ejections))
            record.trial = False
            self._on_ejected(replica, reason)
        self._apply()

    def _record(self, replica: str) -> _Record:
        return self._records.setdefault(replica, _Record())

    def _apply(self) -> None:
        verdicts = {r: record.verdict for r, record in self._records.items() if record.verdict is not None}
        out = applied(verdicts, len(self._live), self._share)
        if out != self.out:
            self.out = out
            self._on_out(out)
