"""Environment of every process of a cluster: Ray's and vLLM's switches, in one place.

Ray Serve reads its switches when it is imported, on the driver and on every node, so they are set before that:
`galerne serve` sets them on one machine, the chart sets the same ones on pods.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from serving.cluster.haproxy import EdgeLimits
from serving.cluster.processes import ENV_TAKES_TURNS
from serving.config import GalerneConfig

METRICS_PORT_HAPROXY = 9101
# Ray puts a directory with a 56-character name below it, and a socket's path ends at 97 characters.
HAPROXY_DIR = "h"
HAPROXY_PROGRAM = "galerne-haproxy"
# Ray's own default.
HAPROXY_LEAST_CONNECTIONS = 4096
# One on each side, and a pipe for every fourth connection, as HAProxy counts before it starts.
HAPROXY_FILES_PER_CONNECTION = 2.5
# Listeners, sockets of its own, files.
HAPROXY_OWN_FILES = 256
# Unless configured: so many sources, each at its bound, hold all connections.
SOURCES_TO_FILL = 4
# HAProxy's own default. A request's headers must fit, with room for the configured limit to be told from far beyond it.
HAPROXY_LEAST_BUFFER_BYTES = 16_384
HAPROXY_HEADERS_PER_BUFFER = 4
# Longer than a client's idle connection and the next request's headers and body together.
PORT_QUARANTINE_S = 300

# Where a gateway keeps tenants' budgets across restarts, unless limits_store says.
ENV_LIMITS_FILE = "GALERNE_LIMITS_FILE"
LIMITS_FILE = "budgets.json"

# No process of the cluster reports to anybody.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Weights are prepared before an engine starts; an engine itself never goes out.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


# Ray's own processes (GCS, raylet, workers) bind every interface unless the node's address is 127.0.0.1, and Ray
# takes that address on Linux only where this switch, made for desktop systems, is off.
ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    # Idle workers that wait for tasks: here every worker is an actor of its own.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # No load balancer of another machine has to notice first that the gateway goes.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    # HAProxy's actor starts beside engines on few processors: after Ray's 5 s, three times over, it would be killed.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
}


# What a proxy never carries: a cluster's own traffic on its machine, and the question what machine this is, which Ray
# asks of a cloud's own addresses when it starts.
NEVER_BY_PROXY = ("127.0.0.1", "localhost", "::1", "169.254.169.254", "metadata.google.internal")


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep traffic on this machine away from the proxies that the environment names; none without one.

    Python's own client, httpx and curl read them, each in its own spelling, and a proxy cannot reach this loopback.
    """
    if not any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} and value for name, value in environ.items()):
        return {}
    named = (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(",")
    entries = list(dict.fromkeys([entry.strip() for entry in named if entry.strip()] + list(NEVER_BY_PROXY)))
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(entries))


def haproxy_threads(cores: int) -> int:
    """One thread moves far more than one gateway can: the other cores are for gateways and engines."""
    return min(4, max(1, cores // 2))


def haproxy_connections(accepted: int, open_files: int) -> int:
    """Connections that HAProxy takes: twice what the gateways accept, idle ones included, within the process's files.

    Beyond its bound HAProxy leaves connections waiting without a word; the gateways' own bound answers 503 first.
    """
    return min(
        max(HAPROXY_LEAST_CONNECTIONS, 2 * accepted),
        int((open_files - HAPROXY_OWN_FILES) / HAPROXY_FILES_PER_CONNECTION),
    )


def haproxy_buffer_bytes(header_bytes: int) -> int:
    """What HAProxy reads a request's headers into: beyond it, it cannot say what is too long."""
    return max(HAPROXY_LEAST_BUFFER_BYTES, HAPROXY_HEADERS_PER_BUFFER * header_bytes)


def environment(config: GalerneConfig, state_dir: Path) -> dict[str, str]:
    """Variables for the driver and every node; `state_dir` holds HAProxy's files and sockets."""
    haproxy = state_dir / HAPROXY_DIR
    accepted = config.gateway.bounds.max * config.gateway.max_ongoing_requests
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = haproxy_connections(accepted, open_files)
    limits = EdgeLimits(
        config.listen.host,
        config.limits.header_bytes,
        config.limits.body_bytes,
        config.listen.connections_per_source or connections // SOURCES_TO_FILL,
        tuple(str(network) for network in config.listen.trusted_proxies),
    )
    return (
        QUIET
        | limits.environment()
        | {
            # Measured: HAProxy -> ingress replica directly, no deployment handle, one event loop.
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(haproxy_threads(os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_MAXCONN": str(connections),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name(HAPROXY_PROGRAM)),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            # A log line a request, parsed in Python, for metrics that the gateway has already.
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(METRICS_PORT_HAPROXY),
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(haproxy_buffer_bytes(config.limits.header_bytes)),
            # A process that a reload replaced may send one more request of each idle connection to an old port.
            "RAY_SERVE_PORT_QUARANTINE_S": str(PORT_QUARANTINE_S),
            # A header between uvicorn and Ray is believed by neither.
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.api.threshold:middlewares",
            # uvicorn believes X-Forwarded-For from these addresses; its default is this machine's.
            "FORWARDED_ALLOW_IPS": "",
            # The gateway's bound is the one that holds; vLLM's own default is 4.
            "VLLM_MAX_STOP_STRINGS": str(config.limits.stop_sequences),
            # Attempts to start a replica are bounded for each deployment, not by this factor of its replicas.
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000",
            "RAY_SERVE_LOG_CLIENT_ADDRESS": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        | ({ENV_TAKES_TURNS: "1"} if shares_processors(config) else {})
    )


def shares_processors(config: GalerneConfig) -> bool:
    """Whether gateway and HAProxy run on the processors that an engine computes on: one machine, no GPUs asked for."""
    return config.listen.loopback and any(
        not model.is_fake and model.resources.accelerator != "gpu" for model in config.models
    )
