"""From records to figures: pure, exact, and with warm-up requests left out.

Latencies count from a request's scheduled time. Each is of the requests that had it: TTFT of all that brought content,
ITL of all gaps seen, TPOT and E2E of completed requests. The client's lateness is of all that were sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadtest.records import Outcome, Record
from loadtest.stats import quantiles

_LEVELS = (0.50, 0.90, 0.95, 0.99, 1.0)
_P95 = 0.95


@dataclass(frozen=True, slots=True)
class Slo:
    """What a single request must hold to be good, in seconds; None is not judged.

    `itl_s` bounds the p95 of the gaps within the request: one hiccup in a long answer does not make it bad.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, record: Record) -> bool:
        """Whether it completed and held all; one without content has no first token and is not good."""
        if record.outcome is not Outcome.COMPLETED or record.ttft_s is None:
            return False
        gaps = gaps_s(record)
        itl_s = quantiles(gaps, _P95)[0] if gaps else 0.0
        return _within(record.ttft_s, self.ttft_s) and _within(itl_s, self.itl_s) and _within(record.e2e_s, self.e2e_s)


@dataclass(frozen=True, slots=True)
class Latency:
    """Nearest-rank quantiles of `count` values, in seconds."""

    count: int
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of some requests; a latency is None where no request had it, a rate where no time passed."""

    requests: int
    # By outcome, each outcome present.
    outcomes: dict[str, int]
    # Failed requests by kind.
    failures: dict[str, int]
    # Rejected requests by HTTP status.
    rejections: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    ttft: Latency | None
    itl: Latency | None
    tpot: Latency | None
    e2e: Latency | None
    late: Latency | None
    # Tokens a second over the run's busy time: first scheduled time to last end.
    prompt_tok_s: float | None
    output_tok_s: float | None
    # Requests a second over the time of the run's arrivals.
    offered_rps: float | None
    goodput_rps: float | None
    # Completed requests that met the SLO; without one all completed ones are good.
    good: int


@dataclass(frozen=True, slots=True)
class Figures:
    """A run's figures. Rates of all groups are over the same seconds, so that they add up to the total's."""

    total: Group
    tenants: dict[str, Group]
    models: dict[str, Group]
    # How long the measured arrivals took: n arrivals fill n mean gaps.
    arrivals_s: float | None
    # From the first scheduled time to the last end.
    busy_s: float | None


def figures_of(records: Iterable[Record], slo: Slo | None = None) -> Figures:
    """All figures of a run, in total, by tenant and by model."""
    measured = [record for record in records if not record.warm_up]
    arrivals_s, busy_s = _arrivals_s(measured), _busy_s(measured)
    judge = slo or Slo()

    def group(held: Sequence[Record]) -> Group:
        return _group(held, judge, arrivals_s, busy_s)

    return Figures(
        total=group(measured),
        tenants={
            name: group([r for r in measured if r.tenant == name]) for name in sorted({r.tenant for r in measured})
        },
        models={name: group([r for r in measured if r.model == name]) for name in sorted({r.model for r in measured})},
        arrivals_s=arrivals_s,
        busy_s=busy_s,
    )


def gaps_s(record: Record) -> list[float]:
    """Seconds between content events; 0 where one read brought several."""
    return [later - earlier for earlier, later in pairwise(record.chunks_s)]


def tokens(record: Record) -> int:
    """Output tokens received: the engine's own count, else one for each content event."""
    return len(record.chunks_s) if record.completion_tokens is None else record.completion_tokens


def latency(values: Iterable[float | None]) -> Latency | None:
    """The quantiles of those that are not None; None where all are."""
    held = [value for value in values if value is not None]
    return Latency(len(held), *quantiles(held, *_LEVELS)) if held else None


def _group(held: Sequence[Record], slo: Slo, arrivals_s: float | None, busy_s: float | None) -> Group:
    outcomes = Counter(record.outcome for record in held)
    completed = [record for record in held if record.outcome is Outcome.COMPLETED]
    good = sum(map(slo.met_by, completed))
    prompt_tokens = sum(record.prompt_tokens or 0 for record in held)
    output_tokens = sum(map(tokens, held))
    return Group(
        requests=len(held),
        outcomes={outcome.value: outcomes[outcome] for outcome in Outcome},
        failures=_counts(r.failure.value if r.failure else "unknown" for r in held if r.outcome is Outcome.FAILED),
        rejections=_counts(str(r.status) for r in held if r.outcome is Outcome.REJECTED),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft=latency(record.ttft_s for record in held),
        itl=latency(gap for record in held for gap in gaps_s(record)),
        tpot=latency(map(_tpot_s, completed)),
        e2e=latency(record.e2e_s for record in completed),
        late=latency(record.late_s for record in held),
        prompt_tok_s=_rate(prompt_tokens, busy_s),
        output_tok_s=_rate(output_tokens, busy_s),
        offered_rps=_rate(len(held), arrivals_s),
        goodput_rps=_rate(good, arrivals_s),
        good=good,
    )


def _tpot_s(record: Record) -> float | None:
    # By the engine's count of tokens: several may share an event.
    count = tokens(record)
    return (record.chunks_s[-1] - record.chunks_s[0]) / (count - 1) if record.chunks_s and count > 1 else None


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _arrivals_s(held: Sequence[Record]) -> float | None:
    times = [record.scheduled_s for record in held]
    if not times or max(times) == min(times):
        return None
    return (max(times) - min(times)) * len(times) / (len(times) - 1)


def _busy_s(held: Sequence[Record]) -> float | None:
    ends = [record.end_s for record in held if record.end_s is not None]
    return (max(ends) - min(record.scheduled_s for record in held) or None) if ends else None


def _rate(count: float, seconds: float | None) -> float | None:
    return count / seconds if seconds else None


def _within(value: float | None, limit: float | None) -> bool:
    return limit is None or (value is not None and value <= limit)
