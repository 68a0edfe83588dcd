"""Where OpenAI's API and an engine's differ, over a socket: what clients send is served, what engines say is told right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from serving.config import FakeEngineConfig
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, KEY, Rig, rig

SMALL = FakeEngineConfig(decode_ms=1, max_model_len=64)
LONG = [{"role": "user", "content": "word " * 200}]
STREAM = CHAT | {"stream": True}
RESPONSES = "/v1/responses"
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def answers_with(status: int, kind: bytes, *bodies: bytes) -> Callable[[Any], Any]:
    """Engines that answer every request so."""

    def wrap(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
            for body in bodies:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})

        return wrapped

    return wrap


def sees(bodies: list[dict[str, Any]]) -> Callable[[Any], Any]:
    """Engines that note what they get."""

    def wrap(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            parts = []

            async def noting() -> Any:
                message = await receive()
                if message["type"] == "http.request":
                    parts.append(message["body"])
                    if not message.get("more_body"):
                        bodies.append(json.loads(b"".join(parts)))
                return message

            posts = scope["type"] == "http" and scope["method"] == "POST"
            await app(scope, noting if posts else receive, send)

        return wrapped

    return wrap


def sdk(made: Rig) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{made.http.base_url}/v1", api_key=KEY, max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_that_does_not_fit_is_told_as_openai_tells_it(stream: bool) -> None:
    async with rig(SMALL) as made, sdk(made) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="chat", messages=LONG, max_tokens=4, stream=stream)
        error = caught.value
        assert (error.code, error.type, error.param) == ("context_length_exceeded", "invalid_request_error", "messages")
        assert "maximum context length is 64 tokens" in error.message
        assert error.response.headers["x-request-id"]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="chat", input="word " * 200)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


async def test_a_simulated_engine_refuses_as_vllm_does() -> None:
    async with rig(SMALL) as made:
        for sent, code, param, told in (
            # What the gateway leaves to engines.
            ({"max_tokens": 0}, "invalid_type", "max_tokens", "Invalid 'max_tokens': Expected int >= 1."),
            ({"tools": [{"type": "function"}], "tool_choice": "required"}, "invalid_value", "tool_choice", None),
            ({"response_format": {"type": "xml"}}, "invalid_value", "response_format", None),
        ):
            answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | sent)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param), error
            assert told is None or error["message"] == told


@pytest.mark.parametrize("apart", [False, True])
async def test_a_stream_that_is_refused_before_its_first_token_is_a_plain_answer(apart: bool) -> None:
    # As vLLM does for what only its sampler judges: the head is out, an error event follows, and `[DONE]`.
    event = (
        b'data: {"error": {"message": "bad ids", "type": "BadRequestError", "param": "logit_bias", "code": 400}}\n\n'
    )
    bodies = [event[:30], event[30:], b"data: [DONE]\n\n"] if apart else [event + b"data: [DONE]\n\n"]
    async with rig(FAST, wrap=answers_with(200, b"text/event-stream", *bodies)) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=STREAM)
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
        assert answer.json()["error"] == {
            "message": "bad ids.",
            "type": "invalid_request_error",
            "param": "logit_bias",
            "code": "invalid_value",
        }
        await made.settled()
        assert made.total("galerne_requests_total", route=COMPLETIONS, status="400") == 1
        assert made.total("galerne_requests_finished_total", outcome="completed") == 1


async def test_an_engines_refusal_of_any_size_is_a_small_answer() -> None:
    body = json.dumps({"error": {"message": "n must be 1. " + "x" * 3_000_000, "code": 400}}).encode()
    async with rig(FAST, wrap=answers_with(400, b"application/json", body)) as made:
        for sent in (CHAT, STREAM):
            answer = await made.http.post(COMPLETIONS, headers=AUTH, json=sent)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("n must be 1. xxx")
            assert len(answer.content) < 1000


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_longer_than_there_is_room_for_ends_with_the_context(stream: bool) -> None:
    async with rig(SMALL) as made:
        body = CHAT | {"max_tokens": 64_000, "ignore_eos": True, "stream": stream}
        if stream:
            body |= {"stream_options": {"include_usage": True}}
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-galerne-lowered"] == "max_tokens"
        found = json.loads(answer.text.split("data: ")[-2] if stream else answer.text)
        assert found["usage"]["total_tokens"] == 64
        assert '"length"' in answer.text
        await made.settled()
        assert made.total("galerne_upstream_errors_total") == 0
        responses = {"model": "chat", "input": "hi", "max_output_tokens": 64_000}
        assert (await made.http.post(RESPONSES, headers=AUTH, json=responses)).headers["x-galerne-lowered"]
        # What fits is not touched; what does not in any case is refused.
        fits = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        refused = await made.http.post(COMPLETIONS, headers=AUTH, json=body | {"messages": LONG})
        assert (fits.status_code, refused.status_code) == (200, 400)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert not {"x-galerne-lowered"} & {*fits.headers, *refused.headers}


async def test_tools_that_do_not_run_here_are_left_out_and_the_answer_says_so() -> None:
    bodies: list[dict[str, Any]] = []
    namespace = {"type": "namespace", "name": "agents", "description": "d", "tools": [FUNCTION]}
    sent = {"model": "chat", "input": "hi", "tool_choice": "auto", "parallel_tool_calls": True, "store": False}
    sent |= {
        "tools": [FUNCTION, namespace, {"type": "web_search", "external_web_access": True}],
        "max_output_tokens": 4,
    }
    async with rig(FAST, wrap=sees(bodies)) as made:
        for stream in (False, True):
            answer = await made.http.post(RESPONSES, headers=AUTH, json=sent | {"stream": stream})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-galerne-left-out"] == "tools[2].type=web_search"
        assert [body["tools"] for body in bodies] == [[FUNCTION, namespace]] * 2
        plain = await made.http.post(RESPONSES, headers=AUTH, json=sent | {"tools": [FUNCTION]})
        assert "x-galerne-left-out" not in plain.headers
        forced = sent | {"tools": [{"type": "web_search"}], "tool_choice": "required"}
        refused = await made.http.post(RESPONSES, headers=AUTH, json=forced)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


async def test_a_null_reaches_no_engine() -> None:
    bodies: list[dict[str, Any]] = []
    async with rig(FAST, wrap=sees(bodies)) as made:
        nulls = {"top_logprobs": None, "service_tier": None, "tools": None, "tool_choice": None, "stop": None}
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | nulls)
        assert answer.status_code == 200, answer.text
        assert not nulls.keys() & bodies[0].keys()
        assert bodies[0]["messages"] == CHAT["messages"]


@pytest.mark.parametrize("brackets", [70, 100_000])
async def test_open_brackets_in_a_tool_calls_arguments_are_text(brackets: int) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "[" * brackets}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "not JSON"},
    ]
    async with rig(FakeEngineConfig(decode_ms=1, kv_blocks=65536, max_model_len=10**6)) as made:
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | {"messages": turns})
        assert answer.status_code == 200, answer.text
