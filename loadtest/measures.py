"""From single requests to figures: pure functions, so that what a report says is checked without a server.

One run is one target under one load for a few seconds. Runs of the two targets alternate; a pair is two
runs next to each other, and every comparison is made inside a pair before a median is taken over pairs.

Speeds and latencies are taken from a run's steady window alone: from the moment when the last stream has
started to the moment when the first is done. Outside it the load is not the one that the cell names.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.client import RequestResult
from loadtest.errors import LoadtestError
from loadtest.processes import MACHINE, Usage
from loadtest.stats import Spread, pairwise, quantiles, spread

# Beyond it the client's own event loop delays the stamps it takes.
CLIENT_SATURATED_SHARE = 0.90
# Beyond it the machine, not the target's latency, decides throughput.
MACHINE_SATURATED_SHARE = 0.95
# Beyond it work that belongs to no target decides too much; Ray's own processes stay below it.
DISTURBED_SHARE = 0.25

# This process, among the groups.
CLIENT = "client"

_NS = 1e9
_P50 = 0.50
_P99 = 0.99


@dataclass(frozen=True, slots=True)
class Run:
    """One target under one load: every request of it succeeded.

    Counts and costs are of the whole run; `tok_s` and the latencies of its steady window.
    """

    wall_s: float
    steady_s: float
    requests: int
    tokens: int
    # Least and greatest of one request: the same for both targets, or they did not do the same work.
    output_tokens_range: tuple[int, int]
    prompt_tokens_range: tuple[int, int]
    tok_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    e2e_p50_s: float
    # Connections made beyond the first of each stream: the server closed one between requests.
    reconnects: int
    # CPU seconds used during the run by each group, the client and the whole machine.
    cpu_s: Mapping[str, float]
    # Resident memory at the run's end.
    rss_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two targets, measured next to each other."""

    direct: Run
    gateway: Run


@dataclass(frozen=True, slots=True)
class Cell:
    """One load on both targets, all repeats: what a report shows of it."""

    name: str
    load: Mapping[str, Any]
    requests_per_run: Spread
    direct: Mapping[str, Spread]
    gateway: Mapping[str, Spread]
    compared: Mapping[str, Spread]
    # Why the figures must not be believed; empty for a valid cell.
    invalid: tuple[str, ...]
    # What limits the figures, without making them wrong.
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The cell as the summary file holds it."""
        return {**asdict(self), "valid": not self.invalid}


def failures(results: Sequence[RequestResult]) -> dict[str, int]:
    """How many requests failed, by kind."""
    return dict(Counter(str(result.failure.kind) for result in results if result.failure is not None))


def measure(
    streams: Sequence[Sequence[RequestResult]], *, reconnects: int, client_cpu_s: float, before: Usage, after: Usage
) -> Run:
    """The figures of one run, from the results of each stream in order.

    Raises LoadtestError for a run with failed requests, without streamed tokens, or whose streams were
    never all at work: it has no figures.
    """
    results = [result for stream in streams for result in stream]
    if failed := failures(results):
        first = next(result.failure for result in results if result.failure is not None)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(failed.items()))
        raise LoadtestError(f"{counts} of {len(results)} requests failed; the first: {first.detail}")
    start_ns = max(stream[0].send_ns for stream in streams)
    end_ns = min(stream[-1].end_ns for stream in streams)
    ttft_s = [r.ttft_s for r in results if r.ttft_s is not None and start_ns <= r.content_ns[0] <= end_ns]
    itl_s = [
        (later - earlier) / _NS
        for result in results
        for earlier, later in itertools.pairwise(result.content_ns)
        if start_ns <= later <= end_ns
    ]
    e2e_s = [result.e2e_s for result in results if start_ns <= result.end_ns <= end_ns]
    if not (ttft_s and itl_s and e2e_s):
        raise LoadtestError(
            "no request streamed two pieces of content while all streams were at work; "
            "ask for more output tokens or a longer --run-s"
        )
    ttft_p50_s, ttft_p99_s = quantiles(ttft_s, _P50, _P99)
    itl_p50_s, itl_p99_s = quantiles(itl_s, _P50, _P99)
    steady_s = (end_ns - start_ns) / _NS
    return Run(
        wall_s=(max(r.end_ns for r in results) - min(r.send_ns for r in results)) / _NS,
        steady_s=steady_s,
        requests=len(results),
        tokens=sum(result.tokens for result in results),
        output_tokens_range=_range(result.tokens for result in results),
        prompt_tokens_range=_range(result.prompt_tokens or 0 for result in results),
        tok_s=sum(_tokens_between(result, start_ns, end_ns) for result in results) / steady_s,
        ttft_p50_s=ttft_p50_s,
        ttft_p99_s=ttft_p99_s,
        itl_p50_s=itl_p50_s,
        itl_p99_s=itl_p99_s,
        e2e_p50_s=quantiles(e2e_s, _P50)[0],
        reconnects=reconnects,
        cpu_s={CLIENT: client_cpu_s, **{name: after.cpu_s[name] - before.cpu_s[name] for name in after.cpu_s}},
        rss_bytes=dict(after.rss_bytes),
    )


def _range(counts: Iterable[int]) -> tuple[int, int]:
    held = list(counts)
    return min(held), max(held)


def _tokens_between(result: RequestResult, start_ns: int, end_ns: int) -> float:
    """Tokens that arrived in the window; an event counts for the average of its request's events."""
    if not result.content_ns:
        return 0.0
    inside = sum(start_ns <= stamp <= end_ns for stamp in result.content_ns)
    return inside * result.tokens / len(result.content_ns)


