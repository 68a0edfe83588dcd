"""The engine class that Ray Serve LLM is given in front of the simulated engine: nothing is added or lost on the way."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.peers.programs.ray_serve_llm import ENV_ENGINE, TOKEN_HEADER, RemoteEngine
from loadtest.request import ENGINE_TOKEN_HEADER
from tests.unit.test_loadtest_session import serving

BODY = json.dumps({"model": "m", "messages": [], "stream": True, "max_tokens": 3}).encode()


def straight(url: str) -> bytes:
    request = urllib.request.Request(f"{url}/v1/chat/completions", BODY, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


def through(url: str, monkeypatch: pytest.MonkeyPatch, ask: Callable[[RemoteEngine], Awaitable[bytes]]) -> bytes:
    monkeypatch.setenv(ENV_ENGINE, url)

    async def run() -> bytes:
        engine = RemoteEngine(None)
        await engine.start()
        try:
            return await ask(engine)
        finally:
            await engine.shutdown()

    return asyncio.run(run())


def test_the_token_goes_by_the_name_that_clients_use() -> None:
    assert ENGINE_TOKEN_HEADER.lower() == TOKEN_HEADER


def test_a_chats_events_are_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(engine: RemoteEngine) -> bytes:
        request = SimpleNamespace(model_dump_json=lambda **_: BODY.decode())
        pieces = [piece async for piece in engine.chat(request, SimpleNamespace(headers={TOKEN_HEADER: "t"}))]
        assert all(piece.endswith("\n\n") for piece in pieces)
        return "".join(pieces).encode()

    with serving() as (url, bodies):
        assert through(url, monkeypatch, ask) == straight(url)
    assert bodies[0] == bodies[1] == json.loads(BODY)


def test_the_app_relays_status_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    async def ask(engine: RemoteEngine) -> bytes:
        parts = [BODY[:5], BODY[5:]]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        app = await engine.build_asgi_app()
        headers = [(b"content-type", b"application/json"), (b"host", b"elsewhere")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        await app({**scope, "query_string": b"", "root_path": ""}, receive, send)
        return b"".join(message.get("body", b"") for message in sent)

    with serving() as (url, bodies):
        assert through(url, monkeypatch, ask) == straight(url)
    assert sent[0]["status"] == 200
    assert (b"content-type", b"text/event-stream") in [
        (name, value.partition(b";")[0]) for name, value in sent[0]["headers"]
    ]
    assert bodies[0] == bodies[1]
