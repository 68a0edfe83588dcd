"""Where to measure: URLs, process groups, the ready file, and requests that differ in their number alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest.errors import LoadtestError
from loadtest.peers.peer import Recipe
from loadtest.processes import ProcessGroups, _processes, parse_groups, this_machine
from loadtest.request import Target, chat_templates, filler, target_at
from loadtest.targets import _access, recipe_of, subjects_of

READY = {
    "url": "http://127.0.0.1:8000",
    "engine_token": "t",
    "pid": 10,
    "pids": {"gateway": [11], "engine": [12, 13], "haproxy": [14], "other": []},
    "engines": {
        "paced": [{"host": "127.0.0.1", "port": 9001}],
        "saturated": [{"host": "127.0.0.1", "port": 9002}],
    },
}


def test_a_ready_file_gives_one_subject_a_model_with_the_same_gateway() -> None:
    paced, saturated = subjects_of(READY, "k")
    assert (paced.model, paced.direct) == ("paced", Target("direct", "127.0.0.1", 9001, engine_token="t"))
    assert saturated.direct.port == 9002
    assert paced.gateway == saturated.gateway == Target("gateway", "127.0.0.1", 8000, "k")
    assert paced.groups == {"gateway": ("11",), "engine": ("12", "13"), "haproxy": ("10/haproxy",)}


def test_a_model_with_several_replicas_is_refused() -> None:
    twice = {**READY, "engines": {"m": [{"host": "h", "port": 1}, {"host": "h", "port": 2}]}}
    with pytest.raises(LoadtestError, match="2 replicas"):
        subjects_of(twice, "k")


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [("http://h:1", "h", 1), ("http://h:1/", "h", 1), ("http://h:1/v1", "h", 1), ("http://h", "h", 80)],
)
def test_a_url_is_a_target(url: str, host: str, port: int) -> None:
    target = target_at("t", url, key="k")
    assert (target.host, target.port) == (host, port)


@pytest.mark.parametrize("url", ["https://h:1", "h:1", "http://", "http://h/other", ""])
def test_what_is_no_plain_http_url_is_refused(url: str) -> None:
    with pytest.raises(LoadtestError, match="is no target"):
        target_at("t", url)


def test_a_key_is_not_shown() -> None:
    assert "hush" not in repr(target_at("t", "http://h:1", key="hush", engine_token="hush"))


def test_the_engine_token_goes_to_the_engine_alone() -> None:
    paced, _ = subjects_of(READY, "k")
    for target, held, lacking in (
        (paced.direct, b"X-Galerne-Engine-Token: t\r\n", b"Bearer"),
        (paced.gateway, b"Bearer k\r\n", b"Token"),
    ):
        (template,) = chat_templates(target, model="m", prompts=("x",), output_tokens=8, extra={})
        assert held in template.head
        assert lacking not in template.head


def test_requests_differ_in_their_number_alone() -> None:
    (template,) = chat_templates(
        Target("t", "h", 1), model="m", prompts=(filler(1024),), output_tokens=8, extra={"ignore_eos": True}
    )
    one, two = template.numbered(1), template.numbered(99_999_999_999)
    assert len(one) == len(two)
    head, _, body = one.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head + b"\r\n"
    assert b"Authorization" not in head
    prompt = json.loads(body)["messages"][0]["content"]
    assert len(prompt) == 1024
    assert prompt.startswith("000000000001 ")
    with pytest.raises(LoadtestError, match="does not fit"):
        template.numbered(10**12)


def test_groups_are_read_from_the_command_line() -> None:
    assert parse_groups("") == {}
    assert parse_groups("engine=1+2,gateway=3,haproxy=5/haproxy") == {
        "engine": ("1", "2"),
        "gateway": ("3",),
        "haproxy": ("5/haproxy",),
    }
    with pytest.raises(LoadtestError, match="no process group"):
        parse_groups("engine")


def test_a_reading_holds_every_group_and_the_machine() -> None:
    groups = ProcessGroups({"engine": (str(os.getpid()),)})
    before = groups.read()
    sum(range(2_000_000))
    after = groups.read()
    assert set(after.cpu_s) == {"engine", "machine"}
    assert set(after.rss_bytes) == {"engine"}
    assert after.rss_bytes["engine"] > 2**20
    assert all(after.cpu_s[name] >= before.cpu_s[name] for name in after.cpu_s)


def test_processes_come_and_go_within_a_group() -> None:
    groups = ProcessGroups({"all": (str(os.getpid()),)})
    alone = groups.read()
    with subprocess.Popen(["sleep", "60"]) as child:
        wait_for_name(child.pid, "sleep")
        together = groups.read()
        named = ProcessGroups({"child": (f"{os.getpid()}/sleep",)})
        assert 0 < named.read().rss_bytes["child"] < together.rss_bytes["all"]
        assert child.pid not in {process.pid for process in _processes("others", f"{os.getpid()}/!sleep")}
        assert os.getpid() in {process.pid for process in _processes("others", f"{os.getpid()}/!sleep")}
        child.kill()
    assert together.rss_bytes["all"] > alone.rss_bytes["all"]
    assert groups.read().cpu_s["all"] >= together.cpu_s["all"]
    with pytest.raises(LoadtestError, match="group 'child'"):
        named.read()


def wait_for_name(pid: int, name: str) -> None:
    """A child bears its parent's name until it has become what it was started for."""
    while Path(f"/proc/{pid}/comm").read_text().strip() != name:
        time.sleep(0.001)


@pytest.mark.parametrize("member", ["4194304", "no-such-process-name", f"{os.getpid()}/no-such-process-name"])
def test_a_process_that_does_not_run_is_refused(member: str) -> None:
    with pytest.raises(LoadtestError, match="no process"):
        ProcessGroups({"engine": (member,)})


def test_the_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.cpu_model
    assert machine.python.startswith("3.")


def test_a_recipe_leaves_out_whose_engine_it_is() -> None:
    told = {
        "arguments": {"model": "/weights", "served_model_name": ["m"], "dtype": "float32"},
        "environment": {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "/here/libgomp.so"},
    }
    assert recipe_of(told) == Recipe(Path("/weights"), {"dtype": "float32"}, {"OMP_NUM_THREADS": "2"})


def test_galerne_tells_what_its_engine_is_started_with(tmp_path: Path) -> None:
    """The command whose output a recipe is made of, on a model directory that is there."""
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "model.safetensors").touch()
    (weights / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    config = tmp_path / "c.yaml"
    model = {
        "id": "m",
        "source": f"path:{weights}",
        "engine": {"max_model_len": 99},
        "resources": {"accelerator": "cpu"},
    }
    config.write_text(json.dumps(_access("", 18390) | {"models": [model, {"id": "f", "source": "fake:f"}]}))
    galerne = Path(sys.executable).with_name("galerne")
    told = subprocess.run([galerne, "models", "arguments", str(config)], capture_output=True, text=True, check=True)
    (document,) = json.loads(told.stdout).values()
    recipe = recipe_of(document)
    assert recipe.weights == weights
    assert recipe.arguments["max_model_len"] == 99
    assert recipe.env["OMP_NUM_THREADS"]
    # What another installation cannot import is not handed to it.
    assert not [name for name, value in recipe.arguments.items() if "serving." in str(value)]
