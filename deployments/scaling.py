"""Ray Serve's autoscaling, told to do what our policy says and nothing else.

Serve calls a policy in its controller at every turn of the control loop (ten a second), waits for it, and lets an
exception end the turn for every deployment. It then applies factors and delays of its own; factors of 1 and delays of
0 leave the policy's word as it is, but for one step: from several replicas it goes to none by way of one.

Serve itself decides one thing before it asks a policy: where no replica runs and a handle has a request queued, there
is to be one. That is how a gateway wakes a sleeping model.

A policy class is pickled by value with what its module holds, so this module holds nothing; what the policies of a
controller share lives in `serving.autoscaling.controller`.
"""

from __future__ import annotations

import warnings
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.config import GatewayConfig, ModelConfig, PrometheusConfig

# How often a handle or a replica reports to the controller; a handle exists in each gateway for each model.
REPORT_INTERVAL_S = 2.0
# Over how long Serve averages what they report: a wake is over when it is over.
LOOK_BACK_S = 3.0
# A gateway's load is steadier than an engine's, and one that goes takes its connections along.
GATEWAY_UP_DELAY_S = 10.0
GATEWAY_DOWN_DELAY_S = 300.0


class ModelPolicy:
    """One model's policy in the controller: `(context) -> (replicas, state)`."""

    def __init__(
        self, model: dict[str, Any], prometheus: dict[str, Any] | None, loopback: bool, release: str = ""
    ) -> None:
        from serving.autoscaling import controller
        from serving.cluster import failed_starts
        from serving.cluster.ray import node_ip

        self._model = str(model["id"])
        self._failed_starts = failed_starts.reader()
        self._scaler = controller.scaler(
            ModelConfig.model_validate(model),
            None if prometheus is None else PrometheusConfig.model_validate(prometheus),
            "127.0.0.1" if loopback else node_ip(),
            release,
        )

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Called by Serve."""
        from serving.autoscaling.live import View

        phases_s: dict[str, dict[str, float]] = {}
        for name, replicas in ctx.raw_metrics.items():
            phase, ours, _ = name.partition("_start_s")
            if ours:
                for replica, series in replicas.items():
                    if series:
                        phases_s.setdefault(replica.unique_id, {})[phase] = series[-1].value
        view = View(
            now_s=ctx.current_time,
            ready=frozenset(replica.unique_id for replica in ctx.running_replicas),
            target=ctx.target_num_replicas,
            scaled_up_s=ctx.last_scale_up_time,
            phases_s=phases_s,
            failed_starts=self._failed_starts(self._model),
        )
        return self._scaler(view), {}


def of_model(
    model: ModelConfig, prometheus: PrometheusConfig | None, *, loopback: bool, release: str = ""
) -> AutoscalingConfig | None:
    """Serve's configuration for a model of a release; None where the number of its replicas is fixed."""
    if model.autoscaling is None:
        return None
    policy = AutoscalingPolicy(
        policy_function=ModelPolicy,
        policy_kwargs={
            "model": model.model_dump(mode="json"),
            "prometheus": None if prometheus is None else prometheus.model_dump(mode="json"),
            "loopback": loopback,
            "release": release,
        },
    )
    with warnings.catch_warnings():
        # Serve means to replace this field by an environment variable, which would be for all deployments.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=model.replicas.min,
            max_replicas=model.replicas.max or max(1, model.replicas.min),
            upscale_delay_s=0,
            downscale_delay_s=0,
            downscale_to_zero_delay_s=0,
            upscaling_factor=1.0,
            downscaling_factor=1.0,
            metrics_interval_s=REPORT_INTERVAL_S,
            look_back_period_s=LOOK_BACK_S,
            policy=policy,
        )


def of_gateway(gateway: GatewayConfig) -> AutoscalingConfig | None:
    """Serve's own policy for the gateways: requests in flight on each; None where their number is fixed."""
    bounds = gateway.bounds
    if bounds.min == bounds.max:
        return None
    return AutoscalingConfig(
        min_replicas=bounds.min,
        max_replicas=bounds.max,
        target_ongoing_requests=bounds.in_flight,
        upscale_delay_s=GATEWAY_UP_DELAY_S,
        downscale_delay_s=GATEWAY_DOWN_DELAY_S,
    )
