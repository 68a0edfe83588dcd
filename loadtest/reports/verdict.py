"""Whether a run met its service-level objective, line by line; a pure function of the run.

A failed request never had its answer: it counts as late without bound in TTFT and end-to-end targets, so a cluster
cannot meet them by dropping what is slow. A rejected request was told at once that it would not be served; what
share of them is allowed is a target of its own (`rejected_share`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loadtest.records import Outcome, Record
from loadtest.reports.model import ReportRun, SloTarget, counted, figures, latencies_s, metric
from loadtest.stats import quantiles


class State(StrEnum):
    """What a run came to, in the words of every report."""

    MET = "met"
    NOT_MET = "not met"
    INVALID = "invalid run"


# 1 and 2 are the interpreter's own, for a crash and for wrong usage.
EXIT_CODES = {State.MET: 0, State.NOT_MET: 3, State.INVALID: 4}


@dataclass(frozen=True, slots=True)
class Line:
    """One target with what was measured, in the metric's unit: None for no request to measure, inf for no answer."""

    target: SloTarget
    measured: float | None
    met: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole run's; `reasons` says in sentences why it is not met or invalid."""

    state: State
    lines: tuple[Line, ...]
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 met, 3 not met, 4 invalid run."""
        return EXIT_CODES[self.state]


def judge(run: ReportRun) -> Verdict:
    """The verdict; an invalid run is neither met nor not met, yet its lines are told. No targets: met."""
    held = counted(run.records)
    lines = tuple(_line(target, held, run.slo) for target in run.slo)
    invalid = list(run.invalid)
    if not held:
        invalid.append("no request was sent after the warm-up")
    if invalid:
        return Verdict(State.INVALID, lines, tuple(invalid))
    missed = sum(not line.met for line in lines)
    if missed:
        return Verdict(State.NOT_MET, lines, (f"{missed} of {len(lines)} targets missed",))
    return Verdict(State.MET, lines, () if lines else ("no targets were set, so nothing could be missed",))


def _line(target: SloTarget, held: Sequence[Record], targets: Sequence[SloTarget]) -> Line:
    measured = _measured(target, [record for record in held if target.covers(record)], targets)
    if measured is None:
        return Line(target, None, met=False)
    less = metric(target.metric).less_is_better
    return Line(target, measured, met=measured <= target.limit if less else measured >= target.limit)


def _measured(target: SloTarget, own: Sequence[Record], targets: Sequence[SloTarget]) -> float | None:
    of = metric(target.metric)
    if of.latency is None or of.level is None:
        return figures(own, targets)[of.key]
    values = latencies_s(own, of.latency)
    # Gaps that never came cannot be counted; the failure itself is seen in the other two.
    if of.latency == "ttft":
        values += [math.inf for record in own if record.outcome is Outcome.FAILED and record.ttft_s is None]
    elif of.latency == "e2e":
        values += [math.inf for record in own if record.outcome is Outcome.FAILED]
    return quantiles(values, of.level)[0] if values else None
