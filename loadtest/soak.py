"""Half an hour of steady load on a live cluster: what grows that should not, and what is left when it is over.

What is real: HAProxy, two gateways, Ray Serve. What is simulated: the engines' answers. Two thirds of the requests are
read to their end, the others are left at a random moment, most of them in the middle of a stream, because what leaks
does so where things end early. Memory, file descriptors and threads of every gateway, of HAProxy and of the engines are
read every ten seconds; a line through the readings after the first sixth (caches fill, pools grow to their bound) says
how they go on. At the end the gateways' own books are read: every accepted request has ended, and none is in flight.
"""

from __future__ import annotations

import argparse
import random
import secrets
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from rich.console import Console

from loadtest import progress
from loadtest.command import REPORT_WIDTH
from loadtest.processes import this_machine
from loadtest.records import Outcome
from loadtest.report import table, write_summary
from loadtest.scenario import Scenario
from loadtest.session import SessionSettings, run_scenario
from loadtest.targets import served

NAME = "soak"
MODEL = "chat"
TENANT = "bench"
# The group's name in the ready file, and the program's.
HAPROXY = "haproxy"
SAMPLE_S = 10.0
SETTLE_S = 15.0
# Readings before this share of the run are not part of the line.
WARM_SHARE = 1 / 6
GATEWAYS, REPLICAS = 2, 2
MIB = 2**20
HOUR_S = 3600.0
# So many requests a second are read to their end, and half as many are left.
RATE_RPS = 12.0
LEAVERS_RPS = 6.0
OUTPUT_TOKENS = 60
LONGEST_STAY_S = 1.0
# A process is taken to grow where its line gains more than this share of its memory in the run.
GROWTH_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at one moment."""

    t_s: float
    process: str
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Trend:
    """How a process's memory went on after the warm-up."""

    process: str
    first_mib: float
    last_mib: float
    slope_mib_per_hour: float
    # What the line gains over the whole run, of the memory at its beginning.
    growth_share: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]


def config() -> dict[str, Any]:
    """Two gateways, one model of two replicas."""
    return {
        "gateway": {"cpus": 0.1, "replicas": {"min": GATEWAYS, "max": GATEWAYS}},
        "models": [
            {
                "id": MODEL,
                "source": f"fake:{MODEL}",
                "replicas": {"min": REPLICAS},
                "resources": {"cpus": 0.1},
                "fake": {"decode_ms": 10.0, "prefill_tokens_per_s": 20000},
            }
        ],
    }


def scenario(seconds: float, key: str) -> Scenario:
    """Streams at a constant rate, prompts with shared beginnings."""
    stream = {
        "tenant": TENANT,
        "name": "readers",
        "key": key,
        "model": MODEL,
        "workload": {
            "kind": "synthetic",
            "prefixes": 20,
            "prefix_tokens": 300,
            "tail_tokens": {"kind": "uniform", "low": 20, "high": 200},
            "output_tokens": OUTPUT_TOKENS,
        },
        "arrivals": {"kind": "constant", "rate_rps": RATE_RPS},
    }
    return Scenario.model_validate({"name": NAME, "duration_s": seconds, "streams": [stream]})


