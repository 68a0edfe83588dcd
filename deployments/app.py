"""The Serve application: the gateway as ingress, one deployment per model.

`import_path: deployments.app:build` with `args: {config_path: …}` is what KubeRay's serveConfigV2 names; `galerne
serve` calls `application` with a configuration it has already checked.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from deployments import scaling
from deployments.engine import EngineReplica
from deployments.gateway import GatewayReplica
from deployments.mounted import load_revision
from serving.cluster.edge import ENV_ENGINE_TOKEN
from serving.cluster.names import GATEWAY, deployment_name
from serving.config import GalerneConfig, ModelConfig, Source

HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 10.0
# A gateway is one event loop: with thousands of streams and too few processors it answers late, and killing it for that
# would cut every one of them. Three answers must fail to come before Serve replaces it.
GATEWAY_HEALTH_TIMEOUT_S = 30.0
DRAIN_MARGIN_S = 10.0
START_ATTEMPTS = 2
# Of a model that sleeps: after its bound Serve would never start a replica again, and each wake is a new day.
WAKE_ATTEMPTS = 1_000_000

# Ray writes a line a request unless each deployment says otherwise: what Serve itself was started with does not count.
LOGGING = LoggingConfig(enable_access_log=False)


def build(args: dict[str, Any]) -> Application:
    """Serve's application builder: `config_path` names the configuration file, `revision` which state of it."""
    path = Path(args["config_path"])
    config = load_revision(path, args.get("revision"))
    return application(config, os.environ.get(ENV_ENGINE_TOKEN), Source.of(path, config))


def application(config: GalerneConfig, token: str | None = None, source: Source | None = None) -> Application:
    """The application of a configuration; `token` guards the engines' ports (made up where absent).

    `source`: the file it comes from, whose tenants gateways follow.
    """
    token = token or secrets.token_urlsafe(32)
    loopback = config.listen.loopback
    traces_url = None if config.tracing is None else config.tracing.traces_url
    engines = [
        _engine(
            model,
            scaling.of_model(model, config.prometheus, loopback=loopback, release=config.release),
            token,
            loopback,
            traces_url,
        )
        for model in config.models
    ]
    gateway = serve.deployment(serve.ingress()(GatewayReplica)).options(
        name=GATEWAY,
        **_replicas(scaling.of_gateway(config.gateway), config.gateway.bounds.min),
        ray_actor_options={"num_cpus": config.gateway.cpus},
        # The gateway refuses by itself, with a reason; Serve's own bound is only the backstop.
        max_ongoing_requests=config.gateway.max_ongoing_requests * 2,
        max_queued_requests=config.gateway.max_ongoing_requests,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=GATEWAY_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_longest_drain(config),
        logging_config=LOGGING,
    )
    return gateway.bind(config, token, loopback, {m.id: _gpus(m) for m in config.models}, source, *engines)


def _replicas(scaled: AutoscalingConfig | None, fixed: int) -> dict[str, Any]:
    return {"num_replicas": fixed} if scaled is None else {"autoscaling_config": scaled}


def _engine(
    model: ModelConfig, scaled: AutoscalingConfig | None, token: str, loopback: bool, traces_url: str | None
) -> Application:
    gpu = uses_gpu(model)
    deployment = serve.deployment(EngineReplica).options(
        name=deployment_name(model.id),
        **_replicas(scaled, model.replicas.min),
        placement_group_bundles=bundles(model, gpu=gpu),
        placement_group_strategy="PACK" if gpu else "STRICT_PACK",
        ray_actor_options=_actor_options(model, gpu=gpu),
        # What kept an engine from starting twice will do so again; the operator should hear of it.
        max_constructor_retry_count=START_ATTEMPTS if model.replicas.min else WAKE_ATTEMPTS,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=model.drain_timeout_s + DRAIN_MARGIN_S,
        logging_config=LOGGING,
    )
    return deployment.bind(model, token, loopback=loopback, gpu=gpu, traces_url=traces_url)


def _actor_options(model: ModelConfig, *, gpu: bool) -> dict[str, float]:
    """The replica lives in the placement group's first bundle.

    A single worker runs inside the replica and takes its GPU; several are Ray actors that take theirs.
    """
    options = {"num_cpus": model.resources.logical_cpus}
    if gpu and model.parallel.workers == 1:
        options["num_gpus"] = model.resources.gpus
    return options


def bundles(model: ModelConfig, *, gpu: bool) -> list[dict[str, float]]:
    """One placement-group bundle per worker of a replica."""
    resources = model.resources
    bundle: dict[str, float] = {"CPU": resources.logical_cpus}
    if gpu:
        bundle["GPU"] = resources.gpus
    # On processors, too: pods of another group may have vLLM's build for GPUs. A simulated engine runs anywhere.
    if resources.accelerator_type and not model.is_fake:
        bundle[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    return [dict(bundle) for _ in range(model.parallel.workers)]


def uses_gpu(model: ModelConfig) -> bool:
    """Whether a model's workers take GPUs: as configured, or with `auto` where the cluster has any."""
    import ray

    if model.is_fake or model.resources.accelerator == "cpu":
        return False
    return model.resources.accelerator == "gpu" or ray.cluster_resources().get("GPU", 0) > 0


def _gpus(model: ModelConfig) -> float:
    """GPUs that one replica takes."""
    return model.parallel.workers * model.resources.gpus if uses_gpu(model) else 0.0


def _longest_drain(config: GalerneConfig) -> float:
    return max(model.drain_timeout_s for model in config.models) + DRAIN_MARGIN_S
