"""What real engines refuse, and what they take of what OpenAI's API has, through the whole way."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import httpx
import openai
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from tests.integration.running import KEY, RunningCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHAT, EMBED, MISTRAL = "smollm2-135m-instruct", "all-minilm-l6-v2", "random-mistral"
COMPLETIONS, COMPLETION, RESPONSES, EMBEDDINGS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
)
USER = {"role": "user", "content": "hi"}
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": CHAT, "messages": [USER], "max_tokens": 2},
    COMPLETION: {"model": CHAT, "prompt": "hi", "max_tokens": 2},
    RESPONSES: {"model": CHAT, "input": "hi", "max_output_tokens": 2},
    EMBEDDINGS: {"model": EMBED, "input": "hi"},
    "/v1/rerank": {"model": EMBED, "query": "hi", "documents": ["a"]},
    "/v1/score": {"model": EMBED, "text_1": "a", "text_2": "b"},
    "/tokenize": {"model": CHAT, "prompt": "hi"},
}
LONG = "word " * 3000
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
# Only the engine's own compiler knows what it does not have.
UNKNOWN = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
FLAT = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
# Route, fields; code and param of the answer.
REFUSED: list[tuple[str, dict[str, Any], str, str | None]] = [
    (COMPLETIONS, {"messages": [{"role": "user", "content": LONG}]}, "context_length_exceeded", "messages"),
    (COMPLETIONS, {"messages": [{"role": "user", "content": LONG * 20}]}, "context_length_exceeded", "messages"),
    (COMPLETION, {"prompt": LONG}, "context_length_exceeded", "prompt"),
    (RESPONSES, {"input": LONG}, "context_length_exceeded", "input"),
    (EMBEDDINGS, {"input": LONG}, "context_length_exceeded", "input"),
    ("/v1/rerank", {"documents": [LONG]}, "context_length_exceeded", "documents"),
    (COMPLETIONS, {"top_p": 0}, "invalid_value", "top_p"),
    (COMPLETIONS, {"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    (COMPLETIONS, {"allowed_token_ids": []}, "invalid_value", "allowed_token_ids"),
    (COMPLETIONS, {"min_tokens": 9}, "invalid_value", "min_tokens"),
    (COMPLETIONS, {"max_tokens": 0}, "invalid_value", "max_tokens"),
    (RESPONSES, {"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    (COMPLETIONS, {"tools": []}, "invalid_value", "tools"),
    (COMPLETIONS, {"tools": [FUNCTION], "tool_choice": "bad"}, "invalid_value", "tool_choice"),
    (COMPLETIONS, {"tool_choice": "auto"}, "invalid_value", "tool_choice"),
    (COMPLETIONS, {"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
    (COMPLETIONS, {"response_format": SCHEMA}, "invalid_value", None),
    (COMPLETIONS, {"response_format": {"type": "wat"}}, "invalid_value", "response_format.type"),
    (COMPLETIONS, {"reasoning_effort": "wat"}, "invalid_value", "reasoning_effort"),
    (COMPLETIONS, {"messages": [{"role": "user", "content": None}]}, "invalid_type", "messages[0].content"),
    (COMPLETION, {"suffix": "x"}, "unsupported_parameter", "suffix"),
    (COMPLETION, {"prompt": ""}, "invalid_value", "prompt"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": UNKNOWN}}}, "invalid_value", None),
    (RESPONSES, {"metadata": {"tags": ["x"]}}, "invalid_type", "metadata.tags"),
    (RESPONSES, {"include": ["wat"]}, "invalid_value", "include[0]"),
    (RESPONSES, {"tool_choice": {"type": "function", "name": "x"}}, "invalid_value", "tool_choice"),
    (EMBEDDINGS, {"dimensions": 100}, "unsupported_parameter", "dimensions"),
    (EMBEDDINGS, {"encoding_format": "wat"}, "invalid_value", "encoding_format"),
    ("/tokenize", {"add_special_tokens": "x"}, "invalid_type", "add_special_tokens"),
]
INTERNALS = (
    "validation error",
    "BadRequestError",
    "Traceback",
    "pydantic",
    "(parameter=",
    "vllm",
    "VLLM",
    "Param",
    "https:",
)


@pytest.fixture(scope="module")
def http(engine_cluster: RunningCluster) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=engine_cluster.url, headers=headers, timeout=120) as made:
        yield made


@pytest.mark.parametrize(("path", "fields", "code", "param"), REFUSED)
def test_what_the_engine_refuses_is_told_as_openai_tells_it(
    http: httpx.Client, path: str, fields: dict[str, Any], code: str, param: str | None
) -> None:
    for stream in ({}, {"stream": True}) if "max" in str(BASE[path]) else ({},):
        answer = http.post(path, json=BASE[path] | fields | stream)
        assert answer.status_code == 400, answer.text
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param), error
        assert not [word for word in INTERNALS if word in error["message"]], error
        assert len(error["message"]) <= 600


def nullable(params: Any) -> list[str]:
    """The fields of a request that OpenAI's own types take a null for."""
    found = []
    for name, hint in get_type_hints(params, include_extras=True).items():
        while get_origin(hint) in (typing.Required, typing.NotRequired, typing.Annotated):
            hint = get_args(hint)[0]  # noqa: PLW2901
        if get_origin(hint) in (typing.Union, types.UnionType) and type(None) in get_args(hint):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("path", "params", "more"),
    [
        (COMPLETIONS, chat_create_params.CompletionCreateParamsBase, ("tools", "tool_choice", "response_format")),
        (COMPLETION, completion_create_params.CompletionCreateParamsBase, ("user",)),
        (RESPONSES, response_create_params.ResponseCreateParamsBase, ("tools", "tool_choice", "text", "user")),
        (EMBEDDINGS, embedding_create_params.EmbeddingCreateParams, ("encoding_format", "dimensions", "user")),
    ],
)
def test_a_null_means_absent_in_every_field_that_openai_has(
    http: httpx.Client, path: str, params: Any, more: tuple[str, ...]
) -> None:
    names = {*nullable(params), *more} - {"max_tokens", "max_output_tokens", "prompt"}
    assert path == EMBEDDINGS or len(names) > 12
    nulls = dict.fromkeys(sorted(names))
    answer = http.post(path, json=BASE[path] | nulls)
    assert answer.status_code == 200, answer.text
    if path == COMPLETIONS:
        # One null beside a value that gives it a meaning: without it there are alternatives.
        logprobs = http.post(path, json=BASE[path] | {"logprobs": True, "top_logprobs": None}).json()
        assert len(logprobs["choices"][0]["logprobs"]["content"]) == 2
    if path == COMPLETION:
        whole = http.post(path, json=BASE[path] | {"max_tokens": None, "ignore_eos": True}).json()
        assert whole["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "arguments", ["[" * 70, "[" * 100_000, '{"a":' * 120 + "1" + "}" * 120, '{"a":' * 900 + "1" + "}" * 900]
)
def test_arguments_of_earlier_tool_calls_are_text(http: httpx.Client, arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "c1", "content": "not JSON"})
    items = [
        USER,
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "not JSON"},
    ]
    for path, fields in ((COMPLETIONS, {"messages": turns}), (RESPONSES, {"input": items})):
        answer = http.post(path, json=BASE[path] | fields)
        assert answer.status_code == 200, answer.text