class Leavers(threading.Thread):
    """Clients that ask for a stream and go away at a random moment."""

    def __init__(self, url: str, key: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._where = urlsplit(url)
        self._key = key
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self.left = 0

    def run(self) -> None:
        """Leave, until told to stop."""
        open_until: list[tuple[float, socket.socket]] = []
        while not self._ended.wait(1 / LEAVERS_RPS):
            with suppress(OSError):
                open_until.append((time.monotonic() + self._random.uniform(0, LONGEST_STAY_S), self._ask()))
            now_s = time.monotonic()
            for until_s, connection in [entry for entry in open_until if entry[0] <= now_s]:
                open_until.remove((until_s, connection))
                connection.close()
                self.left += 1
        for _, connection in open_until:
            connection.close()
            self.left += 1

    def stop(self) -> None:
        """End, and every connection with it."""
        self._ended.set()
        self.join()

    def _ask(self) -> socket.socket:
        body = (
            f'{{"model":"{MODEL}","stream":true,"max_tokens":{2 * OUTPUT_TOKENS},"ignore_eos":true,"messages":'
            f'[{{"role":"user","content":"leaving {self._random.random()}"}}]}}'
        )
        connection = socket.create_connection((self._where.hostname or "", self._where.port or 80), timeout=5)
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: galerne\r\nauthorization: Bearer {self._key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        return connection


class Watch(threading.Thread):
    """Reads the processes of a cluster again and again.

    Processes come and go: HAProxy's is another one after every reload, and a list of them is old when it is read. So
    `named` has a name to a process id, whose process may be gone at any moment, and `reloading` a name to (ancestor,
    program): whatever runs of that program below that ancestor at a reading is added up.
    """

    def __init__(self, named: Mapping[str, int], reloading: Mapping[str, tuple[int, str]]) -> None:
        super().__init__(daemon=True)
        self._named: dict[str, psutil.Process] = {}
        for name, pid in named.items():
            with suppress(psutil.NoSuchProcess):
                self._named[name] = psutil.Process(pid)
        self._reloading = dict(reloading)
        self._ended = threading.Event()
        self._began_s = time.monotonic()
        self.readings: list[Reading] = []

    def run(self) -> None:
        """Read, until told to stop."""
        while not self._ended.wait(SAMPLE_S):
            self.read()

    def read(self) -> None:
        """One reading of each; nothing of one that has ended."""
        now: dict[str, list[psutil.Process]] = {name: [process] for name, process in self._named.items()}
        now |= {name: _below(ancestor, program) for name, (ancestor, program) in self._reloading.items()}
        for name, processes in now.items():
            figures = [found for process in processes if (found := _figures(process)) is not None]
            if figures:
                rss_bytes, descriptors, threads = (sum(column) for column in zip(*figures, strict=True))
                self.readings.append(Reading(time.monotonic() - self._began_s, name, rss_bytes, descriptors, threads))

    def stop(self) -> None:
        """End, with a last reading."""
        self._ended.set()
        self.join()
        self.read()


def watched(ready: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, tuple[int, str]]]:
    """What `Watch` is to read of the cluster that this ready file tells of."""
    named = {
        f"{group} {pid}" if len(members) > 1 else group: pid
        for group, members in ready["pids"].items()
        if group != HAPROXY
        for pid in members
    }
    return named, {HAPROXY: (ready["pid"], HAPROXY)}


def _below(ancestor: int, program: str) -> list[psutil.Process]:
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(ancestor).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name() == program:
                    found.append(process)
    return found


def _figures(process: psutil.Process) -> tuple[int, int, int] | None:
    """Resident bytes, descriptors and threads; None where it has ended, or ends meanwhile."""
    try:
        with process.oneshot():
            return process.memory_info().rss, process.num_fds(), process.num_threads()
    except psutil.Error:  # a zombie of somebody's answers "access denied"
        return None


def trends(readings: Sequence[Reading], seconds: float) -> list[Trend]:
    """A line of least squares through each process's memory after the warm-up; none for fewer than three readings."""
    found = []
    for process in dict.fromkeys(reading.process for reading in readings):
        mine = [r for r in readings if r.process == process and r.t_s >= WARM_SHARE * seconds]
        if len(mine) < 3:  # noqa: PLR2004  # a line through two points says nothing
            continue
        times_s = np.array([r.t_s for r in mine])
        slope, start = np.polyfit(times_s - times_s[0], np.array([r.rss_bytes for r in mine]) / MIB, 1)
        found.append(
            Trend(
                process,
                mine[0].rss_bytes / MIB,
                mine[-1].rss_bytes / MIB,
                float(slope) * HOUR_S,
                float(slope) * seconds / float(start),
                (mine[0].descriptors, mine[-1].descriptors),
                (mine[0].threads, mine[-1].threads),
            )
        )
    return found


def books(pages: Sequence[str]) -> dict[str, float]:
    """Accepted, finished and in flight, summed over the metrics pages of the gateways."""
    names = {
        "accepted": "galerne_requests_accepted_total{",
        "finished": "galerne_requests_finished_total{",
        "in_flight": "galerne_requests_in_flight{",
        "on_replicas": "galerne_replica_in_flight{",
    }
    lines = [line for page in pages for line in page.splitlines()]
    return {
        name: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(prefix))
        for name, prefix in names.items()
    }


