"""Hostile bytes at the front: whatever stands in Authorization, Host, path or method, the answer is a plain refusal."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.api.routes import MODEL_PREFIX, OWN, RELAYED, USAGE
from serving.config import GalerneConfig
from serving.metrics.gateway import GatewayMetrics

NOW_S = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()
KEY, EXPIRED = "sk-press-0123456789", "sk-old-0123456789"
CONFIG = GalerneConfig.model_validate(
    {
        "models": [
            # Nothing waits: what no replica can answer is answered at once.
            {"id": "chat", "source": "fake:chat", "hold": {"requests": 0}},
            {"id": "hidden", "source": "fake:hidden", "hold": {"requests": 0}},
        ],
        "tenants": [
            {
                "id": "press",
                "keys": [
                    {"id": "desk", "sha256": digest(KEY)},
                    {"id": "old", "sha256": digest(EXPIRED), "expires": date(2026, 5, 31)},
                ],
                "models": ["chat"],
            },
            {"id": "other", "keys": [{"id": "desk", "sha256": digest("sk-other")}], "models": ["hidden"]},
        ],
    }
)
# No replica is known: a request that passes every check ends with 503, and none can reach an engine.
GATEWAY = Gateway(CONFIG, engine_token="t", metrics=GatewayMetrics(lambda: 0.0), wall=lambda: NOW_S)
CHAT = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]}).encode()
VALID = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]

HEADER_VALUE = st.binary(max_size=300)
NEAR_KEYS = st.sampled_from([KEY[:-1], KEY + "0", KEY.upper(), f"{KEY} {KEY}", f"{KEY},{KEY}", EXPIRED, digest(KEY)])
SCHEMES = st.sampled_from(["Bearer", "bearer", "Basic", "", "Bearer Bearer", "Bearer\t", "Token"])


def ask(
    method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes = b"", raw: bytes | None = None
) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request at the ASGI door, as uvicorn would hand it in: status, headers, body."""
    sent: list[dict[str, Any]] = []
    queue: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return queue.pop(0) if queue else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": raw if raw is not None else path.encode(errors="surrogateescape"),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(GATEWAY(scope, receive, send))
    start = next(m for m in sent if m["type"] == "http.response.start")
    content = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    return start["status"], dict(start["headers"]), content


def refused(answer: tuple[int, dict[bytes, bytes], bytes], *statuses: int) -> dict[str, Any]:
    """OpenAI's error object of an answer that has one of these statuses."""
    status, _, body = answer
    assert status in statuses, (status, body)
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@settings(max_examples=300)
@given(HEADER_VALUE | st.builds(lambda s, k: f"{s} {k}".encode(), SCHEMES, NEAR_KEYS | st.text(max_size=300)))
def test_no_authorization_but_the_key_itself_opens(value: bytes) -> None:
    scheme, _, key = value.strip(b" \t").partition(b" ")
    if scheme.lower() == b"bearer" and key.strip(b" \t") == KEY.encode():
        return
    error = refused(ask("GET", "/v1/models", [(b"authorization", value)]), 401)
    assert error["code"] == "invalid_api_key"
    assert KEY not in error["message"]
    assert EXPIRED not in error["message"]


def test_two_authorizations_are_not_a_choice() -> None:
    wrong = (b"authorization", b"Bearer sk-wrong")
    right = (b"authorization", f"Bearer {KEY}".encode())
    # Whichever a server before us would take: with two, neither order may open more than the first does.
    statuses = [ask("GET", "/v1/models", pair)[0] for pair in ([wrong, right], [right, wrong])]
    assert statuses.count(200) <= 1


@settings(max_examples=300)
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PRI"]),
    st.text(max_size=60).map(lambda t: "/" + t)
    | st.builds(
        lambda base, tail: base + tail,
        st.sampled_from([*RELAYED, *OWN, MODEL_PREFIX]),
        st.sampled_from(["", "/", "/..", "/../../metrics", "%2f..", "//", ";x", "\x00", "?a", "#", " ", ".json"])
        | st.text(max_size=8),
    ),
)
@example("GET", USAGE)
def test_only_the_listed_paths_answer(method: str, path: str) -> None:
    status, _, body = ask(method, path, VALID, CHAT)
    known = path in RELAYED or path in OWN or path.startswith(MODEL_PREFIX)
    if not known:
        assert status == 404
    # This key has the scopes of a key without any named, and `usage` is none of them.
    assert status in ({403, 405} if path == USAGE else {200, 400, 404, 405, 503})
    if status != 200 and method != "HEAD" and path not in OWN:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert b"hidden" not in body.replace(path.encode(errors="surrogatepass"), b"")


def _without_id(headers: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {name: value for name, value in headers.items() if name != b"x-request-id"}


@settings(max_examples=200)
@given(HEADER_VALUE)
def test_host_decides_nothing_and_is_not_repeated(host: bytes) -> None:
    plain = ask("GET", "/v1/models", [*VALID, (b"host", b"gateway")])
    hostile = ask("GET", "/v1/models", [*VALID, (b"host", host)])
    assert hostile[0] == plain[0] == 200
    assert hostile[2] == plain[2]
    assert _without_id(hostile[1]) == _without_id(plain[1])


@settings(max_examples=200)
@given(HEADER_VALUE)
def test_a_request_id_is_taken_only_when_it_is_harmless(value: bytes) -> None:
    _, headers, _ = ask("GET", "/v1/models", [*VALID, (b"x-request-id", value)])
    returned = headers[b"x-request-id"]
    assert returned.isascii()
    assert b"\r" not in returned
    assert b"\n" not in returned
    assert len(returned) <= 128


@settings(max_examples=150)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), HEADER_VALUE), max_size=8))
def test_any_headers_beside_the_key_are_harmless(extra: list[tuple[bytes, bytes]]) -> None:
    names = {n.lower() for n, _ in VALID} | {b"content-length", b"content-encoding", b"transfer-encoding", b"expect"}
    extra = [(name.lower(), value) for name, value in extra if name.lower() not in names]
    refused(ask("POST", "/v1/chat/completions", VALID + extra, CHAT), 503, 400)


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"9" * 5000, b"\xb2", b"1,1", b" 5", b""])
def test_a_content_length_is_a_number_or_refused(length: bytes) -> None:
    refused(ask("POST", "/v1/chat/completions", [*VALID, (b"content-length", length)], CHAT), 400, 413)


def test_websockets_are_closed_unanswered() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": VALID}
    asyncio.run(GATEWAY(scope, receive, send))
    assert [m["type"] for m in sent] == ["websocket.close"]
