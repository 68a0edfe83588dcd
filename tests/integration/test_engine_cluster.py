"""The whole way with real engines: HAProxy, gateway, vLLM; one cluster for all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from serving.engine.load import Said, Share, read
from tests.integration.running import KEY, OTHER_KEY, RunningCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHAT = "smollm2-135m-instruct"
EMBED = "all-minilm-l6-v2"
PARALLEL = "random-mistral"
ADAPTERS = ("random-style-a", "random-style-b", "random-style-c")
SHARED = Path(os.environ.get("GALERNE_SHARED", Path(__file__).parents[3] / "shared"))
DISCONNECT_BOUND_S = 1.0


@pytest.fixture(scope="module")
def client(engine_cluster: RunningCluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine_cluster.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def prompts() -> list[str]:
    """Twenty first turns of MT-bench; of the same shape where the shared data is absent."""
    path = SHARED / "data" / "mt_bench_question.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row["turns"][0][:1500] for row in rows][::4][:20]
    return [f"Explain in {n + 3} sentences why the sky has colour number {n}." for n in range(20)]


def test_models_are_listed(client: OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {CHAT, EMBED, PARALLEL, *ADAPTERS}
    assert client.models.retrieve(CHAT).id == CHAT


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=16
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 16
    assert answer.usage.prompt_tokens_details is not None


def test_chat_streamed_with_usage(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=CHAT,
            messages=[{"role": "user", "content": "Count to five."}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 12
    assert len(chunks) > 5  # it came in pieces


def test_a_prefix_is_cached_for_its_tenant_alone(client: OpenAI, engine_cluster: RunningCluster) -> None:
    # Longer than several blocks of the KV cache.
    prefix = " ".join(f"Fact {n} is that {n} squared is {n * n}." for n in range(60))

    def cached(of: OpenAI) -> int:
        answer = of.chat.completions.create(
            model=CHAT, messages=[{"role": "user", "content": prefix}], max_tokens=1, extra_body={"cache_salt": "same"}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached(client) == 0
    assert cached(client) > 500
    with OpenAI(base_url=f"{engine_cluster.url}/v1", api_key=OTHER_KEY, max_retries=0, timeout=120) as other:
        assert cached(other) == 0
        assert cached(other) > 500


def test_completions(client: OpenAI) -> None:
    whole = client.completions.create(model=CHAT, prompt="Once upon a time", max_tokens=10, temperature=0)
    parts = client.completions.create(model=CHAT, prompt="Once upon a time", max_tokens=10, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text


def test_embeddings(client: OpenAI) -> None:
    vectors = client.embeddings.create(
        model=EMBED, input=["The cat sat on the mat.", "A cat is on a mat.", "Interest rates rose."]
    ).data
    first, second, third = (v.embedding for v in vectors)
    assert len(first) == 384

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert dot(first, second) > dot(first, third) + 0.3  # it means something


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model=CHAT, input="Say hello.", max_output_tokens=12)
    assert answer.output_text


# So small a model may never end a string by itself.
CITY = {"city": {"type": "string", "maxLength": 20}}


def test_tools(client: OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": CITY, "required": ["city"]},
        },
    }
    answer = client.chat.completions.create(
        model=CHAT,
        temperature=0,
        messages=[{"role": "user", "content": "Weather in Paris?"}],
        tools=[tool],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"  # type: ignore[union-attr]
    assert "city" in json.loads(call.function.arguments)  # type: ignore[union-attr]


def test_json_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=CHAT,
        temperature=0,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        max_tokens=80,
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}


def test_rerank_score_and_tokenize(engine_cluster: RunningCluster) -> None:
    with httpx.Client(base_url=engine_cluster.url, headers={"authorization": f"Bearer {KEY}"}) as http:
        ranked = http.post(
            "/v1/rerank",
            json={"model": EMBED, "query": "cat", "documents": ["Interest rates rose.", "A cat on a mat."]},
        ).json()
        assert ranked["results"][0]["index"] == 1
        score = http.post("/v1/score", json={"model": EMBED, "text_1": "cat", "text_2": "a cat"}).json()
        assert score["data"][0]["score"] > 0.5
        tokens = http.post("/tokenize", json={"model": CHAT, "prompt": "Hello world"}).json()["tokens"]
        text = http.post("/detokenize", json={"model": CHAT, "tokens": tokens}).json()["prompt"]
        assert text == "Hello world"


def test_greedy_tokens_equal_the_engines_own(engine_cluster: RunningCluster, client: OpenAI) -> None:
    headers = engine_cluster.engine_headers()
    with OpenAI(
        base_url=f"{engine_cluster.engine_url(CHAT)}/v1", api_key="unused", default_headers=headers, max_retries=0
    ) as direct:
        for prompt in prompts():
            body = {"model": CHAT, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24}
            body |= {"temperature": 0, "seed": 1}
            expected = direct.chat.completions.create(**body).choices[0].message.content
            assert client.chat.completions.create(**body).choices[0].message.content == expected
            streamed = client.chat.completions.create(**body, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in streamed) == expected


def test_tensor_parallel_model_answers_from_two_workers(engine_cluster: RunningCluster, client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=PARALLEL, messages=[{"role": "user", "content": "bonjour"}], max_tokens=8
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    (engine,) = engine_cluster.state()["engines"][PARALLEL]
    replica = psutil.Process(engine["pid"])
    workers = [p for p in replica.children(recursive=True) if "Worker" in " ".join(p.cmdline())]
    assert len(workers) == 2, [p.cmdline() for p in replica.children(recursive=True)]


def test_adapters_share_a_model_and_make_room_for_one_another(engine_cluster: RunningCluster, client: OpenAI) -> None:
    # One slot in a batch, two in memory: a third loads anew, and answers as it did before.
    def answer(model: str) -> str:
        found = client.completions.create(model=model, prompt="bonjour le monde", max_tokens=8, temperature=0)
        assert found.model == model
        return found.choices[0].text

    first = {name: answer(name) for name in (PARALLEL, *ADAPTERS)}
    assert len(set(first.values())) == len(first)
    assert {name: answer(name) for name in reversed(first)} == first
    with ThreadPoolExecutor(len(ADAPTERS)) as pool:
        # Batched with others an answer may take the other side of a near tie: its name and that it came are asked.
        assert all(pool.map(answer, ADAPTERS))


def test_a_client_that_leaves_frees_the_engine(engine_cluster: RunningCluster) -> None:
    body = {
        "model": CHAT,
        "messages": [{"role": "user", "content": "Write a very long story."}],
        "max_tokens": 1500,
        "stream": True,
        "ignore_eos": True,
    }

    def running() -> float:
        return engine_cluster.engine_metric(CHAT, "vllm:num_requests_running")

    with (
        httpx.Client(timeout=60) as http,
        http.stream(
            "POST",
            f"{engine_cluster.url}/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {KEY}"},
        ) as stream,
    ):
        assert stream.status_code == 200, stream.read()
        # Of 1500 tokens a few are read: the rest is what the engine is to be freed of.
        lines: list[str] = []
        computing = 0.0
        for line in stream.iter_lines():
            lines.append(line)
            computing = running()
            if computing or "error" in line:
                break
        assert computing == 1, (lines[:3], lines[-3:], engine_cluster.log.read_text()[-4000:])
    left_s = time.monotonic()
    while running() > 0:
        # The bound is the promise that is tested; it leaves a loaded machine a wide margin.
        assert time.monotonic() - left_s < 10 * DISCONNECT_BOUND_S
        time.sleep(0.02)
    print(f"\nfreed {1000 * (time.monotonic() - left_s):.0f} ms after the client left")


def test_an_engine_says_its_load_in_every_head(engine_cluster: RunningCluster, client: OpenAI) -> None:
    health = f"{engine_cluster.engine_url(CHAT)}/health"

    def load() -> Said:
        found = read(httpx.get(health).headers["x-galerne-load"].encode())
        assert found is not None
        return found

    idle = load()
    assert idle.others == Share()
    stream = client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "Write a very long story."}],
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    seen = idle
    for _ in stream:
        seen = load()
        if seen.engine.running:
            break
    stream.close()
    assert (seen.engine.running, seen.others.in_flight) == (1, 1)
    assert 0 < seen.engine.kv_use <= 1
    assert seen.others.tokens > 0 == seen.others.waiting_tokens


def test_the_engine_refuses_what_only_it_can_judge(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=CHAT, messages=[{"role": "user", "content": "word " * 3000}], max_tokens=5)
    assert "2048" in caught.value.message


# SmolLM2's embedding has 49,152 rows; MiniLM's 30,522.
BEYOND = [
    ("/v1/completions", {"model": CHAT, "prompt": [49152, 1], "max_tokens": 2}, "prompt"),
    ("/v1/completions", {"model": CHAT, "prompt": [49152, 1], "max_tokens": 2, "stream": True}, "prompt"),
    ("/v1/completions", {"model": CHAT, "prompt": [[1], [2, 49152]], "max_tokens": 2}, "prompt"),
    ("/v1/completions", {"model": CHAT, "prompt": "a", "stop_token_ids": [49152], "min_tokens": 1}, "stop_token_ids"),
    ("/v1/completions", {"model": CHAT, "prompt": "a", "logit_bias": {"49152": 1}}, "logit_bias"),
    ("/v1/completions", {"model": CHAT, "prompt": "a", "allowed_token_ids": [49152]}, "allowed_token_ids"),
    ("/v1/completions", {"model": CHAT, "prompt": "a", "logprob_token_ids": [49152]}, "logprob_token_ids"),
    ("/detokenize", {"model": CHAT, "tokens": [49152]}, "tokens"),
    ("/v1/embeddings", {"model": EMBED, "input": [30522]}, "input"),
    ("/v1/embeddings", {"model": EMBED, "input": [[1], [30522]]}, "input"),
]


def test_token_ids_beyond_the_vocabulary_end_no_engine(engine_cluster: RunningCluster, client: OpenAI) -> None:
    before = {e["replica_id"] for of in engine_cluster.state()["engines"].values() for e in of}
    with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http:
        for path, body, param in BEYOND:
            answer = http.post(f"{engine_cluster.url}{path}", json=body)
            assert answer.status_code == 400, (body, answer.text)
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (param, "integer_above_max_value")
            assert "at most 49151" in error["message"] or "at most 30521" in error["message"]
    # The engine refuses by itself too: a gateway may not have heard yet how many ids its model has.
    with httpx.Client(headers=engine_cluster.engine_headers(), timeout=60) as http:
        for path, body, _ in BEYOND:
            url = engine_cluster.engine_url(str(body["model"]))
            answer = http.post(f"{url}{path}", json=body)
            refused = answer.status_code == 400 or '"code":400' in answer.text.replace(" ", "")
            assert refused or path == "/detokenize", (body, answer.text)
    last = client.completions.create(model=CHAT, prompt=[49151, 1], max_tokens=2)
    assert last.usage is not None
    assert last.usage.prompt_tokens == 2
    assert client.embeddings.create(model=EMBED, input=[30521]).data
    assert before == {e["replica_id"] for of in engine_cluster.state()["engines"].values() for e in of}


def test_a_tenant_sees_its_own_models(engine_cluster: RunningCluster) -> None:
    with OpenAI(base_url=f"{engine_cluster.url}/v1", api_key=OTHER_KEY, max_retries=0) as other:
        assert [m.id for m in other.models.list()] == [CHAT]
        with pytest.raises(openai.NotFoundError) as caught:
            other.embeddings.create(model=EMBED, input="x")
        assert CHAT in caught.value.message


def test_vllm_metrics_are_scrapeable(engine_cluster: RunningCluster) -> None:
    assert engine_cluster.engine_metric(CHAT, "vllm:generation_tokens_total") > 0


ROUTES_PROGRAM = """
import argparse, json
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs
args = argparse.Namespace(**(vars(FrontendArgs()) | vars(AsyncEngineArgs(model="m"))))
app = build_app(args, ("generate", "embed", "score", "classify", "transcription", "realtime", "render"), None)
print(json.dumps([[m, r.path] for r in app.routes for m in sorted(getattr(r, "methods", None) or ())]))
"""
SERVED = {
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank", "/v1/score"),
    *("/tokenize", "/detokenize", "/tokenizer_info", "/v1/models", "/version", "/health", "/ping"),
}
OPEN_TO_THE_NODE = {"/health", "/metrics"}


def test_every_other_route_of_vllm_is_404_and_its_port_asks_for_the_token(engine_cluster: RunningCluster) -> None:
    listed = subprocess.run(
        [sys.executable, "-c", ROUTES_PROGRAM], capture_output=True, text=True, check=True, timeout=240
    ).stdout.splitlines()[-1]
    routes = [(method, path.replace("{response_id}", "resp_1")) for method, path in json.loads(listed)]
    assert len(routes) > 25  # vLLM's own list, not an empty one
    key = {"authorization": f"Bearer {KEY}"}
    with (
        httpx.Client(base_url=engine_cluster.url, headers=key, timeout=30) as front,
        httpx.Client(base_url=engine_cluster.engine_url(CHAT), timeout=30) as engine,
    ):
        for method, path in routes:
            if path not in SERVED:
                for variant in (path, f"{path}/", f"/{path}", f"/v1/..{path}", path.replace("/", "/%2e/", 1)):
                    assert front.request(method, variant, json={}).status_code == 404, (method, variant)
            if path not in OPEN_TO_THE_NODE:
                assert engine.request(method, path, json={}).status_code == 403, (method, path)


# Late: it kills a replica that the other tests need.
def test_zy_a_killed_replica_takes_its_engine_with_it_and_is_replaced(engine_cluster: RunningCluster) -> None:
    (before,) = engine_cluster.state()["engines"][EMBED]
    replica = psutil.Process(before["pid"])
    engine = replica.children(recursive=True)
    assert len(engine) >= 2, engine  # the host and its core, which computes
    replica.kill()
    _, left = psutil.wait_procs(engine, timeout=30)
    assert not left
    deadline_s = time.monotonic() + 300
    while [e["replica_id"] for e in engine_cluster.state()["engines"][EMBED]] in ([], [before["replica_id"]]):
        assert time.monotonic() < deadline_s, "the killed replica was not replaced"
        time.sleep(0.5)


# Last: it kills an engine core that the other tests need.
def test_zz_a_dead_engine_core_is_noticed_and_replaced(engine_cluster: RunningCluster, client: OpenAI) -> None:
    (before,) = engine_cluster.state()["engines"][PARALLEL]
    cores = [p for p in psutil.Process(before["pid"]).children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
    assert cores
    cores[0].kill()
    deadline_s = time.monotonic() + 300
    statuses = set()
    while time.monotonic() < deadline_s:
        try:
            client.completions.create(model=PARALLEL, prompt="bonjour", max_tokens=2)
            (after,) = engine_cluster.state()["engines"][PARALLEL]
            if after["replica_id"] != before["replica_id"]:
                break
        except openai.APIStatusError as error:
            statuses.add(error.status_code)
        time.sleep(1)
    else:
        pytest.fail("the dead engine was not replaced")
    assert statuses <= {502, 503}, statuses  # clear answers in between, nothing else