def _page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found: bytes = answer.read()
    return found.decode()


def _arguments() -> argparse.Namespace:
    built = argparse.ArgumentParser(description="Steady load on a live cluster with simulated engines: does it grow?")
    built.add_argument("--minutes", type=float, default=30.0)
    built.add_argument("--out", type=Path, default=Path(f"build/bench/{NAME}.json"))
    return built.parse_args()


def main() -> int:
    """The command line; exit code 1 where a request was lost or failed, or a gateway's memory grew."""
    args = _arguments()
    seconds = args.minutes * 60
    console = Console()
    wide = console if console.is_terminal else Console(width=REPORT_WIDTH)
    key = secrets.token_urlsafe(24)
    wanted = scenario(seconds, key)
    when = datetime.now(UTC)
    with served(config(), key, gateways=GATEWAYS, replicas=REPLICAS) as ready:
        watch = Watch(*watched(ready))
        leavers = Leavers(ready["url"], key, seed=1)
        watch.start()
        leavers.start()
        with progress.shown(console, wanted.name, wanted.total_s) as on_progress:
            ran = run_scenario(wanted, SessionSettings(url=ready["url"], simulated=True), on_progress)
        leavers.stop()
        time.sleep(SETTLE_S)
        watch.stop()
        held = books([_page(gateway["metrics_port"]) for gateway in ready["gateways"]])
    found = trends(watch.readings, seconds)
    outcomes = {outcome.value: sum(r.outcome is outcome for r in ran.records) for outcome in Outcome}
    wide.print(
        table(
            f"{NAME}: {args.minutes:g} minutes, simulated engines",
            ["process", "MiB first", "last", "slope MiB/h", "growth", "descriptors", "threads"],
            [
                [
                    t.process,
                    f"{t.first_mib:.1f}",
                    f"{t.last_mib:.1f}",
                    f"{t.slope_mib_per_hour:+.2f}",
                    f"{t.growth_share:+.1%}",
                    f"{t.descriptors[0]} → {t.descriptors[1]}",
                    f"{t.threads[0]} → {t.threads[1]}",
                ]
                for t in found
            ],
        )
    )
    summary: dict[str, float | None] = {**outcomes, "left_early": leavers.left, **held}
    summary |= {f"slope_mib_per_hour {t.process}": round(t.slope_mib_per_hour, 3) for t in found}
    wide.print(", ".join(f"{name} {value:g}" for name, value in summary.items() if value is not None))
    cells = [
        {"t_s": round(r.t_s, 1), "process": r.process, "rss_mib": round(r.rss_bytes / MIB, 2), "fds": r.descriptors}
        for r in watch.readings
    ]
    write_summary(
        args.out,
        name=NAME,
        when=when,
        machine=this_machine(),
        settings={"simulated": True, "minutes": args.minutes, "rate_rps": RATE_RPS, "leavers_rps": LEAVERS_RPS},
        cells=cells,
        summary=summary,
    )
    lost = held["accepted"] != held["finished"] or held["in_flight"] or held["on_replicas"]
    grown = [t.process for t in found if t.process.startswith("gateway") and t.growth_share > GROWTH_SHARE]
    for name in grown:
        wide.print(f"{name} grows")
    return 1 if lost or grown or outcomes[Outcome.FAILED.value] else 0


if __name__ == "__main__":
    sys.exit(main())
