"""A load's requests, counted by their clients and by the ledger, held against each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.traffic import Answer, Booked, Outcome, Traffic, booked

# What the ledger may say of a request, by what its client saw. None: it has no row.
BOOKED_AS: Final[dict[Outcome, frozenset[str]]] = {
    "completed": frozenset({"completed"}),
    "failed": frozenset({"failed"}),
    "rejected": frozenset({"rejected"}),
    # The connection broke: the gateway saw its client leave, or had sent everything, or broke with its engine.
    "lost": frozenset({"cancelled", "completed", "failed"}),
    "silent": frozenset(),
    "refused": frozenset(),
}
# The edge's own answers: no gateway had the request, or the one that had it is gone.
EDGE: Final = frozenset({"502 gateway_failed", "504 gateway_timeout"})


@dataclass(frozen=True, slots=True)
class Books:
    """Both counts."""

    clients: dict[str, int]
    ledger: dict[str, int]
    rows: tuple[Booked, ...]
    # Requests that a client sent and that have no row: nobody accepted them, or they went with the gateway that had.
    unbooked: int


async def balanced(ledger: Path, load: Traffic, *, may_miss: bool) -> Books:
    """Hold the two against each other, request by request; `may_miss`: rows of broken connections may be missing."""
    taken = [answer for answer in load.answers if answer.outcome != "refused"]
    sure = {answer.request_id for answer in taken if not _may_lack_row(answer, may_miss=may_miss)}
    rows = await booked(ledger, load.answers, lambda found: sure <= {row.request_id for row in found})
    by_id = {row.request_id: row for row in rows}
    assert len(by_id) == len(rows), "a request has two rows"
    assert not sure - by_id.keys(), "requests without a row"
    for answer in load.answers:
        row = by_id.get(answer.request_id)
        assert row is None or row.outcome in BOOKED_AS[answer.outcome], (answer, row)
    counted = Counter(row.outcome for row in rows)
    return Books(load.counts(), dict(sorted(counted.items())), tuple(rows), len(taken) - len(rows))


def _may_lack_row(answer: Answer, *, may_miss: bool) -> bool:
    return answer.outcome == "lost" or (may_miss and answer.detail in EDGE)
