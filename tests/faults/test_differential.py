"""Thousands of random bodies that the gateway accepts, to real engines: none of them is an engine's end, or a 5xx.

GALERNE_FAULT_BODIES sets how many over all routes (5000).
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from serving.admission.bounds import BodyKind
from serving.config import LimitsConfig
from tests import differential
from tests.integration.conftest import CONFIGS, ENGINE_START_TIMEOUT_S
from tests.integration.running import KEY, RunningCluster, cluster

pytestmark = [
    pytest.mark.engine,
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BODIES = int(os.environ.get("GALERNE_FAULT_BODIES", "5000"))
AT_ONCE = 16
EMBED = "all-minilm-l6-v2"
ROUTES = {
    BodyKind.CHAT: "/v1/chat/completions",
    BodyKind.COMPLETION: "/v1/completions",
    BodyKind.RESPONSES: "/v1/responses",
    BodyKind.EMBEDDING: "/v1/embeddings",
    BodyKind.RERANK: "/v1/rerank",
    BodyKind.SCORE: "/v1/score",
    BodyKind.TOKENIZE: "/tokenize",
    BodyKind.DETOKENIZE: "/detokenize",
}
POOLING = {BodyKind.EMBEDDING, BodyKind.RERANK, BodyKind.SCORE}
# As the configuration has them.
LIMITS = LimitsConfig(output_tokens=8, n=2, best_of=2, prompt_logprobs=65536, schema_states=128)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with cluster(
        CONFIGS / "differential.yaml", tmp_path_factory.mktemp("differential"), ENGINE_START_TIMEOUT_S
    ) as made:
        yield made


def replicas(running: RunningCluster) -> set[str]:
    return {engine["replica_id"] for of in running.state()["engines"].values() for engine in of}


def passing() -> Iterator[tuple[str, dict[str, object]]]:
    """Bodies that the gateway accepts, of each route in turn."""
    adapters = differential.classes()
    by_route = [differential.bodies(kind, differential.fields(adapters[kind]), seed=2) for kind in ROUTES]
    for bodies in zip(*by_route, strict=True):
        for (kind, path), body in zip(ROUTES.items(), bodies, strict=True):
            if differential.accepted(kind, json.dumps(body).encode(), LIMITS) is not None:
                yield path, body | {"model": EMBED} if kind in POOLING else body


def test_no_accepted_body_ends_an_engine(running: RunningCluster) -> None:
    before = replicas(running)
    outcomes: Counter[tuple[str, int]] = Counter()
    failed: list[tuple[str, int, str, str]] = []

    with httpx.Client(
        base_url=running.url,
        headers={"authorization": f"Bearer {KEY}"},
        timeout=300,
        limits=httpx.Limits(max_connections=AT_ONCE),
    ) as http:

        def send(request: tuple[str, dict[str, object]]) -> None:
            path, body = request
            answer = http.post(path, json=body)
            while "overloaded" in answer.text and answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                # The gateway's own: a machine that is busy with other things. It reached no engine.
                answer = http.post(path, json=body)
            status = answer.status_code
            # A stream's failure comes as an event, after the head.
            if '"error":{' in answer.text.replace(" ", "") and status == httpx.codes.OK:
                status = 502
            outcomes[path, status] += 1
            if status >= httpx.codes.INTERNAL_SERVER_ERROR:
                failed.append((path, status, json.dumps(body)[:600], answer.text[:300]))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(send, itertools.islice(passing(), BODIES)))
    for (path, status), count in sorted(outcomes.items()):
        print(f"{path} {status}: {count}")
    assert sum(outcomes.values()) == BODIES
    assert not failed, failed[:10]
    assert replicas(running) == before


def resident_mib(running: RunningCluster) -> float:
    """Of the chat model's replica, its engine's front and core together."""
    (engine,) = running.state()["engines"][differential.MODEL]
    replica = psutil.Process(engine["pid"])
    return sum(process.memory_info().rss for process in (replica, *replica.children(recursive=True))) / 2**20


def test_a_harness_gets_log_probabilities_of_its_prompts(running: RunningCluster) -> None:
    # As evaluation harnesses send it; then as much as the configuration takes, in one request.
    largest = [[(i * 7 + j) % 49152 for j in range(2047)] for i in range(16)]
    with httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {KEY}"}, timeout=600) as http:

        def scored(prompt: list[int] | list[list[int]], most: int) -> list[int]:
            body = {"model": differential.MODEL, "prompt": prompt, "echo": True, "max_tokens": most, "logprobs": 1}
            answer = http.post("/v1/completions", json=body | {"temperature": 0})
            assert answer.status_code == httpx.codes.OK, answer.text[:500]
            found = [choice["logprobs"]["token_logprobs"] for choice in answer.json()["choices"]]
            assert all(values[0] is None and all(value <= 0 for value in values[1:]) for values in found)
            return [len(values) for values in found]

        assert scored([1, 2, 3, 4, 5], 0) == [5]
        assert scored([[1, 2, 3], [4, 5]], 1) == [4, 3]
        before = resident_mib(running)
        assert scored(largest, 0) == [2047] * 16
        print(
            f"65,504 log probabilities in one request: {resident_mib(running) - before:.0f} MiB more resident after it"
        )
        refused = http.post(
            "/v1/completions",
            json={
                "model": differential.MODEL,
                "prompt": [*largest, [1] * 17],
                "echo": True,
                "max_tokens": 0,
                "logprobs": 1,
            },
        )
        assert refused.json()["error"]["param"] == "logprobs"
