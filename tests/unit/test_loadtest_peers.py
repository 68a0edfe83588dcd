"""Peers: what they are started with, how they are ended, and that one that fails is told of, not left out."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loadtest.cli.compare import summary, tables
from loadtest.command import Subject
from loadtest.comparison import DIRECT, GALERNE, Plan, Row, bring_up, measure_all
from loadtest.errors import LoadtestError
from loadtest.overhead import loads_of
from loadtest.peers.catalogue import PEERS
from loadtest.peers.install import environment, installed, steps
from loadtest.peers.peer import PORTS, Engine, Environment, Launch, Peer, Recipe
from loadtest.peers.programs import ray_serve_llm as program
from loadtest.peers.running import started
from loadtest.processes import ProcessGroups
from loadtest.request import ENGINE_TOKEN_HEADER, Target
from tests.unit.test_loadtest_session import serving

TOKEN = "engine-secret"
ENGINE = Engine("127.0.0.1", 4321, "m", ENGINE_TOKEN_HEADER, TOKEN)
RECIPE = Recipe(Path("/weights"), {"dtype": "float32", "enforce_eager": True}, {"OMP_NUM_THREADS": "2"})
REAL = replace(ENGINE, recipe=RECIPE)
RAY = [peer for peer in PEERS.values() if peer.name.startswith("ray-serve-llm")]


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_a_peer_is_pinned_listens_on_loopback_and_leads_to_the_engine(peer: Peer) -> None:
    assert peer.version
    assert peer.source
    launch = peer.launch(ENGINE, 5000)
    files = {name: json.loads(text) for name, text in launch.files.items() if not name.endswith(".py")}
    everything = " ".join(launch.argv) + json.dumps([files, dict(launch.env)])
    assert "4321" in everything
    assert "5000" in everything
    assert "0.0.0.0" not in everything  # noqa: S104
    # On a command line everybody on the machine could read it.
    assert TOKEN not in " ".join(launch.argv)
    assert launch.passes_token or TOKEN in json.dumps(files)


def test_litellms_key_is_new_each_time_and_only_in_its_environment() -> None:
    first, second = (PEERS["litellm"].launch(ENGINE, 5000) for _ in range(2))
    assert first.key != second.key
    assert first.key == first.env["LITELLM_MASTER_KEY"]
    assert first.key not in first.files["config.yaml"]


@pytest.mark.parametrize("peer", RAY, ids=lambda peer: peer.name)
def test_ray_serve_llm_runs_the_same_weights_and_settings_where_the_engine_is_real(peer: Peer) -> None:
    launch = peer.launch(REAL, 5000)
    llm = json.loads(launch.files["app.json"])["llm_config"]
    assert llm["model_loading_config"] == {"model_id": "m", "model_source": "/weights"}
    assert llm["engine_kwargs"] == RECIPE.arguments
    assert llm["runtime_env"]["env_vars"] == RECIPE.env
    assert "4321" not in json.dumps([llm, dict(launch.env)])
    assert launch.hosting is not None
    assert launch.hosting.engine_process == "VLLM::EngineCore"


@pytest.mark.parametrize("peer", RAY, ids=lambda peer: peer.name)
def test_ray_serve_llm_asks_the_simulated_engine_and_says_so(peer: Peer) -> None:
    launch = peer.launch(ENGINE, 5000)
    module, _, name = launch.env["RAYLLM_VLLM_ENGINE_CLS"].rpartition(".")
    assert f"{module}.py" in launch.files
    assert hasattr(program, name)
    assert launch.env[program.ENV_ENGINE] == "http://127.0.0.1:4321"
    assert launch.hosting is not None
    assert launch.hosting.engine_process is None
    assert "over HTTP" in launch.hosting.caveat


def test_only_the_tuned_ray_serve_llm_has_haproxy_and_direct_streaming() -> None:
    default, tuned = (PEERS[name].launch(REAL, 5000).env for name in ("ray-serve-llm", "ray-serve-llm-tuned"))
    assert dict(tuned.items() - default.items()) == {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    }
    assert default.items() <= tuned.items()


def test_ray_serve_llm_keeps_to_its_own_ports() -> None:
    ports = json.loads(RAY[0].launch(REAL, 5000).files["app.json"])["ports"]
    assert ports["http"] == 5000
    assert len(set(ports.values())) == len(ports)
    assert all(5000 <= port < 5000 + PORTS for port in ports.values())


def test_both_ray_serve_llm_share_what_is_installed(tmp_path: Path) -> None:
    first, second = RAY
    assert first.environment.home(tmp_path) == second.environment.home(tmp_path)
    wanted = Path(__file__).parents[2] / "locks" / "overrides.txt"
    kept = {line for line in wanted.read_text().splitlines() if line and not line.startswith("#")}
    assert set(first.environment.overrides) == kept


def test_haproxy_of_ray_is_narrowed_to_loopback() -> None:
    rendered = (
        "frontend prometheus\n    bind :9101\nfrontend http\n    bind 127.0.0.1:80\nlisten stats\n  bind *:8404\n"
    )
    narrowed = program.narrowed(rendered)
    assert [line.strip() for line in narrowed.splitlines() if "bind" in line] == [
        "bind 127.0.0.1:9101",
        "bind 127.0.0.1:80",
        "bind 127.0.0.1:8404",
    ]


def test_uv_is_told_where_pip_finds_wheels() -> None:
    assert environment({"PIP_FIND_LINKS": "/one /two"})["UV_FIND_LINKS"] == "/one,/two"
    assert environment({"PIP_FIND_LINKS": "/one", "UV_FIND_LINKS": "/mine"})["UV_FIND_LINKS"] == "/mine"
    assert "UV_FIND_LINKS" not in environment({})


def test_a_build_for_processors_comes_from_its_own_page_where_no_directory_was_named() -> None:
    wanted = ("ray==2.60.0", "torch==2.13.0+cpu")
    assert steps(wanted, {"PIP_FIND_LINKS": "/wheels"}) == [(wanted, {})]
    assert steps(wanted[:1], {}) == [(wanted[:1], {})]
    assert steps(wanted, {}) == [(["torch==2.13.0+cpu"], {"UV_TORCH_BACKEND": "cpu"}), (wanted, {})]


PROGRAM = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, file=open("child", "w"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


P = Environment("p", ("p==1",))


def peer_of(argv: tuple[str, ...], **files: str) -> Peer:
    return Peer("p", "Python", P, "here", lambda _engine, port: Launch((*argv, str(port)), files=files))


def programs(folder: Path) -> Path:
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    return folder


def test_a_peer_goes_with_all_its_processes_and_its_files(tmp_path: Path) -> None:
    peer = peer_of(("python", "main"), main=PROGRAM)
    os.environ["SECRET_OF_OURS"] = "x"
    try:
        with started(peer, programs(tmp_path / "bin"), ENGINE) as (target, pid, _):
            process = psutil.Process(pid)
            folder = Path(process.cwd())
            (child,) = process.children()
            assert target.engine_token == TOKEN
            assert "SECRET_OF_OURS" not in process.environ()
            assert folder.stat().st_mode & 0o077 == 0
    finally:
        del os.environ["SECRET_OF_OURS"]
    assert not psutil.pid_exists(pid)
    # A child that nobody waits for may still be a zombie of whoever adopted it.
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not folder.exists()


def test_a_peer_that_ends_at_once_is_told_of_with_its_last_words(tmp_path: Path) -> None:
    peer = peer_of(("python", "main"), main="import sys; sys.exit('no such option')")
    with pytest.raises(LoadtestError, match=r"p ended with code 1:\nno such option"):
        with started(peer, programs(tmp_path / "bin"), ENGINE):
            pass


def test_what_cannot_be_installed_is_told_of_and_tried_again(tmp_path: Path) -> None:
    missing = Environment("p", ("galerne-no-such-package==1",))
    peer = Peer("p", "Python", missing, "here", lambda _engine, _port: Launch(("x",)))
    for _ in range(2):
        with pytest.raises(LoadtestError, match="p 1 cannot be installed"):
            installed(peer, tmp_path)


def test_ways_are_measured_in_turns_and_a_broken_one_has_its_row(tmp_path: Path) -> None:
    """The broken one cannot be installed; another way fails while it is measured; the rest have figures."""
    with serving() as (url, _bodies), ExitStack() as held:
        port = int(url.rpartition(":")[2])
        subject = Subject(
            "", "m", Target("direct", "127.0.0.1", port), Target("gateway", "127.0.0.1", port, key="sk-one"), {}
        )
        missing = Environment("broken", ("galerne-no-such-package==1",))
        broken = Peer("broken", "Python", missing, "here", lambda _engine, _port: Launch(("x",)))
        up, down = bring_up(subject, [broken], tmp_path, held, lambda _text: None)
        assert list(up) == [DIRECT, GALERNE]
        assert "broken 1 cannot be installed" in down["broken"]
        up[GALERNE] = replace(up[GALERNE], caveat="one of its own")
        closed = type(up[GALERNE])(Target("closed", "127.0.0.1", 1), {}, {})
        seen: list[str] = []
        said: list[str] = []
        plan = Plan(loads_of([2], [1]), output_tokens=3, run_s=0.05, repeats=3, timeout_s=5.0)
        rows = asyncio.run(
            measure_all(subject, {**up, "closed": closed}, plan, cores=2, say=said.append, progress=seen.append)
        )
    assert [row.way for row in rows] == [DIRECT, GALERNE, "closed"]
    assert rows[0].cell is not None
    assert rows[1].cell is not None
    assert rows[1].cell.compared["tok_s_ratio"].count == 3
    assert rows[2].problem is not None
    assert "no connection" in rows[2].problem
    assert said == ["c2: load 1 of 1, 3 ways, 3 runs of each"]
    order = [text.rpartition(" ")[2] for text in seen]
    assert order == [DIRECT, GALERNE, "closed", GALERNE, "closed", DIRECT, "closed", DIRECT, GALERNE]
    found = summary(rows)
    assert set(found) == {"tok_s_ratio_galerne_c2", "ttft_added_p50_ms_galerne_c2", "ttft_added_p99_ms_galerne_c2"}
    (built,) = tables("t", rows)
    assert built.row_count == 3
    notes = list(built.columns[-1].cells)
    assert ["hosts its engine" in note for note in notes] == [False, True, False]


def test_a_peer_that_is_not_up_before_its_file_is_there_is_waited_for(tmp_path: Path) -> None:
    late = PROGRAM + "\n"
    late = late.replace(
        "print(child", "import threading\nthreading.Timer(0.5, lambda: open('ready', 'w')).start()\nprint(child"
    )
    peer = Peer(
        "p",
        "Python",
        P,
        "here",
        lambda _engine, port: Launch(("python", "main", str(port)), files={"main": late}, ready_file="ready"),
    )
    with started(peer, programs(tmp_path / "bin"), ENGINE) as (_, pid, _launch):
        assert (Path(psutil.Process(pid).cwd()) / "ready").exists()


def test_a_failed_way_says_why_in_its_row() -> None:
    (built,) = tables("t", [Row("p", "c1", None, None, None, "refused")])
    assert "failed: refused" in list(built.columns[-1].cells)


def test_groups_of_processes_are_found_by_their_leader() -> None:
    usage = ProcessGroups({"self": (str(os.getpid()),)}).read()
    assert usage.rss_bytes["self"] > 0
