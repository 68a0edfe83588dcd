"""The bill against vLLM's own counters: clients that stay and clients that leave, to the token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from random import Random
from typing import Any

import httpx
import pytest

from tests.integration.running import GALERNE, KEY, RunningCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHAT = "smollm2-135m-instruct"
EMBED = "all-minilm-l6-v2"
REQUESTS = 60
AT_ONCE = 8


def request(rng: Random) -> tuple[str, dict[str, Any]]:
    """One of everything that computes on these models."""
    words = "Tell me about the harbour at night. " * rng.randint(1, 20)
    stream, most = rng.random() < 0.6, rng.randint(1, 24)
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


async def test_every_token_has_its_row(engine_cluster: RunningCluster) -> None:
    rng = Random(3)
    room = asyncio.Semaphore(AT_ONCE)
    left = 0
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=engine_cluster.url, headers=headers, timeout=300) as http:

        async def ask(path: str, body: dict[str, Any], patience_s: float | None) -> None:
            nonlocal left
            async with room:
                try:
                    async with asyncio.timeout(patience_s):
                        answer = await http.post(path, json=body)
                        assert answer.status_code == 200, answer.text
                        if body.get("stream"):
                            # Nobody here asked for it; a response says it in its last event in any case.
                            assert '"usage":' not in answer.text or path == "/v1/responses"
                except TimeoutError:
                    left += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(REQUESTS):
                leaves = rng.random() < 0.3
                tasks.create_task(ask(*request(rng), rng.uniform(0.05, 2.0) if leaves else None))
    assert left
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
    for balance in balances:
        assert balance["unexplained"] == {"prompt": 0, "completion": 0}, balance
        # Each engine's first request is its own.
        assert balance["not_through_a_gateway"]["prompt"] > 0
    with contextlib.suppress(KeyError):
        assert sum(balance["ledger"]["completion"] for balance in balances) > REQUESTS
