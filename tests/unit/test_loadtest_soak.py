"""What the soak makes of its readings."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from loadtest.soak import MIB, Reading, Watch, books, config, scenario, trends, watched
from serving.config import GalerneConfig


def readings(process: str, mib_at_start: float, mib_per_hour: float) -> list[Reading]:
    return [
        # What fills in the warm-up, the first ten minutes of an hour, counts for nothing.
        Reading(t_s, process, int((mib_at_start + mib_per_hour * t_s / 3600 - (50 if t_s < 600 else 0)) * MIB), 40, 9)
        for t_s in range(0, 3600, 10)
    ]


def test_the_line_through_the_readings_after_the_warm_up() -> None:
    grows, steady = trends(readings("gateway 1", 100, 12) + readings("gateway 2", 100, 0), 3600)
    assert round(grows.slope_mib_per_hour, 2) == 12.0
    assert round(grows.growth_share, 3) == round(12 / 102, 3)
    assert abs(steady.slope_mib_per_hour) < 0.01
    assert (steady.process, steady.descriptors, steady.threads) == ("gateway 2", (40, 40), (9, 9))


def test_a_process_that_hardly_lived_has_no_line() -> None:
    assert trends(readings("haproxy", 10, 0)[-2:], 3600) == []


def test_books_are_summed_over_gateways() -> None:
    page = (
        "# HELP galerne_requests_accepted_total x\n"
        'galerne_requests_accepted_total{model="a",tenant="t"} 3.0\n'
        'galerne_requests_finished_total{model="a",tenant="t",outcome="completed"} 2.0\n'
        'galerne_requests_finished_total{model="a",tenant="t",outcome="cancelled"} 1.0\n'
        'galerne_requests_in_flight{model="a",tenant="t"} 0.0\n'
    )
    assert books([page, page]) == {"accepted": 6, "finished": 6, "in_flight": 0, "on_replicas": 0}


def test_the_cluster_and_the_load_are_valid() -> None:
    access = {"tenants": [{"id": "bench", "keys": [{"id": "k", "sha256": "0" * 64}]}]}
    assert GalerneConfig.model_validate(config() | access).gateway.bounds.min == 2
    assert scenario(60, "sk-x").total_s == 60


def test_a_process_that_is_gone_before_the_first_reading_ends_no_soak() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    ready = {"pid": os.getpid(), "pids": {"gateway": [os.getpid(), ended.pid], "haproxy": [ended.pid], "engine": []}}
    watch = Watch(*watched(ready))
    watch.read()
    assert [reading.process for reading in watch.readings] == [f"gateway {os.getpid()}"]


def test_a_proxy_that_reloads_is_read_as_the_process_it_is_now(tmp_path: Path) -> None:
    # A program of a name that no other child of this process has: the kernel calls a process by its file's.
    program = tmp_path / "reloaded-proxy"
    program.symlink_to(shutil.which("cat") or "")

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen([program], stdin=subprocess.PIPE)

    first = started()
    watch = Watch({}, {"haproxy": (os.getpid(), program.name)})
    watch.read()
    second = started()
    first.communicate()
    watch.read()
    second.communicate()
    watch.read()
    assert [reading.process for reading in watch.readings] == ["haproxy", "haproxy"]
    assert all(reading.rss_bytes > 0 and reading.descriptors >= 3 for reading in watch.readings)
