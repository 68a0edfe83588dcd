"""What the gateway costs: the fake engine straight and through the gateway, under the same load in turns.

The fake engine is a simulation, so these figures say nothing of any model's speed; they say what the way
through proxy and gateway adds. Two pacings, each named in the report:

- `paced`: the engine's latency model sets the pace, as a GPU does; the headline.
- `saturated`: the engine answers as fast as it can, so the processors are the limit; what is left of
  throughput is the share of CPU work that the engine's own answer is. Summary keys end in `_saturated`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from rich.console import Console

from loadtest.command import (
    Load,
    Subject,
    measure_loads,
    numbers,
    parser,
    placement,
    run,
    settings,
    subject_from,
)
from loadtest.measures import Cell
from loadtest.processes import this_machine
from loadtest.report import comparison_tables, summary_of, write_summary
from loadtest.request import filler
from loadtest.targets import fake_cluster

PACED = "paced"
SATURATED = "saturated"

# Room in the fake KV cache for 128 prompts of 64 KB at once, so that none waits for memory.
_KV_BLOCKS = 2**18
# Decoding as on one mid-size GPU; prefill quick, so that what the gateway adds to the first token of a long
# prompt is not lost in the spread of seconds of waiting.
PACED_ENGINE = {
    "prefill_tokens_per_s": 1e7,
    # A prompt of 64 KB in one pass: in eight, 128 of them would wait for one another's for seconds.
    "prefill_chunk_tokens": 2**16,
    "decode_ms": 8.0,
    "decode_ms_per_sequence": 0.02,
    "kv_blocks": _KV_BLOCKS,
}
# Every token is ready at once.
SATURATED_ENGINE = {
    "prefill_tokens_per_s": 1e9,
    "prefill_chunk_tokens": 2**16,
    "decode_ms": 0.0,
    "decode_ms_per_sequence": 0.0,
    "kv_blocks": _KV_BLOCKS,
}

_NAME = "overhead"
_HEADLINE_PROMPT_KIB = 1


def loads_of(streams: Sequence[int], prompt_kib: Sequence[int]) -> tuple[Load, ...]:
    """The cells: every prompt size with every count of streams, small prompts first."""
    return tuple(
        Load(
            name=f"c{count}" if kib == _HEADLINE_PROMPT_KIB else f"c{count}_{kib}k",
            streams=count,
            prompts=(filler(kib * 1024),),
            shown={"prompt_kib": kib},
        )
        for kib in prompt_kib
        for count in streams
    )


def summarize(cells: Sequence[Cell]) -> dict[str, float | None]:
    """The flat summary of all cells of both pacings."""
    summary: dict[str, float | None] = {}
    for cell in cells:
        load, _, pacing = cell.name.partition(" ")
        suffix = "_saturated" if pacing == SATURATED else ""
        compared, gateway = cell.compared, cell.gateway
        keys = {
            f"tok_s_ratio_{load}{suffix}": compared["tok_s_ratio"],
            f"ttft_added_p50_ms_{load}{suffix}": compared["ttft_added_p50_ms"],
            f"ttft_added_p99_ms_{load}{suffix}": compared["ttft_added_p99_ms"],
        }
        if "gateway_cpu_ms_per_request" in gateway:
            keys[f"gateway_cpu_ms_per_request_{load}{suffix}"] = gateway["gateway_cpu_ms_per_request"]
            # The most it held so far, over all cells: memory is measured at its worst.
            held = summary.get("gateway_rss_mib") or 0.0
            summary["gateway_rss_mib"] = round(max(held, gateway["gateway_rss_mib"].high), 1)
        summary |= summary_of(cell, keys)
    return summary


def _arguments() -> argparse.Namespace:
    built = parser(
        "Measure what the gateway adds to a fake engine's answers.",
        streams="1,32,128",
        run_s=3.0,
        timeout_s=120.0,
        out=f"build/bench/{_NAME}.json",
    )
    built.add_argument("--prompt-kib", type=numbers, default=numbers("1,64"), help="default 1,64")
    built.add_argument(
        "--pacing",
        choices=(PACED, SATURATED),
        default=PACED,
        help="what the engine at --direct does (not for --start)",
    )
    return built.parse_args()


def main() -> int:
    """The command line; its exit code."""
    args = _arguments()

    async def benchmark(console: Console) -> None:
        machine = this_machine()
        when = datetime.now(UTC)
        loads = loads_of(args.streams, args.prompt_kib)
        console.print(placement(machine))
        with ExitStack() as started:
            subjects = tuple(_subjects(args, started))
            cells = [
                cell for subject in subjects for cell in await measure_loads(subject, loads, args, machine, console)
            ]
        for subject in subjects:
            own = [cell for cell in cells if cell.load["engine"] == subject.label]
            for shown in comparison_tables(f"{_NAME}, {subject.label} fake engine", own):
                console.print(shown)
        write_summary(
            args.out,
            name=_NAME,
            when=when,
            machine=machine,
            settings=settings(args, subjects, machine),
            cells=[cell.as_json() for cell in cells],
            summary=summarize(cells),
        )
        console.print(f"written: {args.out}")

    return run(benchmark)


def _subjects(args: argparse.Namespace, started: ExitStack) -> Iterator[Subject]:
    if not args.start:
        yield subject_from(args, args.pacing)
        return
    yield from started.enter_context(fake_cluster({PACED: PACED_ENGINE, SATURATED: SATURATED_ENGINE}))


if __name__ == "__main__":
    sys.exit(main())
