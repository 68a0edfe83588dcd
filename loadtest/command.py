"""What the benchmarks' command lines share: where the targets are, how long to measure, how to fail."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from loadtest.errors import LoadtestError
from loadtest.interleave import CellSpec, Side, run_cell
from loadtest.measures import Cell
from loadtest.peers.peer import Recipe
from loadtest.processes import Machine, ProcessGroups, parse_groups
from loadtest.request import Target, chat_templates, target_at

DEFAULT_REPEATS = 5
# Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130
# Columns of a report that goes to a file or a log.
REPORT_WIDTH = 110
DEFAULT_OUTPUT_TOKENS = 64
KEY_VARIABLE = "GALERNE_KEY"
ENGINE_TOKEN_VARIABLE = "GALERNE_ENGINE_TOKEN"  # noqa: S105  # the name of a variable


@dataclass(frozen=True, slots=True)
class Subject:
    """One model and two ways to it: straight to the engine, and through the gateway to that same engine."""

    # Tells subjects of one benchmark apart (a pacing mode).
    label: str
    model: str
    direct: Target
    gateway: Target
    # Process groups to account, as `loadtest.processes.parse_groups` gives them.
    groups: Mapping[str, tuple[str, ...]]
    # What the report says of the engine.
    engine: Mapping[str, Any] = field(default_factory=dict)
    # How another engine like it is run; None where it is simulated, or nobody said.
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """One cell to measure: the prompts, and how many streams ask them."""

    name: str
    streams: int
    prompts: tuple[str, ...]
    shown: Mapping[str, Any]


def numbers(text: str) -> tuple[int, ...]:
    """`1,32,128` as positive integers; for argparse, raises ValueError."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise ValueError("numbers must be 1 or more")
    return values


def parser(description: str, *, streams: str, run_s: float, timeout_s: float, out: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    built = argparse.ArgumentParser(description=description)
    targets = built.add_argument_group("targets (either --start or the URLs)")
    targets.add_argument("--start", action="store_true", help="start a local cluster, measure it, end it")
    targets.add_argument("--direct", metavar="URL", help="an engine, without the gateway")
    targets.add_argument("--gateway", metavar="URL", help="the gateway in front of that same engine")
    targets.add_argument("--model", help="model id, the same on both")
    targets.add_argument(
        "--key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"API key of the gateway (default: ${KEY_VARIABLE})",
    )
    targets.add_argument(
        "--engine-token",
        default=os.environ.get(ENGINE_TOKEN_VARIABLE),
        help=f"token of an engine that admits only its gateway (default: ${ENGINE_TOKEN_VARIABLE})",
    )
    targets.add_argument(
        "--pids",
        default="",
        metavar="GROUPS",
        help="processes to account, e.g. engine=12+13,gateway=14,haproxy=haproxy: pids, PID/NAME for descendants "
        "of this name, or a process name",
    )
    built.add_argument("--streams", type=numbers, default=numbers(streams), help=f"default {streams}")
    built.add_argument("--output-tokens", type=int, default=DEFAULT_OUTPUT_TOKENS)
    built.add_argument("--repeats", type=int, default=DEFAULT_REPEATS, help="pairs of runs a cell")
    built.add_argument("--run-s", type=float, default=run_s, help="about how long one run lasts, seconds")
    built.add_argument("--timeout-s", type=float, default=timeout_s, help="bound on one request, seconds")
    built.add_argument("--out", type=Path, default=Path(out), help=f"summary file (default {out})")
    return built


def subject_from(args: argparse.Namespace, label: str) -> Subject:
    """The subject that --direct, --gateway, --model, --key and --pids name; LoadtestError without them."""
    missing = [f"--{name}" for name in ("direct", "gateway", "model") if getattr(args, name) is None]
    if missing:
        raise LoadtestError(f"{', '.join(missing)} missing; give them, or --start")
    return Subject(
        label=label,
        model=args.model,
        direct=target_at("direct", args.direct, engine_token=args.engine_token),
        gateway=target_at("gateway", args.gateway, key=args.key),
        groups=parse_groups(args.pids),
    )


async def measure_loads(
    subject: Subject, loads: tuple[Load, ...], args: argparse.Namespace, machine: Machine, console: Console
) -> list[Cell]:
    """Measure every load on both of the subject's targets. Raises LoadtestError when a request failed."""
    processes = ProcessGroups(subject.groups)
    # From the clock, so that a second benchmark against the same engine repeats no prompt either.
    unique = itertools.count(time.time_ns() // 10**6 % 10**11)
    cells = []
    for load in loads:
        sides = [
            Side(
                target,
                chat_templates(
                    target,
                    model=subject.model,
                    prompts=load.prompts,
                    output_tokens=args.output_tokens,
                    extra={"ignore_eos": True},
                ),
            )
            for target in (subject.direct, subject.gateway)
        ]
        spec = CellSpec(
            name=" ".join(filter(None, (load.name, subject.label))),
            load={
                **load.shown,
                "streams": load.streams,
                "output_tokens": args.output_tokens,
                "engine": subject.label,
            },
            streams=load.streams,
            run_s=args.run_s,
            repeats=args.repeats,
            request_timeout_s=args.timeout_s,
        )
        with console.status(f"{spec.name}: warming up") as status:
            cell = await run_cell(
                spec, *sides, processes=processes, cores=machine.cores, numbers=unique, progress=status.update
            )
        ratio = cell.compared["tok_s_ratio"]
        console.print(f"{spec.name}: {ratio.median:.3f} of direct ({ratio.low:.3f}–{ratio.high:.3f})")
        for remark in (*(f"INVALID: {reason}" for reason in cell.invalid), *cell.notes):
            console.print(f"  {remark}")
        cells.append(cell)
    return cells


def settings(args: argparse.Namespace, subjects: tuple[Subject, ...], machine: Machine) -> dict[str, Any]:
    """What the report says of how it was measured; holds no key."""
    return {
        "repeats": args.repeats,
        "order": "direct gateway, gateway direct, …; one discarded warm-up of each",
        "loop": "closed: every stream has one request in flight; starts spread over one request's time",
        "window": "speeds and latencies while all streams are at work",
        "run_s": args.run_s,
        "output_tokens": args.output_tokens,
        "placement": placement(machine),
        "subjects": [
            {
                "label": subject.label,
                "model": subject.model,
                "direct": f"{subject.direct.host}:{subject.direct.port}",
                "gateway": f"{subject.gateway.host}:{subject.gateway.port}",
                "engine": dict(subject.engine),
            }
            for subject in subjects
        ],
    }


def placement(machine: Machine) -> str:
    """Who shares the processors, in words."""
    return f"client, engine, gateway and proxy share {machine.cores} cores where they run on this machine"


def run(main: Callable[[Console], Awaitable[None]]) -> int:
    """Run a benchmark; its exit code: 0, or 1 with the reason on standard error."""
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    # Asked to end, end as on Ctrl-C: a cluster that --start brought up goes too.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        uvloop.run(main(console))  # type: ignore[arg-type]  # an async def gives a coroutine
    except LoadtestError as problem:
        print(f"benchmark failed: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmark interrupted; nothing written", file=sys.stderr)
        return INTERRUPTED
    return 0
