"""What a choice costs, and what the index weighs, from 10 to 1,000 replicas and with 10,000 tenants.

    python -m serving.simulation.routing.bench        (make bench-routing)

Prints medians and tails of one choice (match, candidates, policy), of keeping the books for it, and of reading and
hashing a prompt; the growth from the smallest cluster to the largest; and the index's bytes, as allocated. Every
tenant has one long prefix of its own behind which its requests differ; nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any, Final

import numpy as np

from serving.config import RoutingConfig
from serving.routing.choice import Wanted
from serving.routing.fingerprint import ENDS, fingerprint, prompt_bytes
from serving.routing.policies import Speeds
from serving.routing.prefix_index import Prefix
from serving.routing.router import Router

REPLICAS: Final = (10, 100, 1000)
TENANTS: Final = 10_000
CHOICES: Final = 10_000
# 4 KiB of instructions that a tenant's requests share, 16 blocks, and 28 KiB that they do not, 28 blocks.
SHARED_BLOCKS: Final = 16
OWN_BLOCKS: Final = 28
IN_FLIGHT_PER_REPLICA: Final = 8
PROMPT_KIB: Final = (1, 4, 16, 64, 256)


def main() -> None:
    """Measure and print; `--json FILE` writes the figures too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", dest="out", help="write the figures here")
    out = parser.parse_args().out
    rows = [measure(replicas) for replicas in REPLICAS]
    for row in rows:
        _say(
            "{replicas:>5} replicas: choice p50 {choice_p50_us:.1f} µs, p99 {choice_p99_us:.1f} µs (of processor time "
            "{choice_cpu_p99_us:.1f} µs); books p50 {books_p50_us:.1f} µs; index {index_blocks:,} blocks, "
            "{index_bytes:,} bytes, {bytes_per_block:.0f} a block".format(**row)
        )
    first, last = rows[0], rows[-1]
    growth = {
        "choice_p50": last["choice_p50_us"] / first["choice_p50_us"],
        "choice_p99": last["choice_p99_us"] / first["choice_p99_us"],
        "choice_cpu_p99": last["choice_cpu_p99_us"] / first["choice_cpu_p99_us"],
        "index_bytes": last["index_bytes"] / first["index_bytes"],
    }
    _say(
        f"growth from {first['replicas']} to {last['replicas']} replicas: "
        + ", ".join(f"{name} x{ratio:.2f}" for name, ratio in growth.items())
    )
    prompts = [measure_prompt(kib) for kib in PROMPT_KIB]
    for row in prompts:
        _say(
            f"a prompt of {row['kib']:>3} KiB: {row['us']:.0f} µs to read and hash, "
            f"{row['us'] / row['kib']:.2f} µs a KiB, {row['blocks']} blocks"
        )
    if out:
        with open(out, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"tenants": TENANTS, "rows": rows, "growth": growth, "prompts": prompts}, file, indent=1)


def measure(replicas: int) -> dict[str, Any]:
    """One cluster, filled to its index's bound or with all tenants, whichever comes first."""
    gc.collect()
    tracemalloc.start()
    rng = Random(replicas)  # noqa: S311 - a benchmark
    router = Router(RoutingConfig(), speeds=Speeds(), clock=time.perf_counter, rng=rng)
    before = tracemalloc.get_traced_memory()[0]
    for i in range(replicas):
        router.join(f"replica-{i}")
    request = _requests(rng)
    # So many that every replica's mirror is full, or all tenants have been there several times.
    for _ in range(max(2 * TENANTS, 20 * replicas)):
        wanted = Wanted(request())
        choice = router.choose(wanted)
        if choice is not None:
            turn = router.begin(choice, wanted)
            turn.answered()
            turn.end()
    gc.collect()
    index_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    open_turns = []
    for _ in range(IN_FLIGHT_PER_REPLICA * replicas):
        wanted = Wanted(request())
        choice = router.choose(wanted)
        if choice is not None:
            open_turns.append(router.begin(choice, wanted))
    chosen, chosen_cpu, kept = np.empty(CHOICES), np.empty(CHOICES), np.empty(CHOICES)
    gc.disable()
    clock = time.perf_counter
    for i in range(CHOICES):
        wanted = Wanted(request())
        start_s, start_cpu_s = clock(), time.thread_time()
        choice = router.choose(wanted)
        # Other work on the machine is in the one and not in the other.
        chosen_cpu[i], chosen[i] = time.thread_time() - start_cpu_s, clock() - start_s
        if choice is None:
            continue
        start_s = clock()
        turn = router.begin(choice, wanted)
        oldest = open_turns[i % len(open_turns)]
        open_turns[i % len(open_turns)] = turn
        oldest.answered()
        oldest.end()
        kept[i] = clock() - start_s
    gc.enable()
    blocks = router.index.blocks
    return {
        "replicas": replicas,
        "choice_p50_us": float(np.quantile(chosen, 0.5)) * 1e6,
        "choice_p99_us": float(np.quantile(chosen, 0.99)) * 1e6,
        "choice_cpu_p99_us": float(np.quantile(chosen_cpu, 0.99)) * 1e6,
        "books_p50_us": float(np.quantile(kept, 0.5)) * 1e6,
        "books_p99_us": float(np.quantile(kept, 0.99)) * 1e6,
        "index_blocks": blocks,
        "index_bytes": index_bytes,
        "bytes_per_block": index_bytes / max(1, blocks),
    }


def _requests(rng: Random) -> Callable[[], Prefix]:
    counter = [0]

    def request() -> Prefix:
        tenant = rng.randrange(TENANTS)
        counter[0] += 1
        # Numbers as large as hashes are.
        shared = tuple(hash(("t", tenant, i)) for i in range(SHARED_BLOCKS))
        own = tuple(hash(("o", counter[0], i)) for i in range(OWN_BLOCKS))
        return Prefix(shared + own, ENDS, ENDS[SHARED_BLOCKS + OWN_BLOCKS - 1])

    return request


def measure_prompt(kib: int) -> dict[str, Any]:
    """Reading and hashing a conversation of so many KiB."""
    rng = Random(kib)  # noqa: S311 - a benchmark
    text = " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(kib * 160))[: kib * 1024]
    messages = [{"role": "user", "content": text[i : i + 1500]} for i in range(0, len(text), 1500)]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    seconds = []
    for _ in range(max(20, 4000 // kib)):
        start_s = time.perf_counter()
        found = fingerprint(prompt_bytes(body), "tenant", "m", key=b"benchmark")
        seconds.append(time.perf_counter() - start_s)
    return {"kib": kib, "us": float(np.median(seconds)) * 1e6, "blocks": len(found.hashes)}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
