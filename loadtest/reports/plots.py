"""Which plots a report shows: curves of `series`, named, with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loadtest.reports import series
from loadtest.reports.model import ReportRun, SloTarget, counted, latencies_s, metric
from loadtest.reports.series import Series
from loadtest.reports.svg import COLOURS, Curve, Guide, Plot
from loadtest.reports.text import visible

_LONG = {
    "ttft": "Time to first token (TTFT)",
    "itl": "Time between tokens (ITL)",
    "tpot": "Time per output token (TPOT)",
    "e2e": "End-to-end time (E2E)",
}
_OF_ALL = "Share of requests at or below this time"


def of_one(run: ReportRun) -> Iterator[Plot]:
    """All plots of a run; those without anything to draw are left to say so."""
    yield from cdfs([run])
    yield from over_time(run)


def cdfs(runs: Sequence[ReportRun]) -> Iterator[Plot]:
    """The distribution of each latency, a curve a run."""
    for kind, name in _LONG.items():
        curves = []
        for run in runs[:COLOURS]:
            steps = series.cdf(latencies_s(counted(run.records), kind))
            # A gap of nothing (two tokens in one packet) has no place on a logarithmic axis.
            points = tuple((value * 1e3, share) for value, share in steps if value > 0)
            curves.append(Curve(visible(run.name) if len(runs) > 1 else "", points, steps=True))
        yield Plot(
            title=name,
            x_label="milliseconds",
            y_label="share",
            curves=curves,
            note=f"{_OF_ALL}." if kind != "itl" else "Share of the gaps between tokens at or below this time.",
            log_x=True,
            y_least_top=1.0,
            guides=_limits(runs[0].slo, kind, 1e3, vertical=True) if len(runs) == 1 else (),
        )


def over_time(run: ReportRun) -> Iterator[Plot]:
    """What happened when; the warm-up, which no figure counts, is shaded."""
    records = run.records
    if not records:
        return
    within = series.bins(records)
    warm = [record.scheduled_s for record in records if record.warm_up]
    shaded = (0.0, max(warm), "warm-up, not counted") if warm else None
    x_label = "seconds"

    def plot(title: str, y_label: str, curves: Sequence[Series], note: str = "", **more: object) -> Plot:
        drawn = [Curve(one.name, one.points) for one in curves[:COLOURS]]
        return Plot(title, x_label, y_label, drawn, note, shaded=shaded, **more)  # type: ignore[arg-type]

    ttft = [Series(one.name, _times(one, 1e3)) for one in series.ttft_over_time(records, within)]
    yield plot(
        "TTFT over time",
        "milliseconds",
        ttft,
        "By the time at which a request was due.",
        guides=_limits(run.slo, "ttft", 1e3, vertical=False),
    )
    yield plot(
        "Output tokens over time",
        "tokens/s",
        [series.throughput(records, within), series.goodput(records, within, run.slo)],
        "All that came, and of it what belongs to requests that met every latency target.",
    )
    yield plot("Requests in flight", "requests", series.in_flight(records, within))
    tenants = series.tenant_service(records, within)
    if len(tenants) > 1:
        yield plot("Output tokens by tenant", "tokens/s", tenants[:COLOURS], "Stacked.", bar_width=within.width_s * 0.9)
        yield plot(
            "Fairness between tenants",
            "Jain's index",
            [series.fairness(records, within)],
            "1: every tenant with a request under way received as many tokens as every other. Unequal demand is "
            "unequal too.",
            y_least_top=1.0,
        )
    failures = series.failures_over_time(records, within)
    if failures:
        yield plot("Requests not served", "requests", failures, "Stacked, by kind.", bar_width=within.width_s * 0.9)
    if run.replicas:
        curves = [Curve(one.name, one.points, steps=True) for one in series.replicas_over_time(run.replicas)]
        yield Plot("Replicas ready", x_label, "replicas", curves[:COLOURS], "From Prometheus.", shaded=shaded)


def goodput_against_load(runs: Sequence[ReportRun]) -> Plot | None:
    """Goodput of several runs against what was offered; None where they do not differ in it."""
    points = series.sweep(runs)
    if len({round(point.offered_rps, 3) for point in points}) < 2:  # noqa: PLR2004  # a curve is of two points
        return None
    return Plot(
        "Goodput against load",
        "requests/s offered",
        "requests/s within targets",
        [
            Curve("served within targets", tuple((p.offered_rps, p.goodput_rps) for p in points), marked=True),
            Curve("all of them", tuple((p.offered_rps, p.offered_rps) for p in points)),
        ],
        "Where the two part, the server no longer keeps its targets.",
    )


def _times(one: Series, factor: float) -> tuple[series.Point, ...]:
    return tuple((at, None if value is None else value * factor) for at, value in one.points)


def _limits(slo: Sequence[SloTarget], kind: str, factor: float, *, vertical: bool) -> tuple[Guide, ...]:
    return tuple(
        Guide(f"target: {of.label}", target.limit * factor, vertical)
        for target in slo
        if (of := metric(target.metric)).latency == kind and target.model is None and target.tenant is None
    )
