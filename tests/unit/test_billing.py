"""One row for every accepted request, right to the token as the engine counted, whoever left and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from serving.admission.bounds import RequestFacts
from serving.api.exchange import Exchange
from serving.config import FakeEngineConfig, FakeFaults
from serving.engine.fake import build_app
from serving.engine.private_server import PrivateServer
from serving.metering.best_known import most_lost
from serving.metering.ledger import Ledger
from serving.metering.row import Row
from serving.metering.settings import LedgerSettings
from serving.routing.replicas import Endpoint
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, TOKEN, Rig, rig

REQUESTS = 2000
AT_ONCE = 48


class Kept(Ledger):
    """A ledger that keeps its rows here as well."""

    def __init__(self, directory: Path, flush_s: float = 60.0) -> None:
        super().__init__(LedgerSettings("sqlite:///unused.db", directory, flush_s, 2**20), "g", program=None)
        self.rows: list[Row] = []

    @property
    def lag_s(self) -> float:
        return 0.0  # nobody waits for rows that no writer takes

    def record(self, row: Row) -> None:
        self.rows.append(row)
        super().record(row)


@pytest.fixture
def ledger(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


async def complete(ledger: Kept, number: int) -> list[Row]:
    """The rows, when so many are there."""
    async with asyncio.timeout(20):
        while len(ledger.rows) < number:
            await asyncio.sleep(0.01)
    assert len(ledger.rows) == number
    return ledger.rows


async def counted(server: PrivateServer) -> dict[str, float]:
    """The engine's own counters of tokens."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{server.port}/metrics")).text
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name in {"vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_cached_total"}:
            found[name.removeprefix("vllm:").removesuffix("_total")] = float(rest.rpartition(" ")[2])
    return found


@contextlib.asynccontextmanager
async def vectors(made: Rig) -> AsyncIterator[PrivateServer]:
    """An embedding engine beside the others."""
    fake = build_app(FAST, "acme/vectors", task="embed")
    await fake.start()
    server = PrivateServer(fake, host="127.0.0.1", token=TOKEN)
    await server.start()
    made.gateway.update_replicas("acme/vectors", (Endpoint("v0", server.host, server.port),))
    try:
        yield server
    finally:
        await server.stop()


def request(rng: Random) -> tuple[str, dict[str, Any]]:
    """One of everything that computes."""
    words = "some words of a prompt " * rng.randint(1, 60)
    most = rng.randint(1, 40)
    path = rng.choice([COMPLETIONS, COMPLETIONS, "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank"])
    body: dict[str, Any] = {"model": "chat", "stream": rng.random() < 0.6, "max_tokens": most}
    if path == "/v1/embeddings":
        return path, {"model": "acme/vectors", "input": [words] * rng.randint(1, 3)}
    if path == "/v1/rerank":
        return path, {"model": "acme/vectors", "query": "words", "documents": [words] * rng.randint(1, 3)}
    if path == "/v1/responses":
        return path, {"model": "chat", "stream": body["stream"], "input": words, "max_output_tokens": most}
    if body["stream"] and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": rng.random() < 0.5, "continuous_usage_stats": rng.random() < 0.5}
    if rng.random() < 0.3:
        body["n"] = rng.randint(2, 3)
    if path == "/v1/completions":
        return path, body | {"prompt": [words] * rng.randint(1, 2)}
    return path, body | {"messages": [{"role": "user", "content": words}]}


