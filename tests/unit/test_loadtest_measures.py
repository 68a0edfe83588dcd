"""From requests to figures: a run's measures, pair-wise comparison, and what makes a cell invalid."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadtest.client import Failure, FailureKind, RequestResult
from loadtest.engine import summarize as summarize_engine
from loadtest.errors import LoadtestError
from loadtest.measures import Cell, Pair, Run, compare, measure
from loadtest.overhead import loads_of, summarize
from loadtest.processes import Machine, Usage
from loadtest.report import comparison_tables, write_summary

MS = 10**6
BEFORE = Usage(cpu_s={"gateway": 5.0, "machine": 100.0}, rss_bytes={"gateway": 2})
AFTER = Usage(cpu_s={"gateway": 6.0, "machine": 102.0}, rss_bytes={"gateway": 100 * 2**20})


def request(send_ms: int, first_ms: int, gaps_ms: tuple[int, ...], failure: Failure | None = None) -> RequestResult:
    stamps = [send_ms + first_ms]
    for gap in gaps_ms:
        stamps.append(stamps[-1] + gap)
    return RequestResult(
        send_ns=send_ms * MS,
        response_ns=(send_ms + 1) * MS,
        content_ns=tuple(stamp * MS for stamp in stamps),
        end_ns=(stamps[-1] + 1) * MS,
        status=200,
        completion_tokens=len(stamps),
        prompt_tokens=10,
        failure=failure,
    )


def test_a_run_measures_what_its_requests_say() -> None:
    stream = [request(0, 10, (5, 5)), request(50, 30, (5, 9)), request(1000, 20, (5, 978))]
    run = measure([stream], reconnects=2, client_cpu_s=0.5, before=BEFORE, after=AFTER)
    assert run.requests == 3
    assert (run.tokens, run.output_tokens_range, run.prompt_tokens_range) == (9, (3, 3), (10, 10))
    assert run.wall_s == run.steady_s == pytest.approx(2.004)
    assert run.tok_s == pytest.approx(9 / 2.004)
    assert (run.ttft_p50_s, run.ttft_p99_s) == (0.020, 0.030)
    assert (run.itl_p50_s, run.itl_p99_s) == (0.005, 0.978)
    assert run.e2e_p50_s == pytest.approx(0.045)
    assert run.cpu_s == pytest.approx({"client": 0.5, "gateway": 1.0, "machine": 2.0})
    assert run.rss_bytes["gateway"] == 100 * 2**20
    assert run.reconnects == 2


def test_speeds_and_latencies_are_of_the_time_when_all_streams_are_at_work() -> None:
    # Stream two starts at 500 ms; stream one is done at 1,111 ms.
    first = [request(0, 1, (99, 100)), request(450, 100, (100, 100)), request(1000, 10, (50, 50))]
    second = [request(500, 40, (60, 60)), request(1050, 100, (200, 200))]
    run = measure([first, second], reconnects=0, client_cpu_s=0.5, before=BEFORE, after=AFTER)
    assert (run.wall_s, run.steady_s) == pytest.approx((1.551, 0.611))
    # Inside: 3 + 3 of stream one, 3 + 0 of stream two.
    assert run.tok_s == pytest.approx(9 / 0.611)
    assert (run.tokens, run.requests) == (15, 5)
    # First tokens at 550, 1010, 540.
    assert (run.ttft_p50_s, run.ttft_p99_s) == (0.040, 0.100)
    assert run.itl_p99_s == 0.100
    # Ends at 751, 1111, 661; the one at 201 and the one after the window are left out.
    assert run.e2e_p50_s == pytest.approx(0.161)


def test_an_event_of_several_tokens_counts_for_all() -> None:
    pairs_of_tokens = replace(request(0, 10, (5, 5)), completion_tokens=6)
    run = measure([[pairs_of_tokens]], reconnects=0, client_cpu_s=0.5, before=BEFORE, after=AFTER)
    assert run.tok_s == pytest.approx(6 / run.steady_s)


def test_a_failed_request_fails_the_run_and_is_named() -> None:
    failed = request(0, 1, (1,), Failure(FailureKind.HTTP_STATUS, "HTTP 503: no replica"))
    with pytest.raises(LoadtestError, match="1 http_status of 2 requests failed; the first: HTTP 503: no replica"):
        measure([[request(0, 1, (1,))], [], [failed]], reconnects=0, client_cpu_s=0.5, before=BEFORE, after=AFTER)


@pytest.mark.parametrize(
    "streams",
    [
        pytest.param([[request(0, 1, ())]], id="one token a request"),
        pytest.param([[request(0, 1, (1,))], [request(100, 1, (1,))]], id="streams that never overlap"),
    ],
)
def test_a_run_without_steady_tokens_has_no_figures(streams: list[list[RequestResult]]) -> None:
    with pytest.raises(LoadtestError, match="while all streams were at work"):
        measure(streams, reconnects=0, client_cpu_s=0.5, before=BEFORE, after=AFTER)


RUN = Run(
    wall_s=2.0,
    steady_s=1.6,
    requests=10,
    tokens=1000,
    output_tokens_range=(100, 100),
    prompt_tokens_range=(10, 12),
    tok_s=500.0,
    ttft_p50_s=0.010,
    ttft_p99_s=0.020,
    itl_p50_s=0.005,
    itl_p99_s=0.009,
    e2e_p50_s=0.2,
    reconnects=0,
    cpu_s={"client": 0.2, "engine": 0.4, "gateway": 0.6, "machine": 2.0},
    rss_bytes={"engine": 2**20, "gateway": 300 * 2**20},
)


def pair(direct: float, gateway: float, added_s: float = 0.002) -> Pair:
    slower = replace(RUN, tok_s=gateway, ttft_p50_s=RUN.ttft_p50_s + added_s)
    return Pair(direct=replace(RUN, tok_s=direct), gateway=slower)


def cell(name: str = "c1", *pairs: Pair) -> Cell:
    pacing = name.partition(" ")[2]
    return compare(name, {"streams": 1, "engine": pacing}, pairs or (pair(500, 400),), cores=2)


def test_targets_are_compared_inside_each_pair() -> None:
    found = cell("c1", pair(100, 90), pair(1000, 950), pair(10, 9.8, added_s=0.004))
    ratio = found.compared["tok_s_ratio"]
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.95, 0.9, 0.98))
    assert found.compared["ttft_added_p50_ms"].median == pytest.approx(2.0)
    assert found.compared["ttft_added_p50_ms"].high == pytest.approx(4.0)
    assert found.compared["ttft_added_p99_ms"].median == 0.0
    assert found.direct["tok_s"].median == 100
    assert not found.invalid


def test_costs_are_told_by_group_and_by_share() -> None:
    gateway = cell().gateway
    assert gateway["gateway_cpu_s_per_1k_tokens"].median == pytest.approx(0.6)
    assert gateway["gateway_cpu_ms_per_request"].median == pytest.approx(60.0)
    assert gateway["gateway_rss_mib"].median == pytest.approx(300.0)
    # 0.2 s for 1,000 tokens that take 2.5 s at 400 tokens a second.
    assert gateway["client_cpu_share"].median == pytest.approx(0.08)
    assert gateway["machine_cpu_share"].median == pytest.approx(0.5)
    # 2.0 s busy less 1.2 s of known groups, of 4 core-seconds.
    assert gateway["other_cpu_share"].median == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu_s": {**RUN.cpu_s, "client": 1.81}}, "client used 9[01]%"),
        ({"output_tokens_range": (99, 100)}, "different counts of output tokens"),
        ({"prompt_tokens_range": (10, 13)}, "different prompt tokens"),
    ],
)
def test_a_cell_that_must_not_be_believed_is_invalid_and_leaves_null(change: dict[str, object], reason: str) -> None:
    doubtful = Pair(direct=RUN, gateway=replace(RUN, **change))  # type: ignore[arg-type]
    found = cell("c32", pair(500, 400), doubtful)
    assert len(found.invalid) == 1
    with pytest.raises(LoadtestError, match=reason):
        raise LoadtestError(found.invalid[0])
    assert found.as_json()["valid"] is False
    assert summarize([found])["tok_s_ratio_c32"] is None


def test_a_client_at_its_limit_is_still_valid() -> None:
    edge = replace(RUN, cpu_s={**RUN.cpu_s, "client": 1.79})
    assert not cell("c1", Pair(direct=edge, gateway=edge)).invalid


@pytest.mark.parametrize(
    ("cpu_s", "notes"),
    [
        ({"machine": 2.0}, []),
        ({"machine": 3.9, "engine": 2.9}, ["gateway: the machine's processors limit it (98% of 2 cores used)"]),
        (
            {"machine": 3.0},
            ["gateway: disturbed, processes outside the named groups used 45% of 2 cores"],
        ),
    ],
)
def test_what_limits_a_cell_is_noted(cpu_s: dict[str, float], notes: list[str]) -> None:
    found = cell("c1", Pair(direct=RUN, gateway=replace(RUN, cpu_s={**RUN.cpu_s, **cpu_s})))
    assert list(found.notes) == notes
    assert not found.invalid


def test_the_overhead_summary_names_load_and_pacing() -> None:
    loads = loads_of((1, 32), (1, 64))
    assert [load.name for load in loads] == ["c1", "c32", "c1_64k", "c32_64k"]
    # What the number in front adds is part of the size.
    assert [len(load.prompts[0]) + 13 for load in loads] == [1024, 1024, 65536, 65536]
    bigger = replace(RUN, rss_bytes={**RUN.rss_bytes, "gateway": 400 * 2**20})
    summary = summarize([cell("c32 paced"), cell("c32 saturated", Pair(RUN, bigger)), cell("c32_64k paced")])
    assert summary == {
        "gateway_rss_mib": 400.0,
        "tok_s_ratio_c32": 0.8,
        "ttft_added_p50_ms_c32": 2.0,
        "ttft_added_p99_ms_c32": 0.0,
        "gateway_cpu_ms_per_request_c32": 60.0,
        "tok_s_ratio_c32_saturated": 1.0,
        "ttft_added_p50_ms_c32_saturated": 0.0,
        "ttft_added_p99_ms_c32_saturated": 0.0,
        "gateway_cpu_ms_per_request_c32_saturated": 60.0,
        "tok_s_ratio_c32_64k": 0.8,
        "ttft_added_p50_ms_c32_64k": 2.0,
        "ttft_added_p99_ms_c32_64k": 0.0,
        "gateway_cpu_ms_per_request_c32_64k": 60.0,
    }


def test_the_engine_summary_holds_both_speeds() -> None:
    summary = summarize_engine([cell("c16")])
    assert summary["tok_s_direct_c16"] == 500
    assert summary["tok_s_gateway_c16"] == 400
    assert summary["tok_s_ratio_c16"] == 0.8
    assert summary["ttft_added_p50_ms_c16"] == 2.0


def test_the_summary_file_has_the_form(tmp_path: Path) -> None:
    path = tmp_path / "build" / "bench" / "x.json"
    write_summary(
        path,
        name="x",
        when=datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC),
        machine=Machine(cores=2, cpu_model="cpu", memory_gib=4.0, python="3.11.2"),
        settings={"repeats": 5},
        cells=[cell().as_json()],
        summary={"tok_s_ratio_c1": 0.8, "other": None},
    )
    held = json.loads(path.read_text())
    assert list(held) == ["name", "when", "machine", "settings", "cells", "summary"]
    assert held["when"] == "2027-01-02T03:04:05+00:00"
    assert held["machine"]["cores"] == 2
    assert held["summary"] == {"tok_s_ratio_c1": 0.8, "other": None}
    assert held["cells"][0]["compared"]["tok_s_ratio"] == {"median": 0.8, "low": 0.8, "high": 0.8, "count": 1}


def test_the_tables_show_every_cell_on_both_targets() -> None:
    speed, compared, cost = comparison_tables("t", [cell("c1"), cell("c32")])
    assert [table.row_count for table in (speed, compared, cost)] == [4, 2, 4]
    assert "gateway" in [column.header for column in cost.columns]
