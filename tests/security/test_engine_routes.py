"""Every route that vLLM's code has, whatever switches it: at the gateway it is on the allow-list, or 404.

The running engine's own list is held against the front by tests/integration (with its default switches); here are
the routers of development mode, profiling, weights, other tasks and other makers' platforms too.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.ops import PATHS
from serving.api.routes import MODELS, OWN, RELAYED
from tests.security.test_front import CHAT, VALID, ask, refused

# Each router as the module of vLLM that declares it has it, and the app with every task and switch.
PROGRAM = """
import argparse, importlib, json, os, pkgutil
os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
import vllm.entrypoints
from typing import get_args
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.tasks import FrontendTask, GenerationTask
found, failed = set(), []
def take(routes):
    for route in routes:
        for method in getattr(route, "methods", None) or ["WEBSOCKET"]:
            found.add((method, route.path))
for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
    if module.name.endswith("api_router"):
        try:
            # One without a router adds to another's when an app is built, or is for a package that is not here.
            take(getattr(getattr(importlib.import_module(module.name), "router", None), "routes", []))
        except Exception as error:
            failed.append(f"{module.name}: {error!r}")
arguments = argparse.Namespace(**(vars(FrontendArgs()) | vars(AsyncEngineArgs(model="none"))))
arguments.enable_fault_tolerance = True
take(build_app(arguments, (*get_args(GenerationTask), *get_args(FrontendTask)), None).routes)
print(json.dumps({"routes": sorted(found), "failed": failed}))
"""
# The incidents and vLLM's security guide name these; a list without them is no list of vLLM's routes.
DANGEROUS = {
    *("/collective_rpc", "/pause", "/resume", "/sleep", "/wake_up", "/invocations", "/update_weights", "/server_info"),
    *("/reset_prefix_cache", "/v1/load_lora_adapter", "/scale_elastic_ep", "/pooling", "/classify", "/metrics"),
    *("/init_weight_transfer_engine", "/inference/v1/generate", "/v1/audio/transcriptions", "/adapters"),
    "/cohere/v2/chat",
}
SERVED = {*RELAYED, MODELS, "/version"}
DECORATED = re.compile(r'\.(get|post|put|delete|patch|websocket)\(\s*f?"(/[^"]*)"')
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, str]]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == []
    return [(method, path) for method, path in found["routes"]] + written()


def written() -> list[tuple[str, str]]:
    """Paths that stand in vLLM's source beside a decorator, those of parts that cannot be loaded here among them."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = []
    for file in (Path(spec.submodule_search_locations[0]) / "entrypoints").rglob("*.py"):
        found += [(method.upper(), path) for method, path in DECORATED.findall(file.read_text())]
    return found


def variants(path: str) -> Iterator[str]:
    """A path as it is and as somebody writes it who hopes that two parsers differ."""
    filled = "/".join("x" if part.startswith("{") else part for part in path.split("/"))
    yield from (filled, f"{filled}/", f"/{filled}", f"/v1/..{filled}", f"{filled};x", f"{filled}%2f", filled.upper())


def test_no_route_beyond_the_allow_list_gets_past_the_gateway(routes: list[tuple[str, str]]) -> None:
    paths = {path for _, path in routes}
    assert paths >= DANGEROUS, DANGEROUS - paths
    assert paths >= {*RELAYED}
    asked = 0
    for path in sorted(paths):
        for variant in variants(path):
            if variant in SERVED or variant in OWN or variant.startswith(f"{MODELS}/"):
                continue
            for method in METHODS:
                answer = ask(method, variant, VALID, CHAT)
                asked += 1
                assert refused(answer, 404)["code"] == "not_found", (method, variant)
    assert asked > 6 * 50


def test_the_allow_list_is_what_vllm_serves_and_the_gateways_own_paths_are_not_vllms(
    routes: list[tuple[str, str]],
) -> None:
    assert {("POST", path) for path in RELAYED} <= set(routes)
    # A path that the gateway answers by itself must not hide one that an engine gains.
    own = {path for _, path in routes} & (OWN | PATHS)
    assert own == {MODELS, "/version", "/health", "/ping", "/tokenizer_info"}
