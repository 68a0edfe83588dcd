"""Everything Galerne touches of Ray that is not public API, and Ray's environment; pinned to Ray 2.60.

A contract test holds each name used here against the installed Ray. Importing this module imports Ray: set
`environment()` first, because Ray Serve reads its switches at import.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray._common.utils import import_attr
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub leaves it out
from ray.core.generated import autoscaler_pb2
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.serve._private import replica
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.api import RunTarget, run_many
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import LoggingConfig

from serving.errors import ClusterError
from serving.routing.replicas import Endpoint

APP_NAMESPACE = "galerne"

# Keys of what a replica publishes through `record_replica_metadata`.
HOST = "galerne_host"
PORT = "galerne_port"
PID = "galerne_pid"
METRICS_PORT = "galerne_metrics_port"
START_S = "galerne_start_s"
CAPACITY = "galerne_capacity"
TOKEN_IDS = "galerne_token_ids"  # noqa: S105 - a name

GCS_TIMEOUT_S = 10
# How long a gateway keeps an idle connection of HAProxy, which closes those that it has too many of within seconds.
GATEWAY_KEEP_ALIVE_S = 120
# How long a wake stays queued. Serve looks at queues at every turn of its control loop, ten a second; while one is
# there and no replica is, it asks no policy, so that a longer one would keep a model at a single replica.
WAKE_S = 1.0


@dataclass(frozen=True, slots=True)
class RunningReplica:
    """A replica that Serve counts as running, with what it published about itself."""

    replica_id: str
    metadata: Mapping[str, Any]

    def endpoint(self) -> Endpoint | None:
        """Where its app listens; None where it has not published that."""
        if HOST in self.metadata and PORT in self.metadata:
            return Endpoint(self.replica_id, str(self.metadata[HOST]), int(self.metadata[PORT]))
        return None


OnChange = Callable[[str, tuple[RunningReplica, ...]], None]


class ReplicaWatch:
    """Follows the running replicas of deployments through Serve's long poll.

    The controller pushes a change when a replica becomes ready, starts to drain or is found dead; nothing is
    polled and no request goes through a handle. `on_change(key, replicas)` runs on the given loop, `key` being
    the caller's name for the deployment.
    """

    def __init__(
        self,
        app: str,
        deployments: Mapping[str, str],
        on_change: OnChange,
        loop: asyncio.AbstractEventLoop,
        client_id: str,
    ) -> None:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        listeners: dict[Any, Any] = {
            (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name=name, app_name=app)): _listener(key, on_change)
            for key, name in deployments.items()
        }
        self._client = LongPollClient(controller, listeners, call_in_event_loop=loop, client_id=client_id)

    def stop(self) -> None:
        """Stop after the poll under way."""
        self._client.stop()


class Waker:
    """Asks Serve for a replica of a deployment that has none.

    A request through a handle is what Serve itself counts: its router tells the controller at once, and the
    controller asks for a first replica without a policy's word. It works from any number of gateways, and needs no
    way of our own to the controller. The request is taken back when it has been seen.
    """

    def __init__(self, deployment: DeploymentHandle) -> None:
        self._deployment = deployment
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Ask, unless it is being asked already; returns at once. To be called on the event loop."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask(), name="wake")

    async def _ask(self) -> None:
        response = self._deployment.wake.remote()
        done, _ = await asyncio.wait({asyncio.ensure_future(_outcome(response))}, timeout=WAKE_S)
        if not done:
            response.cancel()


async def _outcome(response: DeploymentResponse) -> None:
    # What it answers is of no interest: a replica that comes is told by the controller.
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await response


def _listener(key: str, on_change: OnChange) -> Callable[[DeploymentTargetInfo], None]:
    def listen(targets: DeploymentTargetInfo) -> None:
        on_change(
            key,
            tuple(
                RunningReplica(found.replica_id.unique_id, dict(found.replica_metadata))
                for found in targets.running_replicas
            ),
        )

    return listen


def bind_loopback() -> None:
    """Keep the replica of this process off other interfaces: Serve's handle server binds all of them.

    To be called from a deployment's constructor, before Serve starts that server.
    """

    def add_port(server: Any, address: str, **options: Any) -> int:
        return int(add_port_to_grpc_server(server, address.replace("[::]", "127.0.0.1"), **options))

    replica.add_port_to_grpc_server = add_port


def node_ip() -> str:
    """Address of this node towards the others."""
    return str(ray.util.get_node_ip_address())


def drain_node(gcs_address: str, ip: str, message: str, within_s: float) -> bool:
    """Have Ray place nothing more on the node of this address, and Serve move its replicas away within that time.

    False where the cluster has no such node, or will not. Raises ClusterError where the cluster does not answer.
    """
    try:
        client = GcsClient(address=gcs_address)
        found = [
            node_id
            for node_id, node in client.get_all_node_info(timeout=GCS_TIMEOUT_S).items()
            if node.node_manager_address == ip and node.state == GcsNodeInfo.GcsNodeState.ALIVE
        ]
        if not found:
            return False
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline_ms = int((time.time() + within_s) * 1000)
        accepted = [client.drain_node(node_id.hex(), reason, message, deadline_ms)[0] for node_id in found]
    except Exception as error:
        raise ClusterError(f"Ray at {gcs_address} does not answer: {_reason(str(error))}") from error
    return all(accepted)


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """One deployment as Serve's controller sees it."""

    name: str
    status: str
    message: str
    replicas: Mapping[str, int]


class LocalCluster:
    """Ray and Serve on this machine's loopback, started by this process and ended with it."""

    def __init__(self, *, host: str, port: int, cpus: float, directory: Path) -> None:
        """`directory`: for Ray's sockets, logs and files, whose modes let everybody in: it must let nobody else in."""
        self._host, self._port, self._cpus, self._directory = host, port, cpus, directory

    def start(self) -> None:
        """Start Ray's processes, Serve's controller and HAProxy; raises ClusterError."""
        try:
            ray.init(
                # Never a cluster that happens to run here already, whatever RAY_ADDRESS says.
                address="local",
                num_cpus=max(1, math.ceil(self._cpus)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                namespace=APP_NAMESPACE,
                _temp_dir=str(self._directory),
            )
            serve.start(
                http_options=HTTPOptions(host=self._host, port=self._port, keep_alive_timeout_s=GATEWAY_KEEP_ALIVE_S),
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
        except Exception as error:
            raise ClusterError(f"Ray does not start on this machine: {_reason(str(error))}") from error

    def deploy(self, app: str, import_path: str, *args: Any) -> None:
        """Build the application that `module:function` makes of `args` and deploy it; returns at once."""
        build = import_attr(import_path)
        run_many(
            [RunTarget(target=build(*args), name=app, route_prefix="/")],
            wait_for_applications_running=False,
        )

    def deployments(self, app: str) -> tuple[DeploymentState, ...]:
        """Every deployment of the application, as it stands."""
        overview = serve.status().applications.get(app)
        if overview is None:
            return ()
        return tuple(
            DeploymentState(name, str(d.status.value), d.message, {str(k): v for k, v in d.replica_states.items()})
            for name, d in overview.deployments.items()
        )

    def stop(self) -> None:
        """Shut Serve and Ray down, in that order; what does not go is for the caller's `end_descendants`."""
        with contextlib.suppress(Exception):
            serve.shutdown()
        with contextlib.suppress(Exception):
            ray.shutdown()


def _reason(text: str) -> str:
    """The line of a remote traceback that says what is wrong: HAProxy's own complaint, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    alerts = [line for line in lines if "[ALERT]" in line]
    return (alerts[:1] or lines[-1:] or ["no reason given"])[0]
