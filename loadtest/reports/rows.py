"""The tables of every report, as text: page and terminal show the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtest.reports.model import Figure, ReportRun, by_tenant_and_model, counted, figures, metric
from loadtest.reports.series import failure_kind
from loadtest.reports.text import apart, quantity, visible
from loadtest.reports.verdict import Verdict

# Key of a figure, its heading, its unit.
COLUMNS = (
    ("requests", "sent", ""),
    ("completed", "done", ""),
    ("rejected", "refused", ""),
    ("failed", "failed", ""),
    ("ttft_p50_s", "TTFT p50", "s"),
    ("ttft_p95_s", "p95", "s"),
    ("ttft_p99_s", "p99", "s"),
    ("itl_p50_s", "ITL p50", "s"),
    ("itl_p95_s", "p95", "s"),
    ("tpot_p50_s", "TPOT p50", "s"),
    ("e2e_p50_s", "E2E p50", "s"),
    ("e2e_p95_s", "p95", "s"),
    ("output_tok_s", "output", "tok/s"),
    ("goodput_rps", "goodput", "req/s"),
)
COMPARED = (
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "itl_p50_s",
    "itl_p95_s",
    "tpot_p50_s",
    "e2e_p50_s",
    "e2e_p95_s",
    "output_tok_s",
    "goodput_rps",
    "completed_share",
    "good_share",
)
# Two runs of the same thing differ by this much without any reason.
NOISE_SHARE = 0.05


def heads() -> list[str]:
    """Of the table of figures."""
    return ["", *(head for _, head, _ in COLUMNS)]


def figure_rows(run: ReportRun) -> Iterator[list[str]]:
    """All requests, then by tenant and model."""
    for tenant, model, found in by_tenant_and_model(run):
        name = " · ".join(visible(part) for part in (tenant, model) if part) or "all requests"
        yield [name, *(quantity(found[key], unit, 3) for key, _, unit in COLUMNS)]


def target_rows(verdict: Verdict) -> Iterator[tuple[list[str], bool]]:
    """Target, limit and what was measured; whether it was met."""
    for line in verdict.lines:
        of = metric(line.target.metric)
        scope = " ".join(visible(part) for part in (line.target.tenant, line.target.model) if part)
        measured, limit = apart(line.measured, line.target.limit, of.unit)
        sign = "≤" if of.less_is_better else "≥"
        yield [f"{of.label} {scope}".strip(), f"{sign} {limit}", measured, "met" if line.met else "missed"], line.met


@dataclass(frozen=True, slots=True)
class Unserved:
    """One kind of request that was not served."""

    kind: str
    count: int
    # What the server or the client said of the first.
    detail: str


def unserved(run: ReportRun) -> list[Unserved]:
    """Requests that were not served by kind, the commonest first; the warm-up's too, which may explain the rest."""
    kinds: Counter[str] = Counter()
    details: dict[str, str] = {}
    for record in run.records:
        if (kind := failure_kind(record)) is not None:
            kinds[kind] += 1
            if record.detail and kind not in details:
                details[kind] = visible(record.detail)
    return [Unserved(kind, count, details.get(kind, "")) for kind, count in kinds.most_common()]


def compared(runs: Sequence[ReportRun]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Figure by figure, each run's value and its ratio to the first with "good", "bad" or "" for how that is."""
    found = [figures(counted(run.records), run.slo) for run in runs]
    for key in COMPARED:
        of = metric(key)
        first = found[0][key]
        yield of.label, [_against(one[key], first, of.unit, less=of.less_is_better) for one in found]


def _against(value: Figure, first: Figure, unit: str, *, less: bool) -> tuple[str, str]:
    shown = quantity(value, unit, 3)
    if value is first or value is None or not first:
        return shown, ""
    ratio = value / first
    if abs(ratio - 1) <= NOISE_SHARE:
        return f"{shown} (×{ratio:.2f})", ""
    return f"{shown} (×{ratio:.2f})", "good" if (ratio < 1) == less else "bad"
