"""The curves of a run, as pure functions of its records: what plots draw and what a test can check.

Over time, every request is shown, the warm-up's too. Tokens are placed in time by the events that brought them, the
engine's count of a request's tokens spread evenly over its events.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loadtest.records import Outcome, Record
from loadtest.reports.model import ReplicaCount, ReportRun, SloTarget, figures, goodness, tokens
from loadtest.stats import quantiles

MOST_POINTS = 500
# Ranks kept at even steps: no quantile moves by more than 1/200 of the ranks, half a per cent.
_EVEN = 200
_MOST_BINS = 60
_LEAST_BINS = 12
# What a p95 needs to be more than the greatest value.
_REQUESTS_PER_BIN = 20

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve; None is a gap: there was nothing to measure."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Bins:
    """Equal stretches of a run's time, seconds."""

    width_s: float
    count: int

    def of(self, t_s: float) -> int:
        """The bin of a time; times outside belong to the first and last."""
        return min(max(int(t_s / self.width_s), 0), self.count - 1)

    def series(self, name: str, values: Sequence[float | None]) -> Series:
        """Values as a curve through the middles of the bins."""
        return Series(name, tuple(((i + 0.5) * self.width_s, value) for i, value in enumerate(values)))


def bins(records: Sequence[Record], end_s: float | None = None) -> Bins:
    """Bins from the run's start to its last event (or `end_s`), some 20 requests in each where there are so many."""
    last = max([end_s or 0.0, *(_end(record) for record in records)])
    count = min(_MOST_BINS, max(_LEAST_BINS, len(records) // _REQUESTS_PER_BIN))
    # A run of no length still has bins, so that nothing divides by zero.
    return Bins(width_s=(last or 1.0) / count, count=count)


def _end(record: Record) -> float:
    return max(record.scheduled_s, record.end_s or 0.0, *record.chunks_s[-1:])


def cdf(values: Iterable[float]) -> tuple[tuple[float, float], ...]:
    """The empirical distribution as steps (value, share of samples at or below it), at most 500 of them.

    Up to 500 distinct values are all there. Of more, every step kept is exact, and reading a quantile off the steps
    (the first at or above its share) gives a sample whose rank is at most half a per cent of the samples too high.
    The steps that rank does not need go where the values are furthest apart in ratio: into the tail.
    """
    ordered = sorted(values)
    count = len(ordered)
    # Of equal samples only the last tells the share at or below.
    ranks = [i for i in range(count) if i + 1 == count or ordered[i] != ordered[i + 1]]
    if len(ranks) > MOST_POINTS:
        ranks = _thinned(ordered, ranks)
    return tuple((ordered[rank], (rank + 1) / count) for rank in ranks)


def _thinned(ordered: Sequence[float], ranks: Sequence[int]) -> list[int]:
    # Walk up, keeping a rank whenever the next one would lie more than an even step above the last one kept.
    step = len(ordered) / _EVEN
    kept = [0]
    for index in range(1, len(ranks)):
        if index + 1 == len(ranks) or ranks[index + 1] - ranks[kept[-1]] > step:
            kept.append(index)
    gaps = [_gap(ordered, ranks, low, high) for low, high in itertools.pairwise(kept)]
    heapq.heapify(gaps)
    chosen = set(kept)
    while gaps and len(chosen) < MOST_POINTS:
        _, low, high = heapq.heappop(gaps)
        if high - low < 2:  # noqa: PLR2004  # nothing between neighbours
            continue
        middle = (low + high) // 2
        chosen.add(middle)
        heapq.heappush(gaps, _gap(ordered, ranks, low, middle))
        heapq.heappush(gaps, _gap(ordered, ranks, middle, high))
    return [ranks[index] for index in sorted(chosen)]


def _gap(ordered: Sequence[float], ranks: Sequence[int], low: int, high: int) -> tuple[float, int, int]:
    # Widest first out of a heap of least first; values at or under zero have no ratio, so their difference serves.
    first, second = ordered[ranks[low]], ordered[ranks[high]]
    return -(second / first if first > 0 else second - first), low, high


def ttft_over_time(records: Sequence[Record], within: Bins) -> tuple[Series, Series]:
    """Median and 95th percentile of TTFT, seconds, of the requests scheduled in each bin."""
    held: list[list[float]] = [[] for _ in range(within.count)]
    for record in records:
        if (found := record.ttft_s) is not None:
            held[within.of(record.scheduled_s)].append(found)
    found_in = [quantiles(values, 0.5, 0.95) if values else (None, None) for values in held]
    return (
        within.series("median", [found[0] for found in found_in]),
        within.series("p95", [found[1] for found in found_in]),
    )


def throughput(records: Iterable[Record], within: Bins, name: str = "all requests") -> Series:
    """Output tokens a second received in each bin."""
    held = [0.0] * within.count
    for record in records:
        if record.chunks_s:
            each = tokens(record) / len(record.chunks_s)
            for at in record.chunks_s:
                held[within.of(at)] += each
    return within.series(name, [amount / within.width_s for amount in held])


def goodput(records: Iterable[Record], within: Bins, targets: Sequence[SloTarget]) -> Series:
    """Output tokens a second, received in each bin, of the requests that held every latency target."""
    good = goodness(targets)
    return throughput((record for record in records if good(record)), within, "requests within targets")


def in_flight(records: Sequence[Record], within: Bins) -> tuple[Series, Series]:
    """Mean number of requests sent and not ended, and of those still without content, in each bin.

    A request without an end stays in flight until the last bin's end.
    """
    end = within.width_s * within.count
    sent = [record for record in records if record.sent_s is not None]
    whole = [(record.sent_s or 0.0, end if record.end_s is None else record.end_s) for record in sent]
    waiting = [
        (start, record.chunks_s[0] if record.chunks_s else stop)
        for record, (start, stop) in zip(sent, whole, strict=True)
    ]
    return within.series("in flight", _occupancy(whole, within)), within.series(
        "without content yet", _occupancy(waiting, within)
    )


def _occupancy(stays: Iterable[tuple[float, float]], within: Bins) -> list[float]:
    held = [0.0] * within.count
    for start, stop in stays:
        for index in range(within.of(start), within.of(stop) + 1):
            overlap = min(stop, (index + 1) * within.width_s) - max(start, index * within.width_s)
            held[index] += max(0.0, overlap) / within.width_s
    return held


def tenant_service(records: Iterable[Record], within: Bins) -> list[Series]:
    """Output tokens a second that each tenant received in each bin; the tenant that received most comes first."""
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.tenant].append(record)
    served = {name: sum(map(tokens, held)) for name, held in groups.items()}
    return [throughput(groups[name], within, name) for name in sorted(groups, key=lambda name: (-served[name], name))]


def jain(amounts: Iterable[float]) -> float | None:
    """Jain's fairness index of what each received: 1 for all equal, 1/n for one that received everything.

    None for fewer than two or nothing at all. Jain, Chiu, Hawe: A Quantitative Measure of Fairness, 1984.
    """
    held = list(amounts)
    squares = sum(amount * amount for amount in held)
    if len(held) < 2 or squares == 0:  # noqa: PLR2004  # fairness is between two
        return None
    return sum(held) ** 2 / (len(held) * squares)


def fairness(records: Sequence[Record], within: Bins) -> Series:
    """Jain's index of tenants' output tokens in each bin, among the tenants that had a request under way in it."""
    present: defaultdict[str, set[int]] = defaultdict(set)
    end = within.width_s * within.count
    for record in records:
        stop = end if record.end_s is None and record.sent_s is not None else _end(record)
        present[record.tenant].update(range(within.of(record.scheduled_s), within.of(stop) + 1))
    service = tenant_service(records, within)
    values = [
        jain(series.points[index][1] or 0.0 for series in service if index in present[series.name])
        for index in range(within.count)
    ]
    return within.series("Jain index", values)


def failure_kind(record: Record) -> str | None:
    """What to call an unserved request, in words; None for a completed one."""
    match record.outcome:
        case Outcome.COMPLETED:
            return None
        case Outcome.REJECTED:
            return f"rejected, HTTP {record.status}" if record.status else "rejected"
        case Outcome.UNSENT:
            return "unsent"
        case Outcome.FAILED:
            return "failed" if record.failure is None else f"failed: {record.failure.value.replace('_', ' ')}"


def failures_over_time(records: Iterable[Record], within: Bins) -> list[Series]:
    """Requests that were not served, counted by kind in the bin they ended in; the commonest kind comes first."""
    held: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for record in records:
        if (kind := failure_kind(record)) is not None:
            held[kind][within.of(record.scheduled_s if record.end_s is None else record.end_s)] += 1
    kinds = sorted(held, key=lambda kind: (-held[kind].total(), kind))
    return [within.series(kind, [float(held[kind][index]) for index in range(within.count)]) for kind in kinds]


def replicas_over_time(counts: Iterable[ReplicaCount]) -> list[Series]:
    """Each model's replicas as it was read, in order of time, by model name."""
    held: defaultdict[str, list[Point]] = defaultdict(list)
    for read in sorted(counts, key=lambda read: read.t_s):
        held[read.model].append((read.t_s, float(read.count)))
    return [Series(model, tuple(held[model])) for model in sorted(held)]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a sweep: requests a second, offered and served within the targets."""

    name: str
    offered_rps: float
    goodput_rps: float


def sweep(runs: Iterable[ReportRun]) -> list[SweepPoint]:
    """Goodput against offered load, by rising load; runs without a rate (fewer than two requests) are left out."""
    return sorted(_sweep(runs), key=lambda point: (point.offered_rps, point.name))


def _sweep(runs: Iterable[ReportRun]) -> Iterator[SweepPoint]:
    for run in runs:
        found = figures(run.records, run.slo)
        offered, good = found["offered_rps"], found["goodput_rps"]
        if offered is not None and good is not None and math.isfinite(offered):
            yield SweepPoint(run.name, offered, good)
