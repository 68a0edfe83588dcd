"""What every report is made from: a run with its records, its targets, and the figures of both.

Figures leave warm-up requests out. Latencies count from a request's scheduled time; each is of those requests that
had one: time to first token (TTFT) of every request that brought content, time between tokens (ITL) of all gaps seen,
mean time per output token after the first (TPOT) and end-to-end time (E2E) of completed requests.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from loadtest.records import Outcome, Record
from loadtest.stats import quantiles

Figure = float | int | None
LATENCIES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}
LEVELS = (0.5, 0.95, 0.99)
_LATENCY = re.compile(r"(ttft|itl|tpot|e2e)_p([1-9][0-9]?)_s")
# Figures other than latencies that a target may name: unit, label, whether less is better.
_OTHERS = {
    "completed_share": ("share", "completed", False),
    "good_share": ("share", "within targets", False),
    "failed_share": ("share", "failed", True),
    "rejected_share": ("share", "rejected", True),
    "output_tok_s": ("tok/s", "output", False),
    "goodput_rps": ("req/s", "goodput", False),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that can have a target or be compared."""

    key: str
    # As `loadtest.reports.text.quantity` takes it.
    unit: str
    label: str
    less_is_better: bool
    # ttft, itl, tpot or e2e with its level 0..1, for latencies only.
    latency: str | None = None
    level: float | None = None


def metric(key: str) -> Metric:
    """The metric of that key (`ttft_p95_s`, `itl_p50_s`, `e2e_p99_s`, `completed_share`, …).

    Raises ValueError for a key that is none, with the known forms.
    """
    if found := _LATENCY.fullmatch(key):
        name, level = found[1], int(found[2])
        return Metric(key, "s", f"{LATENCIES[name]} p{level}", True, latency=name, level=level / 100)
    if key not in _OTHERS:
        known = ", ".join([*(f"{name}_pNN_s" for name in LATENCIES), *_OTHERS])
        raise ValueError(f"{key!r} is no figure that can have a target; known: {known}")
    unit, label, less = _OTHERS[key]
    return Metric(key, unit, label, less)


@dataclass(frozen=True, slots=True)
class SloTarget:
    """One line of a service-level objective: the metric at most (or, where more is better, at least) `limit`.

    `limit` is in the metric's unit: seconds, a share 0..1, or a rate. None for model or tenant means all of them
    together. Raises ValueError for an unknown metric.
    """

    metric: str
    limit: float
    model: str | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        metric(self.metric)

    def covers(self, record: Record) -> bool:
        """Whether the target speaks of this request."""
        return self.model in {None, record.model} and self.tenant in {None, record.tenant}


def slo_targets(slo: Mapping[str, float], *, model: str | None = None, tenant: str | None = None) -> list[SloTarget]:
    """Targets from a configuration's `slo` section, `{ttft_p95_s: 1.0, itl_p95_s: 0.1}`; ValueError as SloTarget."""
    return [SloTarget(key, limit, model=model, tenant=tenant) for key, limit in slo.items()]


@dataclass(frozen=True, slots=True)
class ReplicaCount:
    """How many replicas a model had ready at a time, seconds after the run's start."""

    t_s: float
    model: str
    count: int


@dataclass(frozen=True, slots=True)
class ReportRun:
    """A finished run and all that a reader must know of it."""

    name: str
    # Must know its time zone.
    when: datetime
    machine: Mapping[str, Any]
    scenario: Mapping[str, Any]
    records: Sequence[Record] = field(repr=False)
    # Whether the engine was the fake one; every report says so. No default: it must not be forgotten.
    simulated: bool
    slo: Sequence[SloTarget] = ()
    replicas: Sequence[ReplicaCount] = ()
    # Why the run must not be believed (a late client, a busy machine); empty for a valid run.
    invalid: Sequence[str] = ()


def counted(records: Iterable[Record]) -> list[Record]:
    """The records that figures are of: all but the warm-up's."""
    return [record for record in records if not record.warm_up]


def gaps_s(record: Record) -> list[float]:
    """Seconds between a request's content events; 0 where one read brought several."""
    return [later - earlier for earlier, later in pairwise(record.chunks_s)]


def tokens(record: Record) -> int:
    """Output tokens received: the engine's own count, else one for each content event."""
    return len(record.chunks_s) if record.completion_tokens is None else record.completion_tokens


def goodness(targets: Sequence[SloTarget]) -> Callable[[Record], bool]:
    """The test of a single request against the run's latency targets: goodput counts those that pass.

    A request is good if it completed and held each covering target's limit itself; for ITL with its own quantile at
    the target's level. Of several levels of one latency only the highest binds a single request: half of all
    requests may exceed a limit for the median.
    """
    latency: dict[tuple[str | None, str | None, str], tuple[float, SloTarget]] = {}
    for target in targets:
        of = metric(target.metric)
        if of.latency is None or of.level is None:
            continue
        key = target.model, target.tenant, of.latency
        if key not in latency or of.level > latency[key][0]:
            latency[key] = of.level, target
    binding = [(kind, level, target) for (_, _, kind), (level, target) in latency.items()]

    def good(record: Record) -> bool:
        return record.outcome is Outcome.COMPLETED and all(
            _own(record, kind, level) <= target.limit for kind, level, target in binding if target.covers(record)
        )

    return good