async def test_the_bill_is_what_the_engines_counted(ledger: Kept) -> None:
    rng = Random(11)
    async with rig(FakeEngineConfig(decode_ms=1), FakeEngineConfig(decode_ms=2), ledger=ledger) as made:
        async with vectors(made) as embedding:
            room = asyncio.Semaphore(AT_ONCE)

            async def ask(path: str, body: dict[str, Any], patience_s: float | None, events: float) -> None:
                async with room:
                    with contextlib.suppress(TimeoutError):
                        async with (
                            asyncio.timeout(patience_s),
                            made.http.stream("POST", path, headers=AUTH, json=body) as answer,
                        ):
                            assert answer.status_code == 200, await answer.aread()
                            async for part in answer.aiter_bytes():
                                events -= part.count(b"\n\n")
                                if events < 0:
                                    return

            async with asyncio.TaskGroup() as tasks:
                for _ in range(REQUESTS):
                    path, body = request(rng)
                    patience_s, events = None, math.inf
                    if rng.random() < 0.3:
                        # Of a stream after some of its events, of another answer after some of its time.
                        if body.get("stream"):
                            events = rng.randint(0, body.get("max_tokens", body.get("max_output_tokens", 1)) // 2)
                        else:
                            patience_s = rng.uniform(0.001, 0.12)
                    tasks.create_task(ask(path, body, patience_s, events))
            await made.settled()
            # A client that left before its request was read is no accepted request.
            rows = await complete(ledger, int(made.total("galerne_requests_accepted_total")))
            engines = [await counted(server) for server in [*made.engines, embedding]]
    left = [row for row in rows if row.outcome == "cancelled"]
    # Six hundred leave; the busier the machine, the more of them when all had been written.
    assert len(left) > REQUESTS / 40
    assert any(row.completion_tokens for row in left)
    assert all(row.exact for row in rows)
    assert {row.status for row in left} == {499}
    assert len({row.id for row in rows}) == len(rows)
    assert sum(row.completion_tokens for row in rows) == sum(engine["generation_tokens"] for engine in engines)
    # The only cause of a difference: an engine counts a prompt once for each of its answers.
    assert sum(row.counted_prompt_tokens for row in rows) == sum(engine["prompt_tokens"] for engine in engines)
    several = [row for row in rows if row.counted_prompt_tokens != row.prompt_tokens]
    assert several
    assert all(row.counted_prompt_tokens > row.prompt_tokens for row in several)
    for kind, value in (
        ("prompt", sum(row.prompt_tokens for row in rows)),
        ("cached", sum(row.cached_tokens for row in rows)),
        ("completion", sum(row.completion_tokens for row in rows)),
    ):
        assert made.total("galerne_tokens_total", kind=kind) == value


async def test_a_row_says_who_what_and_how(ledger: Kept) -> None:
    async with rig(FAST, ledger=ledger) as made:
        for body in (CHAT, CHAT | {"stream": True}):
            answer = await made.http.post(COMPLETIONS, headers=AUTH | {"x-request-id": "mine"}, json=body)
            assert answer.status_code == 200
            assert "usage" not in answer.text or not body.get("stream")
        first, second = await complete(ledger, 2)
    assert (first.tenant, first.key_id, first.model, first.route) == ("press", "a", "chat", COMPLETIONS)
    assert (first.request_id, first.engine, first.status, first.outcome) == ("mine", "r0", 200, "completed")
    assert (first.stream, second.stream) == (False, True)
    assert first.prompt_tokens == second.prompt_tokens > 0
    assert first.completion_tokens == second.completion_tokens > 0
    assert first.ttft_s is not None
    assert first.ttft_s <= first.duration_s


@pytest.mark.parametrize(
    ("path", "body", "status", "outcome"),
    [
        ("/tokenize", {"model": "chat", "prompt": "some text"}, 200, "completed"),
        (COMPLETIONS, CHAT | {"stream_options": {"include_usage": True}, "max_tokens": 0}, 400, "completed"),
        (COMPLETIONS, CHAT | {"model": "secret"}, 503, "rejected"),
    ],
)
async def test_what_computes_nothing_costs_nothing(
    ledger: Kept, path: str, body: dict[str, Any], status: int, outcome: str
) -> None:
    async with rig(FAST, ledger=ledger) as made:
        headers = {"authorization": "Bearer sk-other"}
        assert (await made.http.post(path, headers=headers, json=body)).status_code == status
        (row,) = await complete(ledger, 1)
    assert (row.status, row.outcome, row.exact) == (status, outcome, True)
    assert (row.prompt_tokens, row.completion_tokens) == (0, 0)


async def test_a_token_that_nobody_asked_for_is_counted_and_not_billed(ledger: Kept) -> None:
    """vLLM writes one for `max_tokens: 0`; the row keeps its count, so that ledger and engines' counters agree."""
    said = b'{"choices":[{"text":"a few words"}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}'

    def echoing(app: Any) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["path"] != "/v1/completions":
                await app(scope, receive, send)
                return
            await receive()
            length = (b"content-length", b"%d" % len(said))
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": said})

        return answer

    async with rig(FAST, ledger=ledger, wrap=echoing) as made:
        body = {"model": "chat", "prompt": "a few words", "max_tokens": 0, "echo": True}
        answer = await made.http.post("/v1/completions", headers=AUTH, json=body)
        assert answer.json()["usage"]["completion_tokens"] == 0
        await made.settled()
        (row,) = ledger.rows
        assert (row.completion_tokens, row.computed_completion_tokens, row.exact) == (0, 1, True)


async def test_refused_requests_have_no_row(ledger: Kept) -> None:
    async with rig(FAST, ledger=ledger) as made:
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"n": 99})).status_code == 400
        assert (await made.http.post(COMPLETIONS, json=CHAT)).status_code == 401
    assert not ledger.rows


