"""Every setting of what stands before the gateway's app, read from the installed versions and from what we start."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import uvicorn

from serving.cluster.environment import ONE_MACHINE, environment
from serving.cluster.haproxy import EdgeLimits, harden
from serving.config import GalerneConfig
from serving.engine.private_server import PrivateServer
from tests.fronts import template

# Keywords whose second word is what is set.
_FAMILIES = {"timeout", "option", "stats", "http-check", "http-request", "http-response", "tcp-request"}
_SWITCH = re.compile(r"HTTP|HAPROXY|HA_PROXY|INGRESS|PROXY|HEADER|QUARANTINE|ACCESS|LOG_")
_CONSTANTS = "ray.serve._private.constants"
_SERVER = "ray.serve._private.http_util"


def haproxy_settings() -> dict[str, list[str]]:
    """Keyword (with its second word in families) to the values that it has, of every line that HAProxy runs with."""
    limits = EdgeLimits("127.0.0.1", 8192, 1_000_000, 100, ("192.0.2.0/24",), "proof")
    found: dict[str, list[str]] = {}
    for line in harden(template(), limits, Path("/errors")).splitlines():
        words = line.split()
        if not words or words[0].startswith("#") or words[0] in {"global", "defaults"}:
            continue
        count = 2 if words[0] in _FAMILIES else 1
        values = found.setdefault(" ".join(words[:count]), [])
        value = " ".join(words[count:]) or "on"
        if value not in values:
            values.append(value)
    return dict(sorted(found.items()))


def uvicorn_settings() -> dict[str, tuple[str, str | None, str | None]]:
    """Parameter to its default, and to what the gateway's and an engine's server have instead; None: the default."""
    parameters = inspect.signature(uvicorn.Config.__init__).parameters
    gateway = _keywords(_SERVER, "start_asgi_http_server", "Config")
    source = ast.parse(inspect.getsource(inspect.getmodule(PrivateServer)))  # type: ignore[arg-type]
    engine = _called(source, "Config")
    found = {}
    for name, parameter in list(parameters.items())[1:]:
        default = "" if parameter.default is parameter.empty else repr(parameter.default)
        if isinstance(parameter.default, dict):
            default = "uvicorn's own"
        found[name] = (re.sub(r"<(\S+): .*>", r"\1", default), gateway.get(name), engine.get(name))
    return found


def ray_switches() -> dict[str, tuple[str, str | None]]:
    """Switch to its default, as Ray's source has it, and to its value in a cluster; None: the default."""
    ours = environment(_config(), Path("/state")) | ONE_MACHINE
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(_tree(_CONSTANTS)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            if name.startswith("RAY_SERVE_") and _SWITCH.search(name) and name not in found:
                default = ast.unparse(node.args[1]) if len(node.args) > 1 else "None"
                found[name] = (default, _shown(name, ours.get(name)))
    return dict(sorted(found.items()))


def _shown(name: str, value: str | None) -> str | None:
    machines = ("BINARY", "CONFIG_FILE", "SOCKET", "STATE", "MAXCONN", "NBTHREAD", "METRICS_PORT", "BUFSIZE")
    return "…" if value is not None and any(word in name for word in machines) else value


def _config() -> GalerneConfig:
    tenants = [{"id": "t", "keys": [{"id": "k", "sha256": "0" * 64}]}]
    return GalerneConfig.model_validate({"models": [{"id": "m", "source": "fake:m"}], "tenants": tenants})


@cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def _keywords(module: str, function: str, called: str) -> dict[str, str]:
    (found,) = (
        node
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
    )
    return _called(found, called)


def _called(tree: ast.AST, name: str) -> dict[str, str]:
    """Keyword arguments of the one call of this name (the last part of it), as their source has them."""
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name
    )
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is not None}


# Whose values are the machine's, the configuration's or our own rules': the tests of those say what they do.
VARIES = frozenset(
    {
        *("acl", "backend", "bind", "default_backend", "errorfile", "frontend", "lua-load-per-thread", "maxconn"),
        *("nbthread", "server", "server-state-base", "server-state-file", "stats socket", "stick-table"),
        *("tune.bufsize", "use_backend", "http-check expect", "option httpchk", "tcp-request connection"),
        *("http-request add-header", "http-request del-header", "http-request return", "http-request set-header"),
        *("http-request set-log-level", "http-request use-service", "http-response del-header"),
        *("http-response lua.galerne_end_early", "http-response set-var(txn.galerne_early_body)"),
        "http-response wait-for-body",
    }
)


def table(section: str) -> list[tuple[str, ...]]:
    """The rows that docs/front.md must have in a section, without their reasons."""
    if section == "HAProxy":
        found = haproxy_settings().items()
        return [(_code(name), "…" if name in VARIES else _code(" / ".join(values))) for name, values in found]
    if section == "uvicorn":
        return [(_code(name), *map(_code, values)) for name, values in uvicorn_settings().items()]
    return [(_code(name), *map(_code, values)) for name, values in ray_switches().items()]


def _code(text: str | None) -> str:
    return "" if text is None else text if text == "…" else f"`{text}`"
