"""What the gateway counts against a model's targets: each request once, each gap exactly, nothing that was not promised."""

from __future__ import annotations

import asyncio
from typing import get_args

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.admission import shedding, ticket
from serving.api import loop_lag, upstream
from serving.api.exchange import Exchange, Outcome
from serving.config import GalerneConfig
from serving.metrics import table
from serving.metrics.gateway import GatewayMetrics
from serving.metrics.recorded import Metrics
from serving.metrics.table import TABLE
from serving.routing import choice, ejection

CONFIG = GalerneConfig.model_validate(
    {
        "models": [
            {"id": "chat", "source": "fake:chat", "slo": {"ttft_p95_s": 1.5, "itl_p95_s": 0.033}},
            {"id": "free", "source": "fake:free"},
        ],
        "tenants": [
            {"id": "press", "keys": [{"id": "a", "sha256": "0" * 64}], "models": ["chat"]},
            {"id": "jobs", "keys": [{"id": "b", "sha256": "1" * 64}]},
        ],
    }
)


class Bench:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.metrics = GatewayMetrics(lambda: self.now_s)
        self.metrics.expect(CONFIG)

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        text = generate_latest(self.metrics.registry).decode()
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    def request(
        self, *, first_s: float | None, end_s: float, status: int = 200, outcome: Outcome = "completed", model: str = "chat",
        left: bool = False, stream: bool = True,
    ) -> None:  # fmt: skip
        exchange = Exchange(model, "/v1/x", b"{}", "id", self.now_s, tenant="press", stream=stream)
        with self.metrics.accepted(exchange, "press", stream):
            begun_s = self.now_s
            if first_s is not None:
                self.now_s = exchange.first_byte_s = begun_s + first_s
                self.metrics.first_byte(exchange, status)
            self.now_s = begun_s + end_s
            exchange.outcome, exchange.client_left = outcome, left


TTFT = "galerne_slo_ttft_requests_total"


@pytest.mark.parametrize(
    ("first_s", "end_s", "status", "outcome", "left", "stream", "met", "missed"),
    [
        (1.5, 60, 200, "completed", False, True, 1, 0),
        (1.75, 60, 200, "completed", False, True, 0, 1),
        # Answered in time, then cut: the first byte was in time.
        (0.5, 60, 200, "failed", False, True, 1, 0),
        # No byte at all.
        (None, 0.1, 503, "rejected", False, True, 0, 1),
        (None, 0.1, 502, "failed", False, True, 0, 1),
        (None, 9.0, 0, "failed", True, True, 0, 1),
        # Gone before it could be late.
        (None, 0.5, 0, "failed", True, True, 0, 0),
        # Refused: a client's own error is no answer that was late or in time.
        (0.1, 0.1, 400, "completed", False, True, 0, 0),
        # Not streamed: nothing is seen of its first token.
        (9.0, 9.0, 200, "completed", False, False, 0, 0),
    ],
)
def test_a_request_counts_once_against_its_target(
    first_s: float | None, end_s: float, status: int, outcome: Outcome, left: bool, stream: bool, met: int, missed: int
) -> None:
    bench = Bench()
    bench.request(first_s=first_s, end_s=end_s, status=status, outcome=outcome, left=left, stream=stream)
    counted = bench.samples(TTFT)
    assert counted["true", "chat", "press"] == met
    assert counted["false", "chat", "press"] == missed
    observed = bench.samples("galerne_time_to_first_token_seconds_count").get(("chat", "press"), 0)
    assert observed == (1 if first_s is not None and stream and status < 400 else 0)


def test_a_first_byte_is_counted_before_the_stream_ends() -> None:
    bench = Bench()
    exchange = Exchange("chat", "/v1/x", b"", "id", bench.now_s, tenant="press", stream=True)
    with bench.metrics.accepted(exchange, "press", True):
        bench.now_s = exchange.first_byte_s = bench.now_s + 1
        bench.metrics.first_byte(exchange, 200)
        assert bench.samples(TTFT)["true", "chat", "press"] == 1


