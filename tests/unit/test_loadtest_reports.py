"""Reports: figures that can be checked by hand, verdicts, and pages that nobody's name can break."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from loadtest.client import FailureKind
from loadtest.records import Outcome, Record
from loadtest.reports import plots, series, terminal
from loadtest.reports.html import page
from loadtest.reports.model import ReplicaCount, ReportRun, SloTarget, figures, metric
from loadtest.reports.rows import compared, unserved
from loadtest.reports.text import number, quantity, visible
from loadtest.reports.verdict import State, judge
from loadtest.stats import quantiles

HOSTILE = "</script><img src=x onerror=alert(1)>[red]\x1b[31m\u202e"


def record(index: int, **changes: object) -> Record:
    """Due at `index` seconds, first token after 100 ms, four more 10 ms apart."""
    due = float(index)
    made = Record(
        index=index,
        tenant="a",
        model="m",
        scheduled_s=due,
        sent_s=due + 0.001,
        chunks_s=tuple(due + 0.1 + 0.01 * n for n in range(5)),
        end_s=due + 0.15,
        status=200,
        outcome=Outcome.COMPLETED,
        prompt_tokens=10,
        completion_tokens=5,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def failure(index: int, **changes: object) -> Record:
    return record(
        index,
        chunks_s=(),
        outcome=Outcome.FAILED,
        completion_tokens=None,
        failure=FailureKind.CONNECT,
        detail="no way",
        **changes,
    )


def run_of(*records: Record, **changes: object) -> ReportRun:
    made = ReportRun(
        name="r",
        when=datetime(2026, 1, 2, tzinfo=UTC),
        machine={"cores": 2},
        scenario={"name": "r", "streams": [{"tenant": "a"}], "notes": ["cut short"]},
        records=records,
        simulated=False,
        slo=[SloTarget("ttft_p95_s", 0.5)],
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_figures_are_those_of_a_calculation_by_hand() -> None:
    records = [record(index) for index in range(9)] + [failure(9), record(0, warm_up=True, tenant="warm")]
    found = figures(records, [SloTarget("ttft_p95_s", 0.05)])
    assert (found["requests"], found["completed"], found["failed"], found["good"]) == (10, 9, 1, 0)
    assert found["ttft_p50_s"] == pytest.approx(0.1)
    assert found["itl_p95_s"] == pytest.approx(0.01)
    assert found["tpot_p50_s"] == pytest.approx(0.01)
    assert found["e2e_p99_s"] == pytest.approx(0.15)
    assert found["late_p50_s"] == pytest.approx(0.001)
    # Ten arrivals, a second apart, fill ten seconds; 45 tokens came until the last end at 9.15 s.
    assert found["offered_rps"] == pytest.approx(1.0)
    assert found["output_tok_s"] == pytest.approx(45 / 9.15)
    assert found["completed_share"] == 0.9
    assert figures(records, [SloTarget("ttft_p95_s", 0.2)])["goodput_rps"] == pytest.approx(0.9)


def test_one_gap_beyond_the_limit_does_not_make_a_request_bad_many_do() -> None:
    hiccup = record(0, chunks_s=(0.1, *(0.1 + 0.01 * n for n in range(1, 30)), 2.0))
    slow = record(1, chunks_s=tuple(1.1 + 0.2 * n for n in range(5)))
    assert figures([hiccup, slow], [SloTarget("itl_p95_s", 0.1)])["good"] == 1


def test_a_run_is_met_missed_or_invalid() -> None:
    met = judge(run_of(record(0), record(1)))
    assert (met.state, met.exit_code) == (State.MET, 0)
    missed = judge(run_of(record(0), record(1), slo=[SloTarget("itl_p50_s", 0.001)]))
    assert (missed.state, missed.exit_code) == (State.NOT_MET, 3)
    invalid = judge(run_of(record(0), invalid=["the client was late"]))
    assert (invalid.state, invalid.exit_code) == (State.INVALID, 4)
    assert judge(run_of()).state is State.INVALID


def test_what_failed_was_late_without_bound() -> None:
    verdict = judge(run_of(record(0), failure(1)))
    assert verdict.state is State.NOT_MET
    assert verdict.lines[0].measured == math.inf
    shares = judge(run_of(record(0), failure(1), slo=[SloTarget("completed_share", 0.5)]))
    assert shares.state is State.MET


@pytest.mark.parametrize("key", ["ttft", "ttft_p0_s", "ttft_p100_s", "x_p50_s", ""])
def test_a_target_for_no_figure_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="known: ttft_pNN_s, itl_pNN_s, tpot_pNN_s, e2e_pNN_s"):
        metric(key)


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=3000), st.floats(0.01, 1.0))
def test_a_quantile_read_off_a_thinned_distribution_is_at_most_half_a_percent_of_ranks_off(
    values: list[float], level: float
) -> None:
    steps = series.cdf(values)
    assert len(steps) <= series.MOST_POINTS
    read = next(value for value, share in steps if share >= level - 1e-12)
    (exact,) = quantiles(values, level)
    (above,) = quantiles(values, min(1.0, level + 0.005 + 1 / len(values)))
    assert exact <= read <= above


def test_jains_index_of_equal_and_of_one() -> None:
    assert series.jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert series.jain([1.0, 0.0]) == pytest.approx(0.5)
    assert series.jain([1.0]) is None


def test_kinds_of_unserved_requests_come_with_their_first_detail() -> None:
    refused = record(3, outcome=Outcome.REJECTED, status=429, chunks_s=(), detail="slow down")
    found = unserved(run_of(failure(0), failure(1), refused, record(4)))
    assert [(one.kind, one.count, one.detail) for one in found] == [
        ("failed: connect", 2, "no way"),
        ("rejected, HTTP 429", 1, "slow down"),
    ]


def test_a_comparison_says_what_is_better_and_what_is_noise() -> None:
    slow = run_of(*(record(n, chunks_s=(n + 0.2, n + 0.21)) for n in range(3)))
    rows = dict(compared([run_of(*map(record, range(3))), slow]))
    assert rows["TTFT p50"][1] == ("200 ms (×2.00)", "bad")
    assert rows["ITL p50"][1][1] == ""


class Wellformed(HTMLParser):
    """Counts what was opened and not closed."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, _attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def varied(name: str) -> ReportRun:
    records = [
        record(0, warm_up=True),
        *(record(n, tenant=name, model=name) for n in range(1, 8)),
        *(record(n, tenant="b") for n in range(8, 12)),
        failure(12, tenant=name),
        record(13, outcome=Outcome.REJECTED, status=429, chunks_s=(), detail=name),
        record(14, outcome=Outcome.UNSENT, sent_s=None, chunks_s=(), end_s=None, status=None, completion_tokens=None),
    ]
    return run_of(
        *records,
        name=name,
        simulated=True,
        invalid=[name],
        replicas=[ReplicaCount(1.0, name, 1), ReplicaCount(2.0, name, 2)],
        slo=[SloTarget("ttft_p95_s", 0.5), SloTarget("e2e_p99_s", 1.0, tenant=name)],
    )


