"""The bill against vLLM's own counters: clients that stay and clients that leave, to the token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections import Counter
from random import Random
from typing import Any

import httpx
import pytest

from tests.integration.running import GALERNE, KEY, RunningCluster

# The release's acceptance is 2,000: `GALERNE_LEDGER_REQUESTS=2000 make test PYTEST_ARGS="-s tests/integration/test_engine_ledger.py"`.
REQUESTS = int(os.environ.get("GALERNE_LEDGER_REQUESTS", "60"))
# Many requests are short ones: it is to take minutes on two cores. Fewer at once than a gateway sheds with.
MOST_WORDS, MOST_TOKENS, AT_ONCE = (20, 24, 8) if REQUESTS <= 60 else (5, 6, 12)
# Of all requests: their clients leave before the end.
LEAVERS = 0.3

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900 + REQUESTS)]

CHAT = "smollm2-135m-instruct"
EMBED = "all-minilm-l6-v2"


def request(rng: Random) -> tuple[str, dict[str, Any]]:
    """One of everything that computes on these models."""
    words = "Tell me about the harbour at night. " * rng.randint(1, MOST_WORDS)
    stream, most = rng.random() < 0.6, rng.randint(1, MOST_TOKENS)
    path = rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"])
    if path == "/v1/embeddings":
        return path, {"model": EMBED, "input": [words[:400]] * rng.randint(1, 3)}
    if path == "/v1/responses":
        return path, {"model": CHAT, "stream": stream, "input": words, "max_output_tokens": most}
    body: dict[str, Any] = {"model": CHAT, "stream": stream, "max_tokens": most, "n": rng.choice([1, 1, 2])}
    if rng.random() < 0.2:
        body["stop"] = [" the"]
    if path == "/v1/completions":
        return path, body | {"prompt": [words] * rng.randint(1, 2)}
    return path, body | {"messages": [{"role": "user", "content": words}]}


async def read(answer: httpx.Response, events: int | None) -> str | None:
    """An answer's text; None where its reader left after so many events."""
    text = ""
    async for chunk in answer.aiter_text():
        text += chunk
        if events is not None and text.count("\n\n") > events:
            return None
    return text


async def test_every_token_has_its_row(engine_cluster: RunningCluster) -> None:
    rng = Random(3)
    room = asyncio.Semaphore(AT_ONCE)
    ended: Counter[str] = Counter()
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=engine_cluster.url, headers=headers, timeout=300) as http:

        async def ask(path: str, body: dict[str, Any], patience_s: float | None, events: int | None) -> None:
            async with room:
                try:
                    async with asyncio.timeout(patience_s), http.stream("POST", path, json=body) as answer:
                        assert answer.status_code == 200, await answer.aread()
                        text = await read(answer, events)
                except TimeoutError:
                    ended["left before the end"] += 1
                    return
                if text is None:
                    ended["left in the middle of a stream"] += 1
                    return
                ended["stayed"] += 1
                if body.get("stream"):
                    # Nobody here asked for it; a response says it in its last event in any case.
                    assert '"usage":' not in text or path == "/v1/responses"

        async with asyncio.TaskGroup() as tasks:
            for _ in range(REQUESTS):
                path, body = request(rng)
                patience_s, events = None, None
                if rng.random() < LEAVERS:
                    # Of a stream after some of its events, of another answer after some of its time.
                    if body.get("stream"):
                        events = rng.randint(0, body.get("max_tokens", body.get("max_output_tokens", 1)) // 2)
                    else:
                        patience_s = rng.uniform(0.01, 0.5)
                tasks.create_task(ask(path, body, patience_s, events))
    assert ended["left before the end"]
    assert ended["left in the middle of a stream"]
    port = engine_cluster.url.rpartition(":")[2]
    done = await asyncio.to_thread(
        subprocess.run,
        [str(GALERNE), "usage", "reconcile", "--port", port, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    balances = json.loads(done.stdout)
    assert len(balances) == 3
    print(f"\n{REQUESTS} requests: {dict(ended)}")
    for balance in balances:
        print(json.dumps(balance))
        assert balance["unexplained"] == {"prompt": 0, "completion": 0}, balance
        # Each engine's first request is its own.
        assert balance["not_through_a_gateway"]["prompt"] > 0
    with contextlib.suppress(KeyError):
        assert sum(balance["ledger"]["completion"] for balance in balances) > REQUESTS
