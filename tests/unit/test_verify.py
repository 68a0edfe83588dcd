"""`galerne verify`: what it accepts, what it refuses, what it probes, and a result line that cannot be changed.

No test here looks further than loopback: the targets outside are a constant that is read and never probed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.cli.verify import isolation
from serving.cli.verify.checks import CHAT, EMBEDDINGS, MODELS, UNLISTED, Serving
from serving.cli.verify.http import Answer, Client, NoAnswer
from serving.cli.verify.isolation import OUTSIDE, BadTarget, Target, probe, target
from serving.cli.verify.result import BadLine, Check, checked, outcome, signed_line

KEY = "sk-right"
LISTING = {"data": [{"id": "chat", "task": "generate"}, {"id": "vectors", "task": "embed"}]}
COMPLETION = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3},
}
CHUNKS = [
    {"choices": [{"delta": {"content": "hel"}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"completion_tokens": 2}},
]
VECTOR = {"data": [{"embedding": [0.5, -0.25]}]}


def events(*chunks: Any, done: bool = True) -> bytes:
    lines = [c if isinstance(c, str) else json.dumps(c) for c in chunks] + (["[DONE]"] if done else [])
    return b"".join(f"data: {line}\n\n".encode() for line in lines)


def answer(status: int, document: Any) -> Answer:
    return Answer(status, "application/json", json.dumps(document).encode(), 0.1)


def stream(body: bytes, content_type: str = "text/event-stream; charset=utf-8") -> Answer:
    return Answer(200, content_type, body, 0.1)


Change = Callable[[str, str, str | None], Answer | None]


class Cluster:
    """A cluster as it should be, but for what a test changes of it."""

    def __init__(self, change: Change = lambda *_: None) -> None:
        self.change = change
        self.asked: list[tuple[str, str, Any]] = []

    def ask(self, method: str, path: str, key: str | None, content: dict[str, Any] | None = None) -> Answer:
        self.asked.append((method, path, (content or {}).get("model")))
        kind = f"{path}#stream" if content and content.get("stream") else path
        changed = self.change(method, kind, key)
        if changed is not None:
            return changed
        if key != KEY:
            return answer(401, {"error": {"message": "no"}})
        known = {
            MODELS: answer(200, LISTING),
            CHAT: answer(200, COMPLETION),
            f"{CHAT}#stream": stream(events(*CHUNKS)),
            EMBEDDINGS: answer(200, VECTOR),
        }
        return known.get(kind) or answer(404, {"error": {"message": "no such route"}})


def verdicts(cluster: Cluster, model: str | None = None) -> dict[str, Check]:
    return {check.name: check for check in Serving(cluster, KEY, model).run()}


def on(path: str, given: Answer) -> Change:
    return lambda _, asked, key: given if asked == path and key == KEY else None


def test_a_cluster_as_it_should_be_passes() -> None:
    cluster = Cluster()
    found = verdicts(cluster)
    assert {c.verdict for c in found.values()} == {"passed"}
    assert list(found) == ["models", "chat", "stream", "embeddings", "wrong key", "unlisted routes"]
    assert outcome(found.values()) == "passed"
    assert ("POST", EMBEDDINGS, "vectors") in cluster.asked
    assert {(method, path) for method, path, _ in cluster.asked} >= set(UNLISTED)


@pytest.mark.parametrize(
    ("path", "given", "check", "seen"),
    [
        (CHAT, answer(503, {"error": {"message": "still loading"}}), "chat", "still loading"),
        (CHAT, answer(200, {"choices": []}), "chat", "empty"),
        (CHAT, answer(200, COMPLETION | {"usage": None}), "chat", "usage"),
        (CHAT, answer(200, COMPLETION | {"usage": {"completion_tokens": 0}}), "chat", "usage"),
        (f"{CHAT}#stream", answer(200, COMPLETION), "stream", "no stream"),
        (f"{CHAT}#stream", stream(b""), "stream", "empty"),
        (f"{CHAT}#stream", stream(events(*CHUNKS, done=False)), "stream", "[DONE]"),
        (f"{CHAT}#stream", stream(events(*CHUNKS)[:-1]), "stream", "[DONE]"),
        (f"{CHAT}#stream", stream(events(*CHUNKS[:2])), "stream", "usage"),
        (f"{CHAT}#stream", stream(events(CHUNKS[0], CHUNKS[2])), "stream", "why the answer ended"),
        (f"{CHAT}#stream", stream(events(CHUNKS[2])), "stream", "no chunk"),
        (f"{CHAT}#stream", stream(events(CHUNKS[0], "{")), "stream", "no JSON"),
        (f"{CHAT}#stream", stream(events(CHUNKS[0], {"error": {"code": "stream_cut"}})), "stream", "stream_cut"),
        (EMBEDDINGS, answer(200, {"data": [{"embedding": [0.0, 0.0]}]}), "embeddings", "zeros"),
        (EMBEDDINGS, answer(200, {"data": [{"embedding": ["a"]}]}), "embeddings", "finite"),
        (EMBEDDINGS, Answer(200, "", b'{"data": [{"embedding": [NaN]}]}', 0.1), "embeddings", "finite"),
        ("/metrics", answer(200, {}), "unlisted routes", "/metrics must be 404"),
        ("/pause", answer(403, {}), "unlisted routes", "/pause must be 404"),
    ],
)
def test_what_is_not_as_it_should_be_fails_alone(path: str, given: Answer, check: str, seen: str) -> None:
    found = verdicts(Cluster(on(path, given)))
    assert {name for name, c in found.items() if c.verdict == "failed"} == {check}
    assert seen in found[check].detail
    assert outcome(found.values()) == "failed"


@pytest.mark.parametrize("opened", [(MODELS, "wrong"), (CHAT, "wrong"), (MODELS, None), (CHAT, None)])
def test_a_door_that_any_key_opens_fails(opened: tuple[str, str | None]) -> None:
    path, which = opened

    def change(_: str, asked: str, key: str | None) -> Answer | None:
        wrong = key is None if which is None else key not in {None, KEY}
        return answer(200, COMPLETION) if asked == path and wrong else None

    found = verdicts(Cluster(change))
    assert {name for name, c in found.items() if c.verdict == "failed"} == {"wrong key"}


def test_without_a_list_of_models_nothing_more_is_asked() -> None:
    cluster = Cluster(on(MODELS, answer(401, {"error": {"message": "not valid"}})))
    found = verdicts(cluster)
    assert found.pop("models").verdict == "failed"
    assert {c.verdict for c in found.values()} == {"skipped"}
    assert len(cluster.asked) == 1


def test_a_task_without_a_model_is_skipped_and_the_named_model_is_asked() -> None:
    listing = {"data": [{"id": "one", "task": "generate"}, {"id": "two", "task": "generate"}]}
    cluster = Cluster(on(MODELS, answer(200, listing)))
    found = verdicts(cluster, "two")
    assert found["embeddings"].verdict == "skipped"
    assert outcome(found.values()) == "passed"
    assert {model for _, path, model in cluster.asked if path == CHAT} == {"two", "any"}
    unknown = verdicts(Cluster(on(MODELS, answer(200, listing))), "three")
    assert "no model 'three'" in unknown["models"].detail


def test_a_run_that_skipped_everything_has_shown_nothing() -> None:
    assert outcome([Check("a", "skipped", "", 0.0)]) == "failed"
    assert outcome([]) == "failed"


# -- isolation: listeners on loopback, closed ports, injected names


@contextlib.contextmanager
def listener(reply: bytes | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """A listening port, and what each connection to it sent until it closed or was answered."""
    received: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    received.append(connection.recv(4096))
                    if reply is not None:
                        connection.sendall(reply)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1], received
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def seen(received: list[bytes]) -> None:
    """Wait until the listener has noticed its connection."""
    deadline_s = time.monotonic() + 10
    while not received:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_port_that_is_reached_is_a_failure_and_gets_no_byte() -> None:
    with listener() as (port, received):
        (found,) = probe([Target("tcp", "127.0.0.1", port)])
        seen(received)
    assert (found.verdict, found.name) == ("failed", f"isolated from tcp:127.0.0.1:{port}")
    assert "accepted" in found.detail
    assert received == [b""]


def test_a_metadata_service_that_answers_is_a_failure_and_is_asked_for_nothing() -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (port, received):
        (found,) = probe([Target("http", "127.0.0.1", port)])
        seen(received)
    assert found.verdict == "failed"
    assert "400 Bad Request" in found.detail
    assert received == [b"GET / HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n"]


def test_closed_ports_pass() -> None:
    port = closed_port()
    found = probe([Target("tcp", "127.0.0.1", port), Target("http", "127.0.0.1", port)])
    assert [c.verdict for c in found] == ["passed", "passed"]


def test_names_that_resolve_fail_and_those_that_do_not_or_hang_pass() -> None:
    hang = threading.Event()

    def resolver(name: str) -> str:
        if name == "known.":
            return "192.0.2.1"
        if name == "slow.":
            hang.wait(30)
        raise socket.gaierror("no such name")

    found = probe([Target("dns", n) for n in ("known.", "unknown.", "slow.")], timeout_s=0.2, resolver=resolver)
    hang.set()
    assert [c.verdict for c in found] == ["failed", "passed", "passed"]
    assert "192.0.2.1" in found[0].detail


def test_the_systems_resolver_is_the_default() -> None:
    assert isolation.resolve("localhost") in {"127.0.0.1", "::1"}


def test_the_default_targets_cover_names_both_families_and_metadata() -> None:
    kinds = {t.kind for t in OUTSIDE}
    assert kinds == {"dns", "tcp", "http"}
    addresses = [ipaddress.ip_address(t.host) for t in OUTSIDE if t.kind != "dns"]
    assert {a.version for a in addresses} == {4, 6}
    assert all(
        a.is_global for t, a in zip((t for t in OUTSIDE if t.kind != "dns"), addresses, strict=True) if t.kind == "tcp"
    )
    assert {t.port for t in OUTSIDE if t.kind == "tcp"} == {53, 443}
    assert Target("http", "169.254.169.254", 80) in OUTSIDE
    assert all(t.host.endswith(".") for t in OUTSIDE if t.kind == "dns")


@pytest.mark.parametrize("text", [str(t) for t in OUTSIDE])
def test_a_target_reads_as_it_is_written(text: str) -> None:
    assert str(target(text)) == text


@pytest.mark.parametrize(
    "text", ["", "dns:", "tcp:host", "tcp::443", "tcp:host:0", "tcp:host:65536", "udp:host:53", "host:443"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(BadTarget):
        target(text)


# -- the result line

AT = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
CHECKS = (Check("models", "passed", "2: chat, café", 0.12345), Check("chat", "failed", "status 503", 1.0))


def line(key: str = KEY) -> str:
    return signed_line(CHECKS, url="http://127.0.0.1:1", version="1.2.3", at=AT, key=key)


def test_a_line_is_one_line_and_its_key_verifies_it() -> None:
    assert "\n" not in line()
    assert line().isascii()
    result = checked(f"2026-11-25T12:00:01Z stdout F {line()}\n", KEY)
    assert result["outcome"] == "failed"
    assert result["checks"][0] == {"name": "models", "verdict": "passed", "detail": "2: chat, café", "seconds": 0.123}
    assert KEY not in line()


def test_the_signature_is_as_documented() -> None:
    import hashlib
    import hmac

    document = json.loads(line())
    text = json.dumps(document["galerne_verify"], sort_keys=True, separators=(",", ":"))
    expected = hmac.new(KEY.encode(), b"galerne verify 1\n" + text.encode(), hashlib.sha256).hexdigest()
    assert document["hmac_sha256"] == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace('"failed"', '"passed"'),
        lambda t: t.replace("127.0.0.1:1", "127.0.0.1:2"),
        lambda t: t[:-4] + '0"}',
        lambda t: t[:-1],
        lambda t: t.replace("hmac_sha256", "hmac"),
        lambda t: t.replace('"hmac_sha256":"', '"hmac_sha256":"é'),
        lambda _: "",
        lambda _: "null",
        lambda _: '{"galerne_verify": 1, "hmac_sha256": 2}',
    ],
)
def test_a_changed_line_is_refused(change: Callable[[str], str]) -> None:
    with pytest.raises(BadLine):
        checked(change(line()), KEY)


def test_another_key_does_not_verify_it() -> None:
    with pytest.raises(BadLine, match="another key"):
        checked(line("sk-other"), KEY)


# -- the client and the command, against a server on loopback


class Handler(BaseHTTPRequestHandler):
    """`Cluster` over HTTP."""

    protocol_version = "HTTP/1.1"
    cluster = Cluster()

    def handle_one(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")
        key = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        if self.path == "/cut":
            self.send_response(200)
            self.send_header("content-length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            return
        given = self.cluster.ask(self.command, self.path.removeprefix("/base"), key, content)
        self.send_response(given.status)
        self.send_header("content-type", given.content_type)
        self.send_header("content-length", str(len(given.body)))
        self.end_headers()
        self.wfile.write(given.body)

    do_GET = do_POST = handle_one

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are silent."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join(5)


def test_an_answer_that_is_not_whole_is_no_answer(server: str) -> None:
    with pytest.raises(NoAnswer, match="IncompleteRead"):
        Client(server, 5).ask("GET", "/cut", KEY)


def test_a_silent_server_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
        with pytest.raises(NoAnswer, match=r"0\.2 s"):
            client.ask("GET", MODELS, KEY)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://h", "http://", "http://h:0", "http://h:99999", "http://h/?a"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(NoAnswer):
        Client(url, 1)


def run(*arguments: str, key: str | None = KEY, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments], env={"GALERNE_KEY": key}, input=stdin)


def test_the_command_prints_a_table_and_last_a_line_that_it_verifies(server: str) -> None:
    done = run("--url", f"{server}/base/v1")
    assert done.exit_code == 0, done.output
    assert "unlisted routes" in done.output
    last = done.output.rstrip("\n").splitlines()[-1]
    assert KEY not in done.output
    again = run("--check", last)
    assert again.exit_code == 0
    assert "signature good" in again.output
    assert run("--check", "-", stdin=done.output).exit_code == 0
    other = run("--check", last, key="sk-other")
    assert other.exit_code == 1
    assert isinstance(other.exception, BadLine)


def test_json_is_the_line_alone_and_a_reached_target_fails_the_run(server: str) -> None:
    port = server.rpartition(":")[2]
    done = run("--url", server, "--json", "--isolated", "--outside", f"tcp:127.0.0.1:{port}")
    assert done.exit_code == 1
    (only,) = done.output.splitlines()
    result = checked(only, KEY)
    failed = [c["name"] for c in result["checks"] if c["verdict"] == "failed"]
    assert failed == [f"isolated from tcp:127.0.0.1:{port}"]
    # A good signature under a bad result is still a bad result.
    assert run("--check", only).exit_code == 1
    closed = run("--url", server, "--isolated", "--outside", f"tcp:127.0.0.1:{closed_port()}")
    assert closed.exit_code == 0, closed.output


def test_nothing_listens_is_a_failed_run_and_no_traceback() -> None:
    done = run("--url", f"http://127.0.0.1:{closed_port()}")
    assert done.exit_code == 1
    assert "cannot connect" in done.output
    assert checked(done.output.splitlines()[-1], KEY)["outcome"] == "failed"


def test_without_a_key_it_says_which_variable_is_empty() -> None:
    done = run(key=None)
    assert "GALERNE_KEY" in str(done.exception)
