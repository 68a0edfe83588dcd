"""`galerne serve`: brings a whole cluster up on one machine, says how to use it, and takes it down without a trace.

Order matters: everything that can be refused (configuration, ports, weights) is refused before a process starts;
the environment is set before Ray is imported; whatever happens after that, every process this command
caused is ended before it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from serving.cli import prometheus, state, supervision
from serving.cli.prepare import prepare_models
from serving.cluster import guard, processes
from serving.cluster.edge import ENV_ENGINE_TOKEN
from serving.cluster.environment import (
    ENV_LIMITS_FILE,
    HAPROXY_DIR,
    LIMITS_FILE,
    METRICS_PORT_HAPROXY,
    ONE_MACHINE,
    environment,
)
from serving.cluster.names import APP, GATEWAY, deployment_name
from serving.config import ENV_LEDGER_DIR, GalerneConfig, PrometheusConfig, Source
from serving.errors import ClusterError, EngineError

if TYPE_CHECKING:
    from serving.cluster.ray import DeploymentState, LocalCluster, RunningReplica

APPLICATION = "deployments.app:application"
LOG_FILE = "ray.log"
# Short: below it Ray puts a session's directory of some 45 characters with sockets in it, whose paths end at 107.
RAY_DIR = "r"
ENGINE_MODULES = ("vllm.v1.engine.async_llm", "vllm.entrypoints.launchers.app", "vllm.v1.worker.cpu_worker")
FALLBACK_PORT = 8500
STOP_WAIT_S = 15.0
POLL_S = 0.25
REAP_S = 2.0
FAILED_STATUSES = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked configuration and where its cluster keeps its files."""

    config: GalerneConfig
    state_dir: Path
    ready_file: Path | None
    example_key: str | None
    with_prometheus: bool = False
    # The file, whose tenants are followed.
    source: Source | None = None


def fake_models(config: GalerneConfig) -> GalerneConfig:
    """The same configuration with the fake engine behind every model."""
    models = tuple(m.model_copy(update={"source": f"fake:{m.id}"}) for m in config.models)
    return config.model_copy(update={"models": models})


def _measured_by(config: GalerneConfig, url: str) -> GalerneConfig:
    """The same configuration, with signals read from there."""
    settings = PrometheusConfig(url=url) if config.prometheus is None else config.prometheus
    return config.model_copy(update={"prometheus": settings.model_copy(update={"url": url})})


def _exporting(config: GalerneConfig, settings: PrometheusConfig) -> GalerneConfig:
    """The same configuration, with a port for the autoscaler's metrics that is free."""
    port = processes.free_port(config.listen.host, settings.scaler_port)
    return config.model_copy(update={"prometheus": settings.model_copy(update={"scaler_port": port})})


def run(plan: Plan, console: Console) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    stop = threading.Event()
    started_s = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    _refuse_taken_ports(plan.config)
    binary = prometheus.program() if plan.with_prometheus else None
    state.make_private(plan.state_dir)
    (plan.state_dir / HAPROXY_DIR).mkdir(exist_ok=True)
    if plan.config.demo_keys:
        console.print("[yellow]Warning:[/] the keys of this configuration are public. Loopback only; for demos.")
    processes.become_reaper()
    # Whoever kills this process is told so, and nothing is left of it.
    guarding = guard.started(_files(plan))
    try:
        return _serve(plan, console, stop, binary, started_s)
    finally:
        guarding.terminate()
        guarding.communicate()