def tpot_s(record: Record) -> float | None:
    """Mean seconds an output token after the first, by the engine's count of tokens: several may share an event."""
    count = tokens(record)
    return (record.chunks_s[-1] - record.chunks_s[0]) / (count - 1) if record.chunks_s and count > 1 else None


def _own(record: Record, kind: str, level: float) -> float:
    if kind == "itl":
        gaps = gaps_s(record)
        return quantiles(gaps, level)[0] if gaps else 0.0
    found = {"ttft": record.ttft_s, "e2e": record.e2e_s, "tpot": tpot_s(record)}[kind]
    # A request completed without content had no first token to be late.
    return 0.0 if found is None else found


def latencies_s(records: Iterable[Record], kind: str) -> list[float]:
    """All values seen of `ttft`, `itl`, `tpot` or `e2e`, seconds, in no order; warm-up is the caller's to leave out."""
    match kind:
        case "ttft":
            return [found for record in records if (found := record.ttft_s) is not None]
        case "itl":
            return [gap for record in records for gap in gaps_s(record)]
        case "e2e" | "tpot":
            own = tpot_s if kind == "tpot" else operator.attrgetter("e2e_s")
            done = (record for record in records if record.outcome is Outcome.COMPLETED)
            return [found for record in done if (found := own(record)) is not None]
        case _:
            raise ValueError(f"{kind!r} is none of {', '.join(LATENCIES)}")


def arrivals_s(records: Sequence[Record]) -> float | None:
    """How long the requests' arrivals took, seconds: n arrivals fill n mean gaps, so n/(n-1) times first to last.

    None for fewer than two requests or all at one time: no rate can be told.
    """
    times = [record.scheduled_s for record in records]
    if not times or max(times) == min(times):
        return None
    return (max(times) - min(times)) * len(times) / (len(times) - 1)


def busy_s(records: Sequence[Record]) -> float | None:
    """Seconds from the first scheduled time to the last end or content; None where nothing came of any request."""
    ends = [end for record in records for end in (record.end_s, *record.chunks_s[-1:]) if end is not None]
    if not ends:
        return None
    return max(ends) - min(record.scheduled_s for record in records) or None


def figures(records: Sequence[Record], targets: Sequence[SloTarget] = ()) -> dict[str, Figure]:
    """All figures of the counted among `records`; None for what does not exist.

    Counts: requests and each outcome. Shares are of requests. `offered_rps` and `goodput_rps` are requests a second
    of arrivals, `output_tok_s` is tokens a second from the first scheduled time to the last end. Latencies in
    seconds, nearest rank. Without latency targets every completed request is good.
    """
    held = counted(records)
    outcomes = Counter(record.outcome for record in held)
    good = sum(map(goodness(targets), held))
    arrivals, busy = arrivals_s(held), busy_s(held)
    output = sum(map(tokens, held))
    found: dict[str, Figure] = {
        "requests": len(held),
        **{outcome.value: outcomes[outcome] for outcome in Outcome},
        "good": good,
        "output_tokens": output,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in held),
        **{f"{outcome.value}_share": _ratio(outcomes[outcome], len(held)) for outcome in Outcome},
        "good_share": _ratio(good, len(held)),
        "offered_rps": _ratio(len(held), arrivals),
        "goodput_rps": _ratio(good, arrivals),
        "output_tok_s": _ratio(output, busy),
    }
    for kind in LATENCIES:
        found.update(_quantile_figures(kind, latencies_s(held, kind)))
    late = [lateness for record in held if (lateness := record.late_s) is not None]
    found.update(_quantile_figures("late", late))
    return found


def _quantile_figures(kind: str, values: Sequence[float]) -> dict[str, Figure]:
    found = quantiles(values, *LEVELS) if values else (None,) * len(LEVELS)
    return {f"{kind}_p{level * 100:.0f}_s": value for level, value in zip(LEVELS, found, strict=True)}


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def by_tenant_and_model(run: ReportRun) -> list[tuple[str, str, dict[str, Figure]]]:
    """Figures as rows (tenant, model, figures), "" for all of them: the whole, each tenant, each model, each pair.

    Rows that would repeat another are left out: pairs where there is but one tenant or one model.
    """
    held = counted(run.records)
    tenants = sorted({record.tenant for record in held})
    models = sorted({record.model for record in held})
    rows = [("", "", figures(held, run.slo))]
    if len(tenants) > 1:
        rows += [(name, "", figures([r for r in held if r.tenant == name], run.slo)) for name in tenants]
    if len(models) > 1:
        rows += [("", name, figures([r for r in held if r.model == name], run.slo)) for name in models]
    if len(tenants) > 1 and len(models) > 1:
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in held:
            groups.setdefault((record.tenant, record.model), []).append(record)
        rows += [(*key, figures(groups[key], run.slo)) for key in sorted(groups)]
    return rows
