"""What is left of a real engine's speed behind the gateway: one replica, straight and through it, in turns.

Greedy, a fixed count of output tokens (`ignore_eos`), varied sentences behind a unique number, so that the
prefix cache does not serve one target what the other computed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from rich.console import Console

from loadtest.command import Load, Subject, measure_loads, parser, placement, run, settings, subject_from
from loadtest.measures import Cell
from loadtest.processes import this_machine
from loadtest.report import comparison_tables, summary_of, write_summary
from loadtest.targets import real_cluster

PROMPTS = (
    "Describe how a lighthouse keeper spends a winter day on the coast.",
    "Explain to a child why the moon changes its shape during a month.",
    "Write a short letter to a neighbour about a lost grey cat.",
    "List what a small bakery must buy every week, and say why.",
    "Tell the story of a bridge that was built twice.",
    "Compare travelling by night train with travelling by plane.",
    "Give advice to somebody who plants a garden for the first time.",
    "Summarise how a bill becomes a law in a parliament.",
    "Describe the sounds of a market on a Saturday morning.",
    "Explain what an index does in a database, with an example.",
    "Write the opening of a novel that begins in a railway station.",
    "Say how to repair a bicycle tyre, step by step.",
)

_NAME = "engine"


def loads_of(streams: Sequence[int]) -> tuple[Load, ...]:
    """The cells: the built-in prompts with every count of streams."""
    return tuple(
        Load(name=f"c{count}", streams=count, prompts=PROMPTS, shown={"prompts": len(PROMPTS)}) for count in streams
    )


def summarize(cells: Sequence[Cell]) -> dict[str, float | None]:
    """The flat summary of all cells."""
    summary: dict[str, float | None] = {}
    for cell in cells:
        keys = {
            f"tok_s_ratio_{cell.name}": cell.compared["tok_s_ratio"],
            f"tok_s_direct_{cell.name}": cell.direct["tok_s"],
            f"tok_s_gateway_{cell.name}": cell.gateway["tok_s"],
            f"ttft_direct_p50_ms_{cell.name}": cell.direct["ttft_p50_ms"],
            f"ttft_added_p50_ms_{cell.name}": cell.compared["ttft_added_p50_ms"],
        }
        summary |= summary_of(cell, keys)
    return summary


def _arguments() -> argparse.Namespace:
    return parser(
        "Measure a real engine straight and through the gateway.",
        streams="1,8,16",
        run_s=5.0,
        timeout_s=300.0,
        out=f"build/bench/{_NAME}.json",
    ).parse_args()


def main() -> int:
    """The command line; its exit code."""
    args = _arguments()

    async def benchmark(console: Console) -> None:
        machine = this_machine()
        when = datetime.now(UTC)
        console.print(placement(machine))
        with ExitStack() as started:
            subject: Subject = started.enter_context(real_cluster()) if args.start else subject_from(args, "")
            cells = await measure_loads(subject, loads_of(args.streams), args, machine, console)
        for shown in comparison_tables(f"{_NAME}, {subject.model}", cells):
            console.print(shown)
        write_summary(
            args.out,
            name=_NAME,
            when=when,
            machine=machine,
            settings=settings(args, (subject,), machine),
            cells=[cell.as_json() for cell in cells],
            summary=summarize(cells),
        )
        console.print(f"written: {args.out}")

    return run(benchmark)


if __name__ == "__main__":
    sys.exit(main())