def _serve(plan: Plan, console: Console, stop: threading.Event, binary: str | None, started_s: float) -> int:
    """What comes after the refusals: models, Ray, the deployments, until a signal."""
    # Ray's processes are wanted to end.
    stopping = threading.Event()
    _warm_byte_code(plan.config)
    prepare_models(plan.config, console)
    # What Ray, HAProxy, engines and Prometheus write from here on is for this user alone.
    os.umask(0o077)
    metrics_port = processes.free_port(plan.config.listen.host, METRICS_PORT_HAPROXY)
    os.environ.update(environment(plan.config, plan.state_dir) | ONE_MACHINE)
    # Guards the engines' ports, and is what HAProxy proves itself to gateways with.
    token = secrets.token_urlsafe(32)
    os.environ[ENV_ENGINE_TOKEN] = token
    os.environ.setdefault(ENV_LIMITS_FILE, str(plan.state_dir / LIMITS_FILE))
    # Other users of this machine reach loopback too: Ray's control plane asks for a token (ShadowRay).
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault(ENV_LEDGER_DIR, str(plan.state_dir))
    os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(metrics_port)
    os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(processes.free_port(plan.config.listen.host, FALLBACK_PORT))
    from serving.cluster.ray import LocalCluster

    measured = prometheus.LocalPrometheus(binary, plan.state_dir) if binary else None
    if measured is not None:
        plan = replace(plan, config=_measured_by(plan.config, measured.url))
    config = plan.config
    if config.prometheus is None and any(m.autoscaling is not None for m in config.models):
        console.print("[yellow]Warning:[/] no Prometheus: scales are held (`prometheus.url` or --with-prometheus).")
    if config.prometheus is not None:
        config = _exporting(config, config.prometheus)
        plan = replace(plan, config=config)
    cluster = LocalCluster(
        host=config.listen.host,
        port=config.listen.port,
        cpus=_logical_cpus(config),
        directory=plan.state_dir / RAY_DIR,
    )
    with _stderr_to(plan.state_dir / LOG_FILE):
        try:
            if measured is not None:
                measured.start()
            with console.status("starting Ray"):
                cluster.start()
            supervision.end_without_ray(stopping, plan.state_dir / LOG_FILE, _files(plan), console)
            # Ray installs handlers of its own when it starts.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            cluster.deploy(APP, APPLICATION, config, token, plan.source)
            return asyncio.run(_Session(plan, cluster, token, metrics_port, console, stop, started_s, measured).run())
        finally:
            stopping.set()
            _take_down(cluster, plan, console)


