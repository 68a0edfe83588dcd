"""`python -m tests.faults.redeploy GCS CONFIG TOKEN VERSION REPLICAS`: deploy a running cluster's application again.

Another version is a rolling update of gateways and engines; the same version with fewer replicas is a scale-down.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
from ray.serve.api import RunTarget, run_many

from deployments.app import application
from serving.cluster.names import APP
from serving.cluster.ray import APP_NAMESPACE
from serving.config_file import load


def bound(app: Any, version: str, **options: Any) -> Any:
    """The same deployment, of this version: what Serve itself gives one that is deployed from a file."""
    deployment = app._bound_deployment
    return deployment.options(version=version, _internal=True, **options)


def main() -> None:
    address, config, token, version, replicas = sys.argv[1:]
    ray.init(address=address, namespace=APP_NAMESPACE, log_to_driver=False, logging_level="ERROR")
    gateway = application(load(Path(config)), token)
    *head, engine = gateway._bound_deployment.init_args
    scaled = bound(engine, version, num_replicas=int(replicas)).bind(
        *engine._bound_deployment.init_args, **engine._bound_deployment.init_kwargs
    )
    target = bound(gateway, version).bind(*head, scaled)
    run_many([RunTarget(target=target, name=APP, route_prefix="/")], wait_for_applications_running=False)


if __name__ == "__main__":
    main()