@pytest.mark.parametrize(
    ("events", "last_s", "met", "missed"),
    [
        (10, 0.33, 1, 0),
        (10, 0.331, 0, 1),
        # One long gap among short ones is no slow answer.
        (100, 3.0, 1, 0),
        # All at once, or nothing after the first bytes: no time between tokens was seen.
        (0, 0.0, 0, 0),
    ],
)
def test_a_stream_counts_by_the_mean_time_between_its_events(events: int, last_s: float, met: int, missed: int) -> None:
    bench = Bench()
    for model in ("chat", "free"):
        exchange = Exchange(model, "/v1/x", b"", "id", bench.now_s, tenant="press", stream=True)
        with bench.metrics.accepted(exchange, "press", True):
            exchange.first_byte_s, exchange.last_byte_s = 1000.0, 1000.0 + last_s - 1e-9
            exchange.later_events = events
    counted = bench.samples("galerne_slo_itl_requests_total")
    assert counted == {("true", "chat", "press"): met, ("false", "chat", "press"): missed} | {
        (met_, "chat", "jobs"): 0 for met_ in ("true", "false")
    }


def test_gaps_are_a_histogram_by_model() -> None:
    bench = Bench()
    for gap_s in (0.031, 0.04, 20.0):
        bench.metrics.gap("chat", gap_s)
    bench.metrics.gap("free", 0.03)
    assert bench.samples("galerne_inter_chunk_seconds_count") == {("chat",): 3, ("free",): 1}
    assert bench.samples("galerne_inter_chunk_seconds_bucket")["0.04", "chat"] == 2


def test_counters_exist_from_the_start_for_what_may_be_asked() -> None:
    bench = Bench()
    pairs = {("chat", "press"), ("chat", "jobs"), ("free", "jobs")}
    assert bench.samples("galerne_requests_accepted_total") == dict.fromkeys(pairs, 0.0)
    assert bench.samples(TTFT) == {(met, "chat", t): 0.0 for met in ("true", "false") for t in ("press", "jobs")}
    assert set(bench.samples("galerne_streams_cut_total")) == {("chat",), ("free",)}
    assert len(bench.samples("galerne_requests_finished_total")) == 4 * len(pairs)
    assert len(bench.samples("galerne_upstream_errors_total")) == 2 * 5
    assert len(bench.samples("galerne_holds_total")) == 5 * len(pairs)
    (build,) = bench.samples("galerne_build_info").items()
    assert build[1] == 1


def test_what_a_replica_takes_and_what_the_process_uses() -> None:
    bench = Bench()
    bench.metrics.gpus({"chat": 2.0, "free": 0.0})
    assert bench.samples("galerne_replica_gpus") == {("chat",): 2.0, ("free",): 0.0}
    assert bench.samples("process_resident_memory_bytes")[()] > 1e6
    assert bench.samples("process_open_fds")[()] > 0


async def test_a_late_timer_is_the_loops_lag() -> None:
    bench = Bench()
    delays_s = iter((0.0, 0.02, 3.0))

    async def sleep(seconds: float) -> None:
        try:
            bench.now_s += seconds + next(delays_s)
        except StopIteration:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        await loop_lag.watch(bench.metrics.loop_lag, lambda: bench.now_s, sleep)
    counted = bench.samples("galerne_event_loop_lag_seconds_bucket")
    assert (counted["0.001",], counted["0.03",], counted["2.5",], counted["5.0",]) == (1, 2, 2, 3)


def test_the_table_is_one_and_each_row_has_one_exporter() -> None:
    names = [row.name for row in TABLE]
    assert len(names) == len(set(names))
    assert all(row.buckets if row.kind == "histogram" else not row.buckets for row in TABLE)
    assert not any(row.name.endswith("_total") for row in TABLE)
    found = {e: {m.name for m in Metrics(exporter=e).registry.collect()} for e in ("gateway", "autoscaler")}
    for row in TABLE:
        exporters = [e for e, recorded in found.items() if row.name in recorded]
        assert exporters == ([] if row.at_scrape else [row.exporter]), row.name


def test_label_values_are_those_of_what_decides() -> None:
    assert table.ROUTE_REASONS == choice.REASONS
    assert get_args(ejection.Reason) == table.EJECTION_REASONS
    assert {*table.SHED_REASONS} == {"requests", "tenant", "bodies", *get_args(shedding.Reason)}
    assert get_args(upstream.FailureKind) == table.UPSTREAM_KINDS
    assert {*table.HOLD_ENDS} == {"full", *get_args(ticket.End)}