def shapes() -> Iterator[tuple[ReportRun, ...]]:
    yield (varied(HOSTILE),)
    yield (run_of(),)
    yield (run_of(record(0)),)
    yield (run_of(failure(0), failure(1)),)
    yield (varied(HOSTILE), run_of(*(record(n) for n in range(4))), run_of())


@pytest.mark.parametrize("runs", list(shapes()))
def test_a_page_is_whole_quiet_and_nobodys_name_breaks_it(runs: tuple[ReportRun, ...]) -> None:
    text = page(runs)
    parser = Wellformed()
    parser.feed(text)
    assert parser.open == []
    assert not parser.seen & {"script", "img", "iframe", "link", "form"}
    # Nothing is loaded from anywhere: no address but the policy that forbids it.
    assert not re.search(r"https?:|url\(|@import|\ssrc=[^x]|\shref=", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert ("Simulated engine" in text) == any(run.simulated for run in runs)


@pytest.mark.parametrize("runs", list(shapes()))
def test_a_terminal_shows_names_as_they_are_and_obeys_none(runs: tuple[ReportRun, ...]) -> None:
    out = StringIO()
    console = Console(file=out, width=200)
    for shown in terminal.tables(runs[0]):
        console.print(shown)
    console.print(terminal.comparison(runs))
    assert "\x1b" not in out.getvalue()
    assert "\u202e" not in out.getvalue()
    if runs[0].invalid:
        assert "[red]" in out.getvalue()


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a run"):
        page([])


def test_every_plot_of_a_varied_run_is_there_and_a_sweep_needs_two_rates() -> None:
    titles = [plot.title for plot in plots.of_one(varied("x"))]
    for wanted in ("TTFT over time", "Output tokens by tenant", "Requests not served", "Replicas ready"):
        assert wanted in titles
    quick = run_of(*(replace(record(n), scheduled_s=n / 2) for n in range(8)))
    steady = run_of(*map(record, range(8)))
    assert plots.goodput_against_load([steady, steady]) is None
    curve = plots.goodput_against_load([quick, steady])
    assert curve is not None
    assert [at for at, _ in curve.curves[0].points] == [pytest.approx(1.0), pytest.approx(2.0)]


def test_numbers_are_written_with_units_and_no_more_digits_than_they_deserve() -> None:
    assert quantity(0.0123456, "s") == "12.35 ms"
    assert quantity(0.5, "share") == "50 %"
    assert quantity(None, "s") == "–"
    assert number(math.inf) == "∞"
    assert number(1234567.0) == "1,234,567"
    assert visible("a\nb") == "a\\nb"
    assert len(visible("x" * 999)) == 300