def test_tools_of_a_coding_agent(http: httpx.Client) -> None:
    namespace = {"type": "namespace", "name": "agents", "description": "Other agents", "tools": [FLAT]}
    tools = [FLAT, namespace, {"type": "web_search", "external_web_access": True}, {"type": "custom", "name": "patch"}]
    body = BASE[RESPONSES] | {"tools": tools, "tool_choice": "auto", "store": False, "reasoning": {"summary": "auto"}}
    body |= {"parallel_tool_calls": True, "include": ["reasoning.encrypted_content"], "client_metadata": {"a": "b"}}
    for stream in (False, True):
        answer = http.post(RESPONSES, json=body | {"stream": stream})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-galerne-left-out"] == "tools[2].type=web_search, tools[3].type=custom"
        assert "response.in" in answer.text if stream else answer.json()["output"] is not None


def test_an_answer_ends_with_the_context_where_more_is_asked_for(http: httpx.Client) -> None:
    turns = [{"role": "user", "content": "bonjour " * 200}]
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"model": MISTRAL, "messages": turns, name: 64_000, "ignore_eos": True}
        answer = http.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-galerne-lowered"] == "max_tokens"
        assert answer.json()["usage"]["total_tokens"] == 512
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    plain = http.post(COMPLETIONS, json={"model": MISTRAL, "messages": turns, "max_tokens": 3})
    assert "x-galerne-lowered" not in plain.headers


