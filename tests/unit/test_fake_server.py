"""The fake engine over HTTP: what the OpenAI SDK and a bare socket see of it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jsonschema
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from serving.config import FakeEngineConfig
from serving.engine.fake import build_app

MODEL = "demo"
# As fast as the loop goes: these tests wait for bytes, never for a time.
FAST = {"decode_ms": 0.0, "decode_ms_per_sequence": 0.0, "prefill_tokens_per_s": 1e9}
# A pass never ends within a test: what was admitted stays.
FROZEN = {"decode_ms": 1e9}
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi, which tide is it?"}]
HI_TOKENS = 10
POLL_S = 0.002


@dataclass
class Server:
    """A fake engine on a port of this machine."""

    port: int
    deaths: list[int]
    advance_clock: Callable[[float], None]

    def send(self, method: str, path: str, body: object = b"", **headers: str) -> socket.socket:
        """Sends a request on a connection of its own."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = str(len(encoded))
        head = {"host": "x", "content-type": "application/json", "content-length": length, **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]
        connection.sendall("\r\n".join(lines).encode() + encoded)
        return connection

    def raw(self, method: str, path: str, body: object = b"", **headers: str) -> tuple[int, bytes]:
        """Status and everything after the head, as it came over the connection."""
        with self.send(method, path, body, connection="close", **headers) as connection:
            received = b""
            while part := connection.recv(65536):
                received += part
        head, _, rest = received.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), rest

    def post(self, path: str, body: object) -> tuple[int, Any]:
        status, content = self.raw("POST", path, body)
        return status, json.loads(content)

    def metrics(self) -> dict[str, float]:
        """Every sample without its engine labels; other labels as `name{value}`."""
        samples = {}
        for family in text_string_to_metric_families(self.raw("GET", "/metrics")[1].decode()):
            for sample in family.samples:
                more = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
                samples[sample.name + (f"{{{','.join(more)}}}" if more else "")] = sample.value
        return samples

    def until(self, name: str, value: float) -> None:
        """Waits until a metric has this value."""
        while self.metrics()[name] != value:
            time.sleep(POLL_S)


@contextmanager
def serve(task: str = "generate", **fields: object) -> Iterator[Server]:
    deaths: list[int] = []
    jumps: list[float] = []
    config = FakeEngineConfig.model_validate(fields)
    app = build_app(
        config,
        MODEL,
        task=task,
        clock=lambda: time.monotonic() + sum(jumps),
        exit_process=deaths.append,
    )
    # Silent: some tests break answers on purpose.
    settings = uvicorn.Config(
        app, port=0, ws="none", loop="uvloop", http="httptools", log_level="critical", access_log=False
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(POLL_S)
    try:
        yield Server(server.servers[0].sockets[0].getsockname()[1], deaths, jumps.append)
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with serve(**FAST) as server:
        yield server


@pytest.fixture
def fast(shared: Server) -> Iterator[Server]:
    """A fast engine that every test leaves empty."""
    yield shared
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        shared.until(f"vllm:{gauge}", 0)


@pytest.fixture(scope="module")
def sdk(shared: Server) -> Iterator[openai.OpenAI]:
    with client(shared) as opened:
        yield opened


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def test_chat_whole_and_streamed_are_the_same_answer(fast: Server, sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model=MODEL, messages=HI, max_tokens=12)
    stream = sdk.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert whole.choices[0].finish_reason == "length"
    assert whole.system_fingerprint == "galerne-fake"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.finish_reason for part in parts] == [None] * 12 + ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.prompt_tokens + 12,
    )
    # The second run finds the first one's blocks; 8 tokens of prompt are less than one of 16.
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_long_prompt_is_cached_but_not_for_another_salt(fast: Server, sdk: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "low water " * 100}]
    cached = []
    for salt in ("a", "a", "b", None):
        extra = {"cache_salt": salt} if salt else None
        answer = sdk.chat.completions.create(model=MODEL, messages=long, extra_body=extra)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 240, 0, 0]
    samples = fast.metrics()
    assert samples["vllm:prefix_cache_hits_total"] == 240
    assert samples["vllm:prompt_tokens_by_source_total{local_cache_hit}"] == 240
    assert samples["vllm:request_success_total{stop}"] == 4


