"""Runs serveConfigV2s on this machine as a RayService does: `python -m tests.helm.deploy STATE KEY DIRECTORY…`.

Ray's dashboard, which KubeRay talks to, hands a parsed configuration to Serve's controller; so does this, on a cluster
of one node that offers what the chart's groups offer. Each directory holds a `galerne.yaml` and a `serve.json`; they run one
after the other, and the last one's node is drained. What was seen of each is one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
import traceback
import urllib.request
from pathlib import Path
from typing import Any

from serving.cluster import processes
from serving.cluster.environment import HAPROXY_DIR, ONE_MACHINE, environment
from serving.cluster.names import APP, GATEWAY
from serving.cluster.node_drain import drain, replicas_here
from serving.config_file import load

UP_S = 150.0
# Serve ends what has nowhere to go its graceful shutdown before the deadline: 15 s, with these models' drain.
DRAIN_S = 25.0
RAY_ATTEMPTS = 4
# Pods have one each; here all are on one node.
GATEWAYS = 2


def main() -> None:
    """Start, ask each once, say what was seen, stop."""
    state, key, directories = Path(sys.argv[1]), sys.argv[2], [Path(argument) for argument in sys.argv[3:]]
    # The machine's part of it is the same for all.
    config = load(directories[-1] / "galerne.yaml")
    (state / HAPROXY_DIR).mkdir()
    os.environ.update(environment(config, Path(state)) | ONE_MACHINE)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ["GALERNE_ENGINE_TOKEN"] = secrets.token_urlsafe(32)
    os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(processes.free_port("127.0.0.1", 18480))
    os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(processes.free_port("127.0.0.1", 18490))
    processes.become_reaper()
    status = 1
    try:
        client = None
        for directory in directories:
            told = json.loads((directory / "serve.json").read_text())
            client = client or started(told)
            seen = deployed(client, told, directory / "galerne.yaml", key)
            if directory == directories[-1]:
                seen["drained"] = drained()
            else:
                client.delete_apps([APP])
            print(json.dumps({"directory": directory.name} | seen), flush=True)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        processes.end_descendants(os.getpid())
        sys.stderr.flush()
        # Ray's own way out would look for the cluster that is gone, for a minute.
        os._exit(status)


def started(told: dict[str, Any]) -> Any:
    """Serve's client, on a cluster with what a configuration says of HTTP and logs."""
    from ray.exceptions import RayActorError
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(told)
    _start_ray()
    client = None
    while client is None:
        # Serve's controller ends a proxy that is slow to come, which on a busy machine is this one, and makes another.
        with contextlib.suppress(RayActorError):
            client = serve_start(
                http_options=schema.http_options.model_dump(),
                proxy_location=schema.proxy_location,
                global_logging_config=schema.logging_config,
            )
    return client


def deployed(client: Any, told: dict[str, Any], config_path: Path, key: str) -> dict[str, Any]:
    """What the application answered, and where its gateway and its targets are."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    config = load(config_path)
    client.deploy_apps(ServeDeploySchema.model_validate(told))
    deadline_s = time.monotonic() + UP_S
    while serve.status().applications[APP].status != "RUNNING":
        application = serve.status().applications[APP]
        if time.monotonic() > deadline_s or application.status == "DEPLOY_FAILED":
            raise RuntimeError(f"{config_path}: {application.status}: {application.message}")
        time.sleep(0.2)
    url = f"http://127.0.0.1:{config.listen.port}"
    headers = {"Authorization": f"Bearer {key}"}
    model = next(model for model in config.models if model.replicas.min)
    if model.task == "generate":
        body = {"model": model.id, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        told = _json(f"{url}/v1/chat/completions", headers, body)["choices"][0]["message"]["content"]
    else:
        told = _json(f"{url}/v1/embeddings", headers, {"model": model.id, "input": "hello"})["data"][0]["embedding"]
    details = client.get_serve_details()["applications"][APP]["deployments"][GATEWAY]
    targets = _json(f"http://127.0.0.1:{config.gateway.metrics_port}/targets", {}, None)
    return {
        "answer": told,
        "models": sorted(model["id"] for model in _json(f"{url}/v1/models", headers, None)["data"]),
        "gateway_resources": details["deployment_config"]["ray_actor_options"].get("resources"),
        "targets": targets,
    }


def _start_ray() -> None:
    """One node with what the chart's groups offer; again where a busy machine took longer than Ray's half a minute."""
    import ray

    for attempt in range(RAY_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=64,
                resources={"galerne_gateway": GATEWAYS},
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception:
            if attempt + 1 == RAY_ATTEMPTS:
                raise
            ray.shutdown()
            processes.end_descendants(os.getpid())
        else:
            return


def drained() -> bool:
    """Whether every replica had gone in time after the node was said to go, as a pod's preStop hook says it."""
    from serving.cluster.placement import cluster_address
    from serving.cluster.ray import drain_node, node_ip

    def replicas() -> list[int]:
        # A pod sees its own processes only; this machine may run other clusters.
        own = processes.descendants(os.getpid())
        return [pid for pid in replicas_here() if pid in own]

    assert len(replicas()) == GATEWAYS + 1
    return drain(DRAIN_S, lambda: drain_node(cluster_address(), node_ip(), "a test", DRAIN_S), replicas)


def _json(url: str, headers: dict[str, str], body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers | {"Content-Type": "application/json"})
    deadline_s = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except OSError:
            # HAProxy hears of the first gateway a moment after Serve has it.
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