def test_a_completion_of_no_token_counts_none(http: httpx.Client) -> None:
    body = BASE[COMPLETION] | {"prompt": "one two three", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = http.post(COMPLETION, json=body)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"] > 0


def test_every_chunk_says_its_usage_where_it_is_asked_for(http: httpx.Client) -> None:
    body = BASE[COMPLETIONS] | {"stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}}
    text = http.post(COMPLETIONS, json=body).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.endswith("}")]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"]["completion_tokens"] <= 4
    without = http.post(COMPLETIONS, json=BASE[COMPLETIONS] | {"stream": True}).text
    assert '"usage"' not in without


def call(name: str = "f", call_id: str = "call_1234567890abc") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}


def result(content: Any = "ok", call_id: str = "call_1234567890abc") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def said(content: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


# As agents send them to models of every family.
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "an empty turn": [USER, said(""), USER],
    "a null turn": [USER, said(None), USER],
    "no parts": [USER, said([]), USER],
    "an empty part": [USER, said([{"type": "text", "text": ""}]), USER],
    "a call": [USER, said(None, call()), result()],
    "a call and text": [USER, said("Let me look.", call()), result(), USER],
    "two calls": [USER, said("", call(), call("g", "call_2")), result(), result("x", "call_2")],
    "short ids": [USER, said(None, call(call_id="c1")), result(call_id="c1")],
    "a result that is empty": [USER, said(None, call()), result("")],
    "a result in parts": [USER, said(None, call()), result([{"type": "text", "text": "ok"}])],
    "a result without its call": [{"role": "system", "content": "s"}, USER, result()],
    "a call without a result": [USER, said(None, call()), USER],
    "two assistant turns": [USER, said("a"), said("b"), USER],
    "two user turns": [USER, USER],
    "as the SDK dumps it": [USER, said("a") | dict.fromkeys(("refusal", "tool_calls", "function_call", "audio")), USER],
    "a reminder": [{"role": "system", "content": "s"}, USER, said("a"), {"role": "system", "content": "Stay brief."}],
    "a reminder behind a result": [USER, said(None, call()), result(), {"role": "system", "content": "Stay brief."}],
    "brackets": [USER, said(None, call() | {"function": {"name": "f", "arguments": "[" * 70}}), result()],
    "more brackets": [USER, said(None, call() | {"function": {"name": "f", "arguments": "[" * 100_000}}), result()],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_mistrals_own_tokenizer_takes_the_histories_of_agents(http: httpx.Client, name: str) -> None:
    body = {"model": MISTRAL, "messages": HISTORIES[name], "max_tokens": 1}
    for more in ({}, {"tools": [FUNCTION], "stream": True}, {"model": CHAT}):
        answer = http.post(COMPLETIONS, json=body | more)
        assert answer.status_code == 200, answer.text
        assert '"error"' not in answer.text
    assert http.post("/tokenize", json={"model": MISTRAL, "messages": HISTORIES[name]}).status_code == 200


def test_mistrals_own_tokenizer_takes_a_responses_history(http: httpx.Client) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "call_id": "call_12345678", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_12345678", "output": "ok"},
        {"role": "user", "content": "And?"},
    ]
    answer = http.post(RESPONSES, json={"model": MISTRAL, "input": items, "tools": [FLAT], "max_output_tokens": 2})
    assert answer.status_code == 200, answer.text


def test_a_typed_client_reads_the_code(engine_cluster: RunningCluster) -> None:
    with openai.OpenAI(base_url=f"{engine_cluster.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=CHAT, messages=[{"role": "user", "content": LONG}], max_tokens=5)
        assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