def test_several_choices_stream_side_by_side(fast: Server, sdk: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = sdk.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=5, n=3, stream=True, stream_options=options
    )
    chunks = list(stream)
    texts = {0: "", 1: "", 2: ""}
    counts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in chunks[:-1]:
        assert chunk.usage is not None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        counts[choice.index].append(chunk.usage.completion_tokens)
    assert len(set(texts.values())) == 3, "each choice has its own words"
    assert set(map(tuple, counts.values())) == {(0, 1, 2, 3, 4, 5)}
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (HI_TOKENS, 15)


def test_completions_take_texts_and_token_ids(fast: Server, sdk: openai.OpenAI) -> None:
    text = sdk.completions.create(model=MODEL, prompt=["ebb", "flow"], max_tokens=3, n=2)
    ids = sdk.completions.create(model=MODEL, prompt=[1, 2**31 - 1, 3])
    stream = sdk.completions.create(model=MODEL, prompt="ebb", max_tokens=3, stream=True)
    streamed = [chunk.choices[0] for chunk in stream]
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.usage is not None
    assert (text.usage.prompt_tokens, text.usage.completion_tokens) == (4, 12)
    assert ids.usage is not None
    # vLLM's default of this route.
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 16)
    assert ids.choices[0].finish_reason == "length"
    assert "".join(choice.text for choice in streamed) == text.choices[0].text
    assert [choice.finish_reason for choice in streamed] == [None, None, "length"]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "parameters": {
                "type": "object",
                "properties": {"port": {"type": "string"}, "day": {"type": "integer", "minimum": 1}},
                "required": ["port", "day"],
            },
        },
    }
]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "tide"}}, "stop")],
)
def test_tools_are_called_with_arguments_of_their_schema(
    fast: Server, sdk: openai.OpenAI, choice: Any, reason: str
) -> None:
    whole = sdk.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice=choice)
    stream = sdk.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice=choice, stream=True)
    deltas = [chunk.choices[0] for chunk in stream]
    assert whole.choices[0].message.tool_calls is not None
    (call,) = whole.choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])
    functions = [d.delta.tool_calls[0].function for d in deltas if d.delta.tool_calls]
    assert (functions[0].name, call.function.name) == ("tide", "tide")
    assert "".join(function.arguments for function in functions) == call.function.arguments
    assert [whole.choices[0].finish_reason, deltas[-1].finish_reason] == [reason, reason]


def test_auto_tools_are_answered_with_text(fast: Server, sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice="auto")
    assert answer.choices[0].message.content


def test_a_tool_that_the_user_asks_for_is_called_once(fast: Server, sdk: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "Call tide for the port of Brest."}]
    called = sdk.chat.completions.create(model=MODEL, messages=asked, tools=TOOLS).choices[0]
    assert called.message.tool_calls is not None
    (call,) = called.message.tool_calls
    assert (call.function.name, called.finish_reason) == ("tide", "tool_calls")
    result = {"role": "tool", "tool_call_id": call.id, "content": "High at noon; call tide again."}
    after = sdk.chat.completions.create(model=MODEL, messages=[*asked, called.message, result], tools=TOOLS)
    assert after.choices[0].message.content