async def test_an_engine_that_broke_off_is_asked(ledger: Kept) -> None:
    broken = FakeEngineConfig(decode_ms=1, faults=FakeFaults(cut_after_bytes=2000))
    async with rig(broken, ledger=ledger) as made:
        await made.http.post(
            COMPLETIONS, headers=AUTH, json=CHAT | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        )
        (row,) = await complete(ledger, 1)
        engine = await counted(made.engines[0])
    assert (row.exact, row.outcome) == (True, "failed")
    assert (row.prompt_tokens, row.completion_tokens) == (engine["prompt_tokens"], engine["generation_tokens"])


async def test_an_engine_that_is_gone_leaves_a_guess(tmp_path: Path) -> None:
    ledger = Kept(tmp_path, flush_s=0.4)
    async with rig(FakeEngineConfig(decode_ms=5), ledger=ledger) as made:
        body = CHAT | {"stream": True, "max_tokens": 3000, "ignore_eos": True}
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as stream:
            lines = stream.aiter_lines()
            for _ in range(12):
                await anext(lines)
            await made.engines[0].stop()
            rest = [line async for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stream_cut"
        (row,) = await complete(ledger, 1)
    assert (row.exact, row.outcome) == (False, "failed")
    # Four bytes a token, and an event a token.
    assert row.prompt_tokens == 3
    assert 4 <= row.completion_tokens < 300


async def test_rows_that_wait_for_an_engine_are_made_when_the_gateway_goes(ledger: Kept) -> None:
    async with rig(FakeEngineConfig(faults=FakeFaults(hang_rate=1.0)), ledger=ledger) as made:
        asked = asyncio.create_task(made.http.post(COMPLETIONS, headers=AUTH, json=CHAT))
        while not made.engines[0].gate.in_flight:
            await asyncio.sleep(0.01)
        asked.cancel()
        await made.settled()
        made.gateway.close()
    assert len(ledger.rows) == 1


@pytest.mark.parametrize(
    ("most", "n", "prompts", "counted", "exact", "expected"),
    [
        (6, 2, 1, 40, True, (40, 12)),
        (None, 1, 1, 40, True, (40, None)),
        (6, 1, 1, 40, False, (None, 6)),
        # Its prompt was not computed there; elsewhere it may have been.
        (6, 1, 1, 0, True, (None, 6)),
        (6, 2, 3, 40, True, (40, 36)),
        (0, 1, 3, 40, True, (40, 0)),
    ],
)
def test_what_a_lost_attempt_cost_at_most(
    most: int | None, n: int, prompts: int, counted: int, exact: bool, expected: tuple[int | None, int | None]
) -> None:
    facts = RequestFacts("chat", True, False, 8, most, n, prompts)
    exchange = Exchange("chat", "/v1/completions", b"", "id", started_s=0.0, facts=facts)
    assert most_lost(exchange, counted, exact=exact) == expected
