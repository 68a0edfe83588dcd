"""What routing by prefix saves on real engines: two replicas of the small model, conversations, each policy in turn.

Every conversation has long instructions of its own and grows by a turn at a time; together they are more than one
replica's KV cache holds and less than two. The figures are ratios between policies on one machine in one run: prompt
tokens that vLLM found in its caches (`vllm:prefix_cache_hits` over `queries`) and time to first token. `--fake` puts
the fake engine behind the same load: its hits are a simulation's, and its times say nothing of a model's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from loadtest.errors import LoadtestError
from loadtest.processes import this_machine
from loadtest.report import table, write_summary
from loadtest.targets import REAL_MODEL, served
from loadtest.workloads.text import filler

NAME = "prefix"
REPLICAS = 2
POLICIES = ("cost", "round-robin")
# KV cache of one real replica, GiB: 22.5 KiB a token (30 layers, 3 KV heads of 64, bfloat16, keys and values).
KV_GIB = 0.25
FAKE = {"kv_blocks": 730, "prefill_tokens_per_s": 2000, "decode_ms": 20.0}
SYSTEM_TOKENS = 800
TURN_TOKENS = 40
OUTPUT_TOKENS = 8
TIMEOUT_S = 300.0
_OK = 200


@dataclass
class Measured:
    """One policy's run."""

    ttfts_s: list[float] = field(default_factory=list)
    hits: float = 0.0
    queries: float = 0.0

    @property
    def hit(self) -> float:
        """Share of prompt tokens that engines found."""
        return self.hits / self.queries if self.queries else 0.0


def config(policy: str, *, fake: bool) -> dict[str, Any]:
    """The cluster: two replicas of one model."""
    model: dict[str, Any] = dict(REAL_MODEL)
    model["resources"] = {"accelerator": "cpu", "cpus": 1, "cpu_kv_cache_gib": KV_GIB}
    if fake:
        model = {"id": REAL_MODEL["id"], "source": "fake:prefix", "resources": {"cpus": 0.1}, "fake": FAKE}
    model |= {"replicas": {"min": REPLICAS}, "routing": {"policy": policy}}
    return {"gateway": {"cpus": 0.1}, "models": [model]}


def talk(url: str, key: str, conversations: int, turns: int, streams: int) -> list[float]:
    """Seconds to the first byte of every answer after the first turn; turns of all conversations in a fixed order."""
    told = [[_message("system", filler(SYSTEM_TOKENS, seed=f"system {i}"))] for i in range(conversations)]
    order, ttfts_s = random.Random(1), []
    for turn in range(turns):
        left = order.sample(range(conversations), conversations)
        took_s: list[float] = []
        failed: list[BaseException] = []
        lock = threading.Lock()

        def work(left: list[int], turn: int, took_s: list[float], failed: list[BaseException]) -> None:
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
            try:
                while not failed:
                    with lock:  # noqa: B023  # one lock a turn, and its threads end with it
                        if not left:
                            return
                        i = left.pop()
                    told[i].append(_message("user", filler(TURN_TOKENS, seed=f"user {i} {turn}")))
                    seconds = _ask(connection, key, told[i])
                    told[i].append(_message("assistant", filler(OUTPUT_TOKENS, seed=f"answer {i} {turn}")))
                    took_s.append(seconds)
            except (OSError, http.client.HTTPException, LoadtestError) as problem:
                failed.append(problem)
            finally:
                connection.close()

        threads = [threading.Thread(target=work, args=(left, turn, took_s, failed)) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise LoadtestError(f"a request failed: {failed[0]}") from failed[0]
        if turn:
            ttfts_s += took_s
    return ttfts_s


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _ask(connection: http.client.HTTPConnection, key: str, messages: Sequence[Mapping[str, str]]) -> float:
    body = {
        "model": REAL_MODEL["id"],
        "messages": messages,
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    begin_s = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    answer.read(1)
    first_s = time.monotonic() - begin_s
    rest = answer.read()
    if answer.status != _OK:
        raise LoadtestError(f"HTTP {answer.status}: {rest[:200]!r}")
    return first_s


def counted(ready: Mapping[str, Any]) -> tuple[float, float]:
    """Tokens found and looked up, of all engines."""
    sums = {"hits": 0.0, "queries": 0.0}
    for replica in ready["engines"][REAL_MODEL["id"]]:
        connection = http.client.HTTPConnection(replica["host"], replica["port"], timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        for name in sums:
            sums[name] += sum(map(float, re.findall(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", text, re.M)))
    return sums["hits"], sums["queries"]


def measure(policy: str, args: argparse.Namespace) -> Measured:
    """One policy on a fresh cluster."""
    key = secrets.token_urlsafe(24)
    with served(config(policy, fake=args.fake), key, replicas=REPLICAS) as ready:
        found = Measured(talk(ready["url"], key, args.conversations, args.turns, args.streams))
        found.hits, found.queries = counted(ready)
    return found


def summary(measured: Mapping[str, Measured]) -> dict[str, float | None]:
    """Flat figures, and cost against turns as ratios."""
    found: dict[str, float | None] = {}
    for policy, run in measured.items():
        name = policy.replace("-", "_")
        found[f"token_hit_{name}"] = round(run.hit, 4)
        found[f"ttft_p50_s_{name}"] = round(statistics.median(run.ttfts_s), 4)
        found[f"ttft_mean_s_{name}"] = round(statistics.fmean(run.ttfts_s), 4)
    cost, turns = measured["cost"], measured["round-robin"]
    found["hits_ratio"] = round(cost.hit / turns.hit, 3) if turns.hit else None
    found["ttft_p50_ratio"] = round(statistics.median(cost.ttfts_s) / statistics.median(turns.ttfts_s), 3)
    found["ttft_mean_ratio"] = round(statistics.fmean(cost.ttfts_s) / statistics.fmean(turns.ttfts_s), 3)
    return found


def _arguments() -> argparse.Namespace:
    built = argparse.ArgumentParser(description="Routing by prefix on two replicas, against round robin.")
    built.add_argument("--fake", action="store_true", help="simulated engines")
    built.add_argument("--conversations", type=int, default=16)
    built.add_argument("--turns", type=int, default=5)
    built.add_argument("--streams", type=int, default=2, help="requests at once")
    built.add_argument("--out", type=Path, default=Path(f"build/bench/{NAME}.json"))
    return built.parse_args()


def main() -> int:
    """The command line; its exit code."""
    args, console, when = _arguments(), Console(), datetime.now(UTC)
    measured = {policy: measure(policy, args) for policy in POLICIES}
    found = summary(measured)
    kind = "simulated engines" if args.fake else "vLLM on processors"
    console.print(table(f"{NAME}: {kind}", ["figure", "value"], [[n, f"{v}"] for n, v in found.items()]))
    write_summary(
        args.out,
        name=NAME,
        when=when,
        machine=this_machine(),
        settings={
            "simulated": args.fake,
            "conversations": args.conversations,
            "turns": args.turns,
            "streams": args.streams,
            "cluster": config("cost", fake=args.fake),
        },
        cells=[{"policy": p, "hits": m.hits, "queries": m.queries, "ttfts_s": m.ttfts_s} for p, m in measured.items()],
        summary=found,
    )
    console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