def test_a_json_schema_is_followed(fast: Server, sdk: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"é": {"enum": ["\"a\\b'", 1]}}, "required": ["é"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    whole = sdk.chat.completions.create(model=MODEL, messages=HI, response_format=wanted)
    cut = sdk.chat.completions.create(model=MODEL, messages=HI, response_format=wanted, max_tokens=2)
    stream = sdk.chat.completions.create(model=MODEL, messages=HI, response_format=wanted, stream=True)
    streamed = "".join([chunk.choices[0].delta.content or "" for chunk in stream])
    content = whole.choices[0].message.content
    assert content is not None
    assert json.loads(content) == {"é": "\"a\\b'"}
    assert streamed == content
    assert whole.choices[0].finish_reason == "stop"
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (content[:8], "length")


def test_responses_whole_and_as_numbered_events(fast: Server, sdk: openai.OpenAI) -> None:
    whole = sdk.responses.create(model=MODEL, input="Hi", instructions="Be short.")
    cut = sdk.responses.create(model=MODEL, input=[{"role": "user", "content": "Hi"}], max_output_tokens=3)
    stream = sdk.responses.create(model=MODEL, input="Hi", instructions="Be short.", stream=True)
    events = list(stream)
    assert (whole.status, cut.status) == ("completed", "incomplete")
    assert cut.usage is not None
    assert cut.usage.output_tokens == 3
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert [e.type for e in events if e.type != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert whole.usage is not None
    assert len(deltas) == whole.usage.output_tokens > 3
    assert events[-1].response.output_text == whole.output_text


def test_responses_call_functions(fast: Server, sdk: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **TOOLS[0]["function"]}, {"type": "web_search"}]  # type: ignore[dict-item]
    asked: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Call tide for Brest."}]}]
    (call,) = sdk.responses.create(model=MODEL, input=asked, tools=tools).output
    named = sdk.responses.create(
        model=MODEL, input="Hi", tools=tools, tool_choice={"type": "function", "name": "tide"}
    ).output
    with sdk.responses.stream(model=MODEL, input=asked, tools=tools) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    assert call.type == named[0].type == streamed.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), TOOLS[0]["function"]["parameters"])
    assert (call.name, streamed.name, streamed.arguments) == ("tide", "tide", call.arguments)
    assert [e.type for e in events if e.type != "response.function_call_arguments.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "High at noon."}
    after = sdk.responses.create(model=MODEL, input=[*asked, call.model_dump(), result], tools=tools)
    assert after.output_text


def test_embeddings_in_both_encodings_and_sizes() -> None:
    with serve("embed", **FAST) as server, client(server) as sdk:
        plain = sdk.embeddings.create(model=MODEL, input=["ebb", "flow"], encoding_format="float")
        packed = sdk.embeddings.create(model=MODEL, input="ebb", encoding_format="base64")
        small = sdk.embeddings.create(model=MODEL, input="ebb", dimensions=8)
        status, refused = server.post("/v1/embeddings", {"input": "x", "dimensions": 4096})
    assert [len(item.embedding) for item in (*plain.data, *small.data)] == [384, 384, 8]
    unpacked = struct.unpack("<384f", base64.b64decode(str(packed.data[0].embedding)))
    assert unpacked == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert plain.usage.prompt_tokens == 4
    assert (status, refused["error"]["param"]) == (400, "dimensions")


def test_scores_and_reranking() -> None:
    with serve("embed", **FAST) as server:
        _, scored = server.post("/v1/score", {"text_1": "high tide", "text_2": ["low tide", "fog"]})
        _, ranked = server.post(
            "/v1/rerank", {"query": "high tide", "documents": ["fog", "low tide", "high tide"], "top_n": 2}
        )
        uneven, _ = server.post("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]})
        lacking, _ = server.post("/v1/score", {"text_1": "a"})
    assert [item["score"] for item in scored["data"]] == [pytest.approx(1 / 3), 0]
    assert [item["index"] for item in ranked["results"]] == [2, 1]
    assert ranked["results"][0]["document"]["text"] == "high tide"
    assert (uneven, lacking) == (400, 400)


def test_tokenize_counts_what_usage_counts(fast: Server) -> None:
    _, counted = fast.post("/tokenize", {"messages": HI})
    _, answered = fast.post("/v1/chat/completions", {"messages": HI})
    _, plain = fast.post("/tokenize", {"prompt": "low water", "return_token_strs": True})
    _, text = fast.post("/detokenize", {"tokens": plain["tokens"][1:]})
    assert counted["count"] == answered["usage"]["prompt_tokens"]
    assert plain["token_strs"] == ["<|bos|>", "low ", "wate", "r"]
    assert text == {"prompt": "low water"}


def test_it_says_that_it_is_simulated(fast: Server, sdk: openai.OpenAI) -> None:
    (model,) = list(sdk.models.list())
    assert (model.id, model.owned_by) == (MODEL, "galerne-fake")
    assert "fake" in fast.raw("GET", "/version")[1].decode()
    assert fast.metrics()["galerne_engine_simulated"] == 1
    assert fast.raw("GET", "/health") == (200, b"")
    assert json.loads((fast.raw("GET", "/load"))[1]) == {"server_load": 0}


LONG = {"messages": HI, "max_tokens": 131072, "ignore_eos": True}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", CHAT, b"{", 400, "body"),
        ("POST", CHAT, b'{"messages":[{"role":"\xff"}]}', 400, "body"),
        ("POST", CHAT, {"messages": "Hi"}, 400, "body.messages"),
        ("POST", CHAT, {"messages": HI, "max_tokens": 0}, 400, "body.max_tokens"),
        ("POST", CHAT, {"messages": HI, "n": 0}, 400, "body.n"),
        ("POST", CHAT, {"messages": HI, "max_tokens": 2, "min_tokens": 3}, 400, "min_tokens"),
        ("POST", CHAT, {"messages": HI, "response_format": {"type": "xml"}}, 400, "response_format"),
        ("POST", CHAT, {"messages": HI, "model": "other"}, 404, "model"),
        ("POST", CHAT, LONG, 400, "input_tokens"),
        ("POST", CHAT, {**LONG, "stream": True}, 400, "input_tokens"),
        ("POST", "/v1/completions", {"prompt": []}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": ["a", 1]}, 400, "prompt"),
        ("POST", "/v1/responses", {"input": "a", "previous_response_id": "r"}, 404, "response_id"),
        ("POST", "/tokenize", {}, 400, "body.prompt"),
        ("POST", "/v1/embeddings", {"input": "not with this task"}, 404, None),
        ("POST", "/health", {}, 405, None),
        ("GET", CHAT, b"", 405, None),
        ("GET", "/v1/files", b"", 404, None),
    ],
)
def test_refusals_have_vllms_shape(
    fast: Server, method: str, path: str, body: object, status: int, param: str | None
) -> None:
    got, content = fast.raw(method, path, body)
    error = json.loads(content)["error"]
    assert (got, error["code"], error["param"]) == (status, status, param)
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_that_is_not_declared_json_is_refused(fast: Server) -> None:
    status, _ = fast.raw("POST", CHAT, {"messages": HI}, **{"content-type": "text/plain"})
    assert status == 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot_and_blocks(stream: bool) -> None:
    with serve(batch_slots=1, **FROZEN) as server:
        body = {"messages": HI, "stream": stream}
        with server.send("POST", CHAT, body):
            server.until("vllm:num_requests_running", 1)
            with server.send("POST", CHAT, body):
                server.until("vllm:num_requests_waiting", 1)
            server.until("vllm:num_requests_waiting", 0)
            assert server.metrics()["vllm:kv_cache_usage_perc"] > 0
        server.until("vllm:num_requests_running", 0)
        assert server.metrics()["vllm:request_success_total{abort}"] == 2
        assert server.metrics()["vllm:kv_cache_usage_perc"] == 0


def test_metrics_count_requests_and_tokens(fast: Server) -> None:
    before = fast.metrics()
    fast.post(CHAT, {"messages": HI, "max_tokens": 7})
    grown = {name: value - before[name] for name, value in fast.metrics().items()}
    assert grown["vllm:generation_tokens_total"] == 7
    assert grown["vllm:prompt_tokens_total"] == HI_TOKENS
    assert grown["vllm:request_success_total{length}"] == 1
    for name, count in (
        ("time_to_first_token_seconds", 1),
        ("inter_token_latency_seconds", 6),
        ("e2e_request_latency_seconds", 1),
        ("request_queue_time_seconds", 1),
        ("request_prefill_time_seconds", 1),
        ("request_decode_time_seconds", 1),
        ("request_prompt_tokens", 1),
        ("request_generation_tokens", 1),
        ("request_params_max_tokens", 1),
    ):
        assert grown[f"vllm:{name}_count"] == count, name
    assert grown["vllm:request_generation_tokens_bucket{5.0}"] == 0
    assert grown["vllm:request_generation_tokens_bucket{10.0}"] == 1


def test_errors_are_played_at_their_rate() -> None:
    with serve(faults={"error_rate": 0.5}, **FAST) as server:
        statuses = [server.raw("POST", CHAT, {"messages": HI})[0] for _ in range(20)]
    assert set(statuses) == {200, 500}
    with serve(faults={"error_rate": 0.5}, **FAST) as server:
        assert [server.raw("POST", CHAT, {"messages": HI})[0] for _ in range(20)] == statuses


def test_a_hanging_request_is_accepted_and_never_answered() -> None:
    with serve(faults={"hang_rate": 1.0}, **FAST) as server:
        with server.send("POST", CHAT, {"messages": HI}) as connection:
            while server.raw("GET", "/load")[1] != b'{"server_load":1}':
                time.sleep(POLL_S)
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        while server.raw("GET", "/load")[1] != b'{"server_load":0}':
            time.sleep(POLL_S)


def test_an_answer_is_cut_after_so_many_bytes() -> None:
    with serve(faults={"cut_after_bytes": 700}, **FAST) as server:
        status, chunked = server.raw("POST", CHAT, {"messages": HI, "stream": True})
        assert status == 200
        assert b"0\r\n\r\n" not in chunked[-5:]
        sizes = [line for line in chunked.split(b"\r\n") if line.startswith(b"data: ") or b"\n\n" in line]
        assert sum(map(len, sizes)) == 700
        with client(server) as sdk:
            stream = sdk.chat.completions.create(model=MODEL, messages=HI, stream=True)
            with pytest.raises(openai.APIConnectionError) as broken:
                list(stream)
        assert "incomplete chunked read" in str(broken.value.__cause__)
        _, whole = server.raw("POST", CHAT, {"messages": HI, "max_tokens": 500, "ignore_eos": True})
        assert len(whole) == 700
        server.until("vllm:num_requests_running", 0)


def test_the_process_ends_after_so_many_bytes_of_all_answers() -> None:
    with serve(faults={"die_after_bytes": 2500}, **FAST) as server:
        sent = []
        while not server.deaths:
            _, body = server.raw("POST", CHAT, {"messages": HI, "max_tokens": 1})
            sent.append(len(body))
    assert server.deaths == [1]
    assert sum(sent) == 2500
    assert len(sent) > 1


def test_a_slow_start_is_unhealthy_until_it_is_over() -> None:
    with serve(faults={"slow_start_s": 3600.0}, **FAST) as server:
        assert server.raw("GET", "/health")[0] == 503
        status, body = server.post(CHAT, {"messages": HI})
        assert (status, body["error"]["code"]) == (503, 503)
        server.advance_clock(3600.0)
        assert server.raw("GET", "/health")[0] == 200
        assert server.post(CHAT, {"messages": HI})[0] == 200


async def test_closing_the_engine_ends_what_runs() -> None:
    app = build_app(FakeEngineConfig.model_validate(FROZEN), MODEL)
    assert not app.healthy
    await app.start()
    assert app.healthy
    body = json.dumps({"messages": HI}).encode()
    events: list[dict[str, object]] = [{"type": "http.request", "body": body}]
    sent: list[object] = []
    asked_again = asyncio.Event()

    async def receive() -> Any:
        if events:
            return events.pop()
        asked_again.set()
        return await asyncio.get_running_loop().create_future()

    async def send(event: object) -> None:
        sent.append(event)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    request = asyncio.create_task(app(scope, receive, send))
    await asked_again.wait()
    await app.aclose()
    await request
    assert sent == []
    assert not app.healthy


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="generate, embed"):
        build_app(FakeEngineConfig(), MODEL, task="classify")