def _warm_byte_code(config: GalerneConfig) -> None:
    """On a fresh installation, compile vLLM's byte code beside the preparation of weights.

    The import is left to finish by itself; where it fails, the engine's own start says why.
    """
    if sys.dont_write_bytecode or all(model.is_fake for model in config.models):
        return
    engine = importlib.util.find_spec("vllm")
    if engine is None or engine.origin is None or Path(importlib.util.cache_from_source(engine.origin)).exists():
        return
    subprocess.Popen(  # noqa: S603 - this interpreter, a constant program
        [sys.executable, "-c", f"import {', '.join(ENGINE_MODULES)}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Send what Ray prints on its way up and down to a file; the terminal is for what a user needs."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


class _Session:
    """The time between deployment and stop: follows replicas, keeps the state file true."""

    def __init__(
        self,
        plan: Plan,
        cluster: LocalCluster,
        token: str,
        haproxy_metrics_port: int,
        console: Console,
        stop: threading.Event,
        started_s: float,
        measured: prometheus.LocalPrometheus | None,
    ) -> None:
        self._plan = plan
        self._prometheus = measured
        self._cluster = cluster
        self._console = console
        self._stop = stop
        self._started_s = started_s
        listen = plan.config.listen
        self._state = state.ClusterState(
            url=f"http://{listen.host}:{listen.port}",
            pid=os.getpid(),
            engine_token=token,
            haproxy_metrics_port=haproxy_metrics_port,
            models={m.id: m.task for m in plan.config.models},
            prometheus_url=measured.url if measured is not None else None,
            autoscaler_port=_autoscaler_port(plan.config),
            release=plan.config.release,
        )
        self._announced = False

    async def run(self) -> int:
        from serving.cluster.ray import ReplicaWatch

        deployments = {m.id: deployment_name(m.id) for m in self._plan.config.models}
        # Ray waits for its own processes itself.
        own, reap_s = processes.children(os.getpid()), 0.0
        watch = ReplicaWatch(
            APP,
            deployments | {"": GATEWAY},
            self._changed,
            asyncio.get_running_loop(),
            client_id=f"galerne-serve-{os.getpid()}",
        )
        try:
            with self._console.status("loading models") as status:
                greeted = False
                while not self._stop.is_set() and not self._up():
                    found = await asyncio.to_thread(self._cluster.deployments, APP)
                    status.update(_progress(found, deployments, time.monotonic() - self._started_s))
                    _raise_failure(found, deployments)
                    if not greeted and self._answering():
                        greeted = True
                        await self._greet()
                    self._tell_of_prometheus()
                    await asyncio.sleep(POLL_S)
            if not self._stop.is_set():
                if not greeted:
                    await self._greet()
                self._announce()
            while not self._stop.is_set():
                await asyncio.sleep(POLL_S)
                if time.monotonic() >= reap_s:
                    processes.reap_orphans(own)
                    self._tell_of_prometheus()
                    reap_s = time.monotonic() + REAP_S
        finally:
            watch.stop()
        return 0

    def _tell_of_prometheus(self) -> None:
        if self._prometheus is not None and (news := self._prometheus.ended()):
            self._console.print(f"[yellow]Warning:[/] {news}", soft_wrap=True, highlight=False)

    def _answering(self) -> bool:
        """Whether the first model and a gateway are there: enough to try it."""
        first = self._plan.config.models[0]
        return bool(self._state.gateways) and (first.replicas.min == 0 or bool(self._state.engines.get(first.id)))

    def _up(self) -> bool:
        engines = all(self._state.engines.get(m.id) for m in self._plan.config.models if m.replicas.min)
        return engines and bool(self._state.gateways)

    def _changed(self, key: str, replicas: tuple[RunningReplica, ...]) -> None:
        from serving.cluster.ray import METRICS_PORT, PID

        if key:
            rows = [
                state.EngineState(e.replica_id, e.host, e.port, int(r.metadata[PID]))
                for r in replicas
                if (e := r.endpoint()) is not None
            ]
            self._state = replace(self._state, engines=dict(self._state.engines) | {key: tuple(rows)})
        else:
            gateways = tuple(
                state.GatewayState(r.replica_id, int(r.metadata[PID]), int(r.metadata[METRICS_PORT]))
                for r in replicas
                if PID in r.metadata
            )
            self._state = replace(self._state, gateways=gateways)
        if self._announced:
            self._write()
        else:
            state.write_targets(self._plan.state_dir, self._state)

    def _write(self) -> None:
        found = processes.named(processes.descendants(os.getpid()), {supervision.HAPROXY})
        self._state = replace(self._state, haproxy_pids=tuple(sorted(found)))
        state.write(self._plan.state_dir, self._state, self._plan.ready_file)

    async def _greet(self) -> None:
        """Wait for the front door, then say how to knock."""
        listen = self._plan.config.listen
        while not self._stop.is_set() and not await _answers(listen.host, listen.port):
            await asyncio.sleep(POLL_S)
        model = next(iter(self._state.models))
        self._console.print(f"\n[bold]{model}[/] answers at {self._state.url} after {self._seconds():.0f} s. Try:")
        self._console.print(_example(self._state, self._plan.example_key), markup=False, soft_wrap=True)

    def _announce(self) -> None:
        self._announced = True
        self._write()
        asleep = sum(m.replicas.min == 0 for m in self._plan.config.models)
        said = f"{asleep} sleep(s) until asked for" if asleep else "every model answers"
        self._console.print(f"[bold green]Galerne is ready[/] after {self._seconds():.0f} s: {said}.")
        if self._state.prometheus_url is not None:
            self._console.print(f"Prometheus answers at {self._state.prometheus_url}.")
        self._console.print("`galerne status` shows models and replicas. Ctrl-C stops everything.")

    def _seconds(self) -> float:
        return time.monotonic() - self._started_s


def _autoscaler_port(config: GalerneConfig) -> int:
    """Where decisions are scraped; 0: nothing is decided."""
    scaled = any(m.autoscaling is not None for m in config.models)
    return config.prometheus.scaler_port if config.prometheus is not None and scaled else 0


def _example(cluster: state.ClusterState, key: str | None) -> str:
    key = key or "$GALERNE_KEY"
    model, task = next(iter(cluster.models.items()))
    if task == "generate":
        path, body = (
            "/v1/chat/completions",
            (
                f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Name three French cheeses."}}], '
                f'"max_tokens": 60}}'
            ),
        )
    else:
        path, body = "/v1/embeddings", f'{{"model": "{model}", "input": "fromage"}}'
    return (
        f"\ncurl {cluster.url}{path} \\\n  -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' \\\n  -d '{body}'\n"
    ).replace("'Authorization: Bearer $GALERNE_KEY'", '"Authorization: Bearer $GALERNE_KEY"')


def _progress(found: tuple[DeploymentState, ...], models: dict[str, str], seconds: float) -> str:
    by_name = {d.name: d for d in found}
    parts = []
    for model, name in models.items():
        deployment = by_name.get(name)
        running = deployment.replicas.get("RUNNING", 0) if deployment else 0
        parts.append(f"{model} {'ready' if running else 'loading'}")
    return f"{seconds:.0f} s: " + ", ".join(parts)


def _raise_failure(found: tuple[DeploymentState, ...], models: dict[str, str]) -> None:
    by_name = {name: model for model, name in models.items()}
    for deployment in found:
        if deployment.status in FAILED_STATUSES and not deployment.replicas.get("RUNNING"):
            what = by_name.get(deployment.name, deployment.name)
            raise EngineError(f"{what!r} does not start: {_last_line(deployment.message)}")


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if "EngineError" in line or "SourceError" in line]
    return (named or lines or ["no reason given"])[-1]


def _refuse_taken_ports(config: GalerneConfig) -> None:
    host, port = config.listen.host, config.listen.port
    if not processes.port_is_free(host, port):
        raise ClusterError(f"port {port} on {host} is taken; stop what listens there, or choose another with --port")


def _logical_cpus(config: GalerneConfig) -> float:
    """What the deployments ask Ray for; on a small machine more than there are cores, which Ray only counts."""
    engines = sum(
        m.resources.logical_cpus * m.parallel.workers * (m.replicas.max or m.replicas.min) for m in config.models
    )
    return max(float(os.cpu_count() or 1), engines + config.gateway.cpus * config.gateway.bounds.max + 1)


async def _answers(host: str, port: int) -> bool:
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 2)
        writer.write(b"GET /health/ready HTTP/1.1\r\nhost: galerne\r\nconnection: close\r\n\r\n")
        line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return b" 200 " in line


def _take_down(cluster: LocalCluster, plan: Plan, console: Console) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _at_once)
    # Ray reports its own processes' deaths; here all of them are wanted.
    with console.status("stopping"), contextlib.redirect_stdout(None):
        # A replica that hangs must not keep the rest alive: the descendants are ended in any case.
        _within(cluster.stop, STOP_WAIT_S)
        processes.end_descendants(os.getpid())
    supervision.remove(_files(plan))
    console.print(supervision.STOPPED)


def _files(plan: Plan) -> list[Path]:
    """What tells others that the cluster runs."""
    told = [plan.state_dir / state.STATE_FILE, plan.state_dir / state.TARGETS_FILE]
    return told if plan.ready_file is None else [*told, plan.ready_file]


def _at_once(*_: object) -> None:
    processes.end_descendants(os.getpid())
    os._exit(130)


def _within(action: Callable[[], None], seconds: float) -> None:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