def compare(name: str, load: Mapping[str, Any], pairs: Sequence[Pair], *, cores: int) -> Cell:
    """All repeats of one load, compared pair by pair. Raises ValueError for no pairs."""
    direct = [pair.direct for pair in pairs]
    gateway = [pair.gateway for pair in pairs]
    return Cell(
        name=name,
        load=load,
        requests_per_run=spread(run.requests for run in (*direct, *gateway)),
        direct=_target_figures(direct, cores),
        gateway=_target_figures(gateway, cores),
        compared=_compared(direct, gateway),
        invalid=tuple(_invalid(direct, gateway)),
        notes=tuple(_notes(direct, gateway, cores)),
    )


def _target_figures(runs: Sequence[Run], cores: int) -> dict[str, Spread]:
    figures = {
        "tok_s": spread(run.tok_s for run in runs),
        "ttft_p50_ms": spread(run.ttft_p50_s * 1e3 for run in runs),
        "ttft_p99_ms": spread(run.ttft_p99_s * 1e3 for run in runs),
        "itl_p50_ms": spread(run.itl_p50_s * 1e3 for run in runs),
        "itl_p99_ms": spread(run.itl_p99_s * 1e3 for run in runs),
        "e2e_p50_ms": spread(run.e2e_p50_s * 1e3 for run in runs),
        "steady_s": spread(run.steady_s for run in runs),
        "reconnects": spread(run.reconnects for run in runs),
        "client_cpu_share": spread(_client_share(run) for run in runs),
        "machine_cpu_share": spread(_machine_share(run, cores) for run in runs),
        # Neither client nor a named group: work of others that disturbs the measurement.
        "other_cpu_share": spread(_other_share(run, cores) for run in runs),
    }
    for group in runs[0].cpu_s:
        if group != MACHINE:
            figures[f"{group}_cpu_s_per_1k_tokens"] = spread(1e3 * run.cpu_s[group] / run.tokens for run in runs)
            figures[f"{group}_cpu_ms_per_request"] = spread(1e3 * run.cpu_s[group] / run.requests for run in runs)
    for group in runs[0].rss_bytes:
        figures[f"{group}_rss_mib"] = spread(run.rss_bytes[group] / 2**20 for run in runs)
    return figures


def _compared(direct: Sequence[Run], gateway: Sequence[Run]) -> dict[str, Spread]:
    def across(field: str, *, ratio: bool, scale: float = 1.0) -> Spread:
        return pairwise(
            [scale * getattr(run, field) for run in direct],
            [scale * getattr(run, field) for run in gateway],
            ratio=ratio,
        )

    return {
        "tok_s_ratio": across("tok_s", ratio=True),
        "ttft_added_p50_ms": across("ttft_p50_s", ratio=False, scale=1e3),
        "ttft_added_p99_ms": across("ttft_p99_s", ratio=False, scale=1e3),
        "itl_added_p50_ms": across("itl_p50_s", ratio=False, scale=1e3),
        "itl_added_p99_ms": across("itl_p99_s", ratio=False, scale=1e3),
        "e2e_added_p50_ms": across("e2e_p50_s", ratio=False, scale=1e3),
    }


def _invalid(direct: Sequence[Run], gateway: Sequence[Run]) -> list[str]:
    reasons = []
    busiest = max(_client_share(run) for run in (*direct, *gateway))
    if busiest > CLIENT_SATURATED_SHARE:
        reasons.append(f"the client used {busiest:.0%} of a core: it, not the target, may be what was measured")
    if any(a.output_tokens_range != b.output_tokens_range for a, b in zip(direct, gateway, strict=True)):
        reasons.append("the targets gave different counts of output tokens for the same requests")
    if any(a.prompt_tokens_range != b.prompt_tokens_range for a, b in zip(direct, gateway, strict=True)):
        reasons.append("the targets counted different prompt tokens for the same requests")
    return reasons


def _notes(direct: Sequence[Run], gateway: Sequence[Run], cores: int) -> list[str]:
    notes = []
    for target, runs in (("direct", direct), ("gateway", gateway)):
        busy = spread(_machine_share(run, cores) for run in runs).median
        others = spread(_other_share(run, cores) for run in runs).median
        if busy > MACHINE_SATURATED_SHARE:
            notes.append(f"{target}: the machine's processors limit it ({busy:.0%} of {cores} cores used)")
        # Without named groups the targets themselves are "others".
        if others > DISTURBED_SHARE and runs[0].rss_bytes:
            notes.append(f"{target}: disturbed, processes outside the named groups used {others:.0%} of {cores} cores")
    return notes


def _client_share(run: Run) -> float:
    # Over the time that its tokens take at the steady speed: idle edges must not hide a busy client.
    return run.cpu_s[CLIENT] * run.tok_s / run.tokens


def _machine_share(run: Run, cores: int) -> float:
    # The readings lie a little outside the run's wall time.
    return min(1.0, run.cpu_s[MACHINE] / (run.wall_s * cores))


def _other_share(run: Run, cores: int) -> float:
    known = sum(used for group, used in run.cpu_s.items() if group != MACHINE)
    return max(0.0, run.cpu_s[MACHINE] - known) / (run.wall_s * cores)
