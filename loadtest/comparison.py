"""Every way to one engine, measured in turns: straight to it, through Galerne, through each peer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtest.command import Load, Subject
from loadtest.errors import LoadtestError
from loadtest.interleave import CellSpec, Side, Way, run_ways
from loadtest.measures import Cell, Pair, compare
from loadtest.peers.install import installed
from loadtest.peers.peer import Engine, Launch, Peer
from loadtest.peers.running import started
from loadtest.processes import ProcessGroups
from loadtest.request import ENGINE_TOKEN_HEADER, Target, chat_templates
from loadtest.stats import Spread

DIRECT = "direct"
GALERNE = "galerne"
# What of Galerne is neither gateway nor proxy works for no single request.
_OURS = ("gateway", "haproxy")


@dataclass(frozen=True, slots=True)
class Runner:
    """A way that is up."""

    target: Target
    # Process groups that this way adds to the engine: their cost is its cost.
    groups: Mapping[str, tuple[str, ...]]
    # How it was started, for the report.
    shown: Mapping[str, Any]
    # What a reader of its figures must know.
    caveat: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One way under one load, against direct."""

    way: str
    load: str
    # None: see `problem`.
    cell: Cell | None
    # Of all the way's processes; None for direct.
    cpu_ms_per_request: Spread | None
    rss_mib: Spread | None
    problem: str | None = None
    caveat: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a comparison is run."""

    loads: tuple[Load, ...]
    output_tokens: int
    run_s: float
    repeats: int
    timeout_s: float


def bring_up(
    subject: Subject, peers: Sequence[Peer], cache: Path, held: ExitStack, say: Callable[[str], None]
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Start every peer in front of the subject's engine; those that are up, and why the others are not."""
    direct = subject.direct
    engine = Engine(
        direct.host, direct.port, subject.model, ENGINE_TOKEN_HEADER, direct.engine_token or "", subject.recipe
    )
    groups = {name: members for name, members in subject.groups.items() if name in _OURS}
    up = {
        DIRECT: Runner(direct, {}, {}),
        GALERNE: Runner(_named(subject.gateway, GALERNE), groups, {"argv": "galerne serve", "files": {}}),
    }
    down: dict[str, str] = {}
    for peer in peers:
        try:
            say(f"{peer.name} {peer.version}: installing, if it is not, and starting")
            target, pid, launch = held.enter_context(started(peer, installed(peer, cache), engine))
        except LoadtestError as problem:
            down[peer.name] = str(problem)
        else:
            hosting = launch.hosting
            apart = f"/!{hosting.engine_process}" if hosting is not None and hosting.engine_process else ""
            up[peer.name] = Runner(
                target,
                {peer.name: (f"{pid}{apart}",)},
                _shown(peer, launch, engine),
                hosting.caveat if hosting is not None else "",
            )
    return up, down


async def measure_all(
    subject: Subject,
    up: Mapping[str, Runner],
    plan: Plan,
    *,
    cores: int,
    say: Callable[[str], None],
    progress: Callable[[str], None],
) -> list[Row]:
    """All loads on all ways; a row for each, load by load. Raises LoadtestError when the engine itself fails.

    `say` is told of each load, `progress` of each run.
    """
    numbers = itertools.count(time.time_ns() // 10**6 % 10**11)
    rows = []
    engine = {name: members for name, members in subject.groups.items() if name not in _OURS}
    for done, load in enumerate(plan.loads):
        say(f"{load.name}: load {done + 1} of {len(plan.loads)}, {len(up)} ways, {plan.repeats} runs of each")
        ways = [
            Way(
                Side(
                    runner.target,
                    chat_templates(
                        runner.target,
                        model=subject.model,
                        prompts=load.prompts,
                        output_tokens=plan.output_tokens,
                        extra={"ignore_eos": True},
                    ),
                ),
                ProcessGroups({**engine, **runner.groups}),
            )
            for runner in up.values()
        ]
        spec = CellSpec(
            name=load.name,
            load={**load.shown, "streams": load.streams, "output_tokens": plan.output_tokens},
            streams=load.streams,
            run_s=plan.run_s,
            repeats=plan.repeats,
            request_timeout_s=plan.timeout_s,
        )
        found = await run_ways(spec, ways, numbers=numbers, progress=progress)
        direct = found[DIRECT]
        if isinstance(direct, LoadtestError):
            raise direct
        for name, runner in up.items():
            runs = found[name]
            if isinstance(runs, LoadtestError):
                rows.append(Row(name, load.name, None, None, None, str(runs), runner.caveat))
                continue
            pairs = [Pair(first, second) for first, second in zip(direct, runs, strict=True)]
            rows.append(_row(name, load.name, compare(load.name, spec.load, pairs, cores=cores), runner))
    return rows


def _row(name: str, load: str, cell: Cell, runner: Runner) -> Row:
    def added(suffix: str) -> Spread | None:
        parts = [cell.gateway[f"{group}_{suffix}"] for group in runner.groups]
        # Medians of groups add up well enough: each group's spread is small beside its own size.
        if not parts:
            return None
        return replace(
            parts[0],
            median=sum(part.median for part in parts),
            low=sum(part.low for part in parts),
            high=sum(part.high for part in parts),
        )

    return Row(name, load, cell, added("cpu_ms_per_request"), added("rss_mib"), caveat=runner.caveat)


def _named(target: Target, name: str) -> Target:
    return Target(name, target.host, target.port, key=target.key, engine_token=target.engine_token)


def _shown(peer: Peer, launch: Launch, engine: Engine) -> dict[str, Any]:
    secret = {engine.token, launch.key}
    files = dict(launch.files)
    for value in filter(None, secret):
        files = {file: text.replace(value, "***") for file, text in files.items()}
    env = {key: "***" if value in secret else value for key, value in launch.env.items()}
    return {
        "version": peer.version,
        "language": peer.language,
        "documented": peer.source,
        "argv": " ".join("***" if part in secret else part for part in launch.argv),
        "env": env,
        "hosts_its_engine": launch.hosting is not None,
        "files": files,
    }
