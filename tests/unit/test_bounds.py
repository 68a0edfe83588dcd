"""Every bound on a request body, one by one, and the real requests that must pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.admission.bounds import REFUSED, BodyKind, RequestFacts, read
from serving.config import LimitsConfig
from serving.errors import BadRequest

OUTPUT_TOKENS = 32768
LIMITS = LimitsConfig(output_tokens=OUTPUT_TOKENS)
MESSAGES = [{"role": "user", "content": "Say hello."}]
BASE: dict[BodyKind, dict[str, Any]] = {
    BodyKind.CHAT: {"model": "m", "messages": MESSAGES},
    BodyKind.COMPLETION: {"model": "m", "prompt": "Once"},
    BodyKind.EMBEDDING: {"model": "m", "input": "text"},
    BodyKind.RESPONSES: {"model": "m", "input": "Say hello."},
    BodyKind.RERANK: {"model": "m", "query": "q", "documents": ["a", "b"]},
    BodyKind.SCORE: {"model": "m", "text_1": "q", "text_2": ["a", "b"]},
    BodyKind.TOKENIZE: {"model": "m", "prompt": "text"},
    BodyKind.DETOKENIZE: {"model": "m", "tokens": [1, 2, 3]},
}
GENERATING = (BodyKind.CHAT, BodyKind.COMPLETION, BodyKind.RESPONSES)
FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def facts(kind: BodyKind, **fields: Any) -> RequestFacts:
    return read(kind, json.dumps(BASE[kind] | fields).encode(), LIMITS)


def refusal(kind: BodyKind, body: bytes | dict[str, Any], limits: LimitsConfig = LIMITS) -> BadRequest:
    text = body if isinstance(body, bytes) else json.dumps(BASE[kind] | body).encode()
    with pytest.raises(BadRequest) as caught:
        read(kind, text, limits)
    assert caught.value.message.endswith(".")
    assert caught.value.code
    return caught.value


# Requests of the OpenAI documentation and of well-known clients, shortened.
ACCEPTED: list[tuple[BodyKind, dict[str, Any]]] = [
    *((kind, {}) for kind in BodyKind),
    (BodyKind.CHAT, {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "top_p": 1}),
    (BodyKind.CHAT, {"n": None, "stop": None, "logit_bias": None, "stream": None, "tools": None, "seed": None}),
    (BodyKind.CHAT, {"logprobs": True, "top_logprobs": 20, "logit_bias": {"50256": -100}, "seed": -(2**63)}),
    (BodyKind.CHAT, {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "weather"}}}),
    (BodyKind.CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}),
    (BodyKind.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, "there"]}]}),
    (
        BodyKind.CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather in Brest?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Brest"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"},
            ]
        },
    ),
    (BodyKind.CHAT, {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 1}),
    (BodyKind.CHAT, {"documents": [{"title": "t", "text": "x"}], "reasoning_effort": "low", "user": "u"}),
    (BodyKind.CHAT, {"cache_salt": "mine", "metadata": {"a": "b"}, "service_tier": "auto", "store": True}),
    (BodyKind.CHAT, {"chat_template": None, "priority": 0, "prompt_logprobs": 0}),
    (BodyKind.CHAT, {"use_beam_search": False}),
    (BodyKind.COMPLETION, {"prompt": ["a", "b"], "echo": True, "logprobs": 5, "best_of": 2, "suffix": "end"}),
    (BodyKind.COMPLETION, {"prompt": [1, 2, 3], "stop": ["\n", "###"], "return_tokens_as_token_ids": True}),
    (BodyKind.COMPLETION, {"prompt": [[1, 2], [3]], "truncate_prompt_tokens": -1, "add_special_tokens": False}),
    (BodyKind.COMPLETION, {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}}),
    (BodyKind.COMPLETION, {"prompt": "a", "structured_outputs": {"json": '{"type": "object"}'}}),
    (BodyKind.EMBEDDING, {"input": ["a"] * 2048, "encoding_format": "base64", "dimensions": 256}),
    (BodyKind.EMBEDDING, {"input": [[1, 2], [3]]}),
    (BodyKind.RESPONSES, {"input": [{"role": "user", "content": "Hi"}], "instructions": "Be brief."}),
    (
        BodyKind.RESPONSES,
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": None},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "12"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "store": False,
            "max_output_tokens": 100,
            "text": {"format": {"type": "text"}},
        },
    ),
    (BodyKind.SCORE, {"text_1": None, "text_2": None, "queries": "q", "documents": ["a"]}),
    (BodyKind.RERANK, {"documents": ["d"] * 2048, "top_n": 3}),
    (BodyKind.TOKENIZE, {"prompt": None, "messages": MESSAGES, "add_generation_prompt": True}),
]


@pytest.mark.parametrize(("kind", "fields"), ACCEPTED)
def test_real_requests_pass(kind: BodyKind, fields: dict[str, Any]) -> None:
    assert facts(kind, **fields).model == "m"


def test_facts_of_a_stream() -> None:
    found = facts(BodyKind.CHAT, stream=True, stream_options={"include_usage": True}, n=3, max_tokens=5)
    assert found == RequestFacts("m", True, True, len("Say hello."), 5, 3)


def test_usage_counts_only_in_a_stream() -> None:
    assert not facts(BodyKind.CHAT, stream_options={"include_usage": True}).include_usage


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert facts(BodyKind.CHAT, max_tokens=9, max_completion_tokens=7).max_output_tokens == 7
    assert facts(BodyKind.CHAT).max_output_tokens is None
    assert facts(BodyKind.COMPLETION).max_output_tokens == 16
    assert facts(BodyKind.RESPONSES, max_output_tokens=8).max_output_tokens == 8
    assert facts(BodyKind.EMBEDDING).max_output_tokens == 0


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        (BodyKind.COMPLETION, {"prompt": "hé"}, 3),
        (BodyKind.COMPLETION, {"prompt": ["hé", "a"]}, 4),
        (BodyKind.COMPLETION, {"prompt": [1, 2]}, 8),
        (BodyKind.EMBEDDING, {"input": [[1, 2], [3]]}, 12),
        (BodyKind.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]}, 3),
        (BodyKind.RESPONSES, {"input": [{"content": "ab"}], "instructions": "c"}, 3),
        (BodyKind.RERANK, {"query": "q", "documents": ["a", "bc"]}, 4),
    ],
)
def test_prompt_bytes(kind: BodyKind, fields: dict[str, Any], expected: int) -> None:
    assert facts(kind, **fields).prompt_bytes == expected


INTEGERS: list[tuple[str, int, int]] = [
    ("n", 1, LIMITS.n),
    ("best_of", 1, LIMITS.best_of),
    ("max_tokens", 0, OUTPUT_TOKENS),
    ("max_completion_tokens", 0, OUTPUT_TOKENS),
    ("max_output_tokens", 0, OUTPUT_TOKENS),
    ("min_tokens", 0, OUTPUT_TOKENS),
    ("thinking_token_budget", -1, OUTPUT_TOKENS),
    ("top_logprobs", 0, LIMITS.logprobs),
    ("prompt_logprobs", 0, LIMITS.logprobs),
    ("top_k", -1, 2**31 - 1),
    ("seed", -(2**63), 2**63 - 1),
    ("truncate_prompt_tokens", -1, 2**31 - 1),
    ("priority", 0, 0),
]
NUMBERS: list[tuple[str, float, float]] = [
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 10),
    ("length_penalty", -10, 10),
]


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize(("name", "least", "most"), INTEGERS + NUMBERS)
def test_numbers_stay_in_range(kind: BodyKind, name: str, least: float, most: float) -> None:
    for value in (least, most):
        assert facts(kind, **{name: value}).model == "m"
    for value in (least - 1, most + 1, -(10**30), 10**30):
        error = refusal(kind, {name: value})
        assert error.param == name
        assert f"'{name}'" in error.message


@pytest.mark.parametrize(
    ("kind", "fields", "param", "part"),
    [
        (BodyKind.CHAT, {"stream": "yes"}, "stream", "a boolean, but got a string"),
        (BodyKind.CHAT, {"stream": 1}, "stream", "a boolean, but got an integer"),
        (BodyKind.CHAT, {"n": "3"}, "n", "an integer, but got a string"),
        (BodyKind.CHAT, {"n": True}, "n", "an integer, but got a boolean"),
        (BodyKind.CHAT, {"n": 1.5}, "n", "an integer, but got a number"),
        (BodyKind.CHAT, {"temperature": "hot"}, "temperature", "a number, but got a string"),
        (BodyKind.CHAT, {"messages": "hi"}, "messages", "a list, but got a string"),
        (BodyKind.CHAT, {"messages": [1]}, "messages[0]", "an object, but got an integer"),
        (BodyKind.CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "a string or a list"),
        (BodyKind.CHAT, {"tools": [1]}, "tools[0]", "an object, but got an integer"),
        (BodyKind.CHAT, {"stop": {}}, "stop", "a string or a list"),
        (BodyKind.CHAT, {"stream_options": {"include_usage": "x"}}, "stream_options.include_usage", "a boolean"),
        (BodyKind.CHAT, {"logprobs": 5}, "logprobs", "a boolean"),
        (BodyKind.COMPLETION, {"logprobs": 21}, "logprobs", "at most 20"),
        (BodyKind.COMPLETION, {"logprobs": -1}, "logprobs", "at least 0"),
        (BodyKind.COMPLETION, {"prompt": {}}, "prompt", "a list of token ids"),
        (BodyKind.COMPLETION, {"prompt": []}, "prompt", "none of them empty"),
        (BodyKind.COMPLETION, {"prompt": [1, "a"]}, "prompt[1]", "an integer, but got a string"),
        (BodyKind.COMPLETION, {"prompt": [1, 2**31]}, "prompt[1]", "at most 2147483647"),
        (BodyKind.COMPLETION, {"prompt": [-1]}, "prompt[0]", "at least 0"),
        (BodyKind.EMBEDDING, {"input": [{"role": "user"}]}, "input", "a list of strings"),
        (BodyKind.EMBEDDING, {"dimensions": 0}, "dimensions", "at least 1"),
        (BodyKind.EMBEDDING, {"dimensions": 65537}, "dimensions", "at most 65536"),
        (BodyKind.CHAT, {"model": None}, "model", "Missing"),
        (BodyKind.CHAT, {"model": ""}, "model", "Missing"),
        (BodyKind.CHAT, {"model": "m" * 257}, "model", "at most 256 bytes"),
        (BodyKind.CHAT, {"messages": None}, "messages", "Missing"),
        (BodyKind.CHAT, {"messages": []}, "messages", "at least 1"),
        (BodyKind.CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "Missing"),
        (BodyKind.COMPLETION, {"prompt": None}, "prompt", "Missing"),
        (BodyKind.EMBEDDING, {"input": None}, "input", "Missing"),
        (BodyKind.RESPONSES, {"input": None}, "input", "Missing"),
        (BodyKind.RERANK, {"query": None}, "query", "Missing"),
        (BodyKind.RERANK, {"documents": None}, "documents", "Missing"),
        (BodyKind.SCORE, {"text_2": None}, "text_2", "Missing"),
        (BodyKind.TOKENIZE, {"prompt": None}, "prompt", "Missing"),
        (BodyKind.DETOKENIZE, {"tokens": None}, "tokens", "Missing"),
        (BodyKind.CHAT, {"stop": ["x"] * 17}, "stop", "at most 16 strings"),
        (BodyKind.CHAT, {"stop": "é" * 129}, "stop[0]", "at most 256 bytes, but got 258"),
        (BodyKind.CHAT, {"bad_words": ["x"] * 17}, "bad_words", "at most 16 strings"),
        (BodyKind.CHAT, {"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024 entries"),
        (BodyKind.CHAT, {"allowed_token_ids": [2**31]}, "allowed_token_ids[0]", "at most 2147483647"),
        (BodyKind.CHAT, {"logprob_token_ids": [1] * 21}, "logprob_token_ids", "at most 20 entries"),
        (BodyKind.CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024 entries"),
        (BodyKind.CHAT, {"logit_bias": {str(i): 1 for i in range(9000)}}, "logit_bias", "at most 65536 bytes"),
        (BodyKind.CHAT, {"logit_bias": {"5": 100.5}}, "logit_bias[...]", "at most 100.0"),
        (
            BodyKind.CHAT,
            {"repetition_detection": {"max_pattern_size": 257}},
            "repetition_detection.max_pattern_size",
            "256",
        ),
        (BodyKind.CHAT, {"messages": MESSAGES * 2049}, "messages", "at most 2048 messages"),
        (BodyKind.CHAT, {"documents": [{"text": "x"}] * 65}, "documents", "at most 64"),
        (BodyKind.CHAT, {"tools": [FUNCTION] * 129}, "tools", "at most 128 tools"),
        (BodyKind.CHAT, {"tools": [{"function": {"d": "x" * 65536}}]}, "tools[0]", "at most 65536 bytes"),
        (BodyKind.CHAT, {"tools": [{"function": {"d": "x" * 60000}}] * 9}, "tools", "at most 524288 bytes"),
        (BodyKind.CHAT, {"tool_choice": {"x": "x" * 65536}}, "tool_choice", "at most 65536 bytes"),
        (BodyKind.CHAT, {"response_format": {"x": "x" * 65536}}, "response_format", "at most 65536 bytes"),
        (BodyKind.CHAT, {"structured_outputs": {"regex": "x" * 65536}}, "structured_outputs", "at most 65536 bytes"),
        (BodyKind.CHAT, {"guided_regex": "x" * 65536}, "guided_regex", "at most 65536 bytes"),
        (BodyKind.RESPONSES, {"text": {"x": "x" * 65536}}, "text", "at most 65536 bytes"),
        (BodyKind.CHAT, {"structured_outputs": {"json": "[" * 65}}, "structured_outputs.json", "deeper than 64"),
        (
            BodyKind.CHAT,
            {"structured_outputs": {"structural_tag": '{"a":' * 65}},
            "structured_outputs.structural_tag",
            "deeper than 64",
        ),
        (BodyKind.COMPLETION, {"prompt": ["a"] * 65}, "prompt", "at most 64 prompts"),
        (BodyKind.COMPLETION, {"prompt": [[1]] * 65}, "prompt", "at most 64 prompts"),
        (BodyKind.COMPLETION, {"prompt": [1] * 131073}, "prompt", "at most 131072 tokens"),
        (BodyKind.COMPLETION, {"prompt": [[1] * 70000] * 2}, "prompt", "at most 131072 tokens"),
        (BodyKind.EMBEDDING, {"input": ["a"] * 2049}, "input", "at most 2048 prompts"),
        (BodyKind.RERANK, {"documents": ["a"] * 2049}, "documents", "at most 2048"),
        (BodyKind.SCORE, {"text_2": ["a"] * 2049}, "text_2", "at most 2048"),
        (BodyKind.DETOKENIZE, {"tokens": [1] * 131073}, "tokens", "at most 131072 tokens"),
        (BodyKind.RESPONSES, {"input": [{"content": "x"}] * 2049}, "input", "at most 2048 items"),
        (BodyKind.RESPONSES, {"background": True}, "background", "not stored"),
        (BodyKind.RESPONSES, {"store": True}, "store", "not stored"),
        (BodyKind.RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id", "not stored"),
        (BodyKind.RESPONSES, {"conversation": "c"}, "conversation", "not stored"),
        (BodyKind.RESPONSES, {"prompt": {"id": "p"}}, "prompt", "not stored"),
        (BodyKind.RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "not stored"),
    ],
)
def test_refused_by_name(kind: BodyKind, fields: dict[str, Any], param: str, part: str) -> None:
    error = refusal(kind, fields)
    assert error.param == param
    assert part in error.message
    assert param in error.message


@pytest.mark.parametrize("kind", BodyKind)
@pytest.mark.parametrize("name", REFUSED)
def test_dangerous_fields_are_refused_everywhere(kind: BodyKind, name: str) -> None:
    for value in ({}, [], "", 0, False, {"x": 1}):
        error = refusal(kind, {name: value})
        assert error.param == name
        assert error.code == "unsupported_parameter"


MEDIA_PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
    {"type": "input_image", "image_url": "data:"},
    {"type": "video_url", "video_url": {"url": "x"}},
    {"type": "audio_url", "audio_url": {"url": "x"}},
    {"type": "input_audio", "input_audio": {"data": "x"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "input_file", "file_url": "x"},
    {"type": "image_embeds", "image_embeds": "x"},
    {"type": "prompt_embeds", "data": "x"},
    {"type": "prompt_embeds"},
    # The engine looks for a media key where the type is absent, and where a uuid stands beside any type.
    {"image_url": "x"},
    {"type": None, "image_url": "x"},
    {"type": "text", "text": "x", "uuid": "u"},
    {"type": "text", "text": "x", "uuid": "u", "image_url": "x"},
    {"type": "text", "text": "x", "image_url": None},
    {"type": "Text", "text": "x"},
    {},
]


@pytest.mark.parametrize("part", MEDIA_PARTS)
def test_only_text_parts_pass(part: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "look"}, part]
    messages = [{"role": "user", "content": content}]
    for kind in (BodyKind.CHAT, BodyKind.TOKENIZE):
        assert str(refusal(kind, {"messages": messages}).param).startswith("messages[0].content[1].")
    embedding = json.dumps({"model": "m", "messages": messages}).encode()
    assert str(refusal(BodyKind.EMBEDDING, embedding).param).startswith("messages[0].content[1].")
    for name in ("content", "output"):
        error = refusal(BodyKind.RESPONSES, {"input": [{"role": "user", name: content}]})
        assert str(error.param).startswith(f"input[0].{name}[1].")
    assert refusal(BodyKind.RERANK, {"documents": [{"content": content}]}).param
    assert refusal(BodyKind.RERANK, {"query": {"content": content}}).param
    assert refusal(BodyKind.SCORE, {"text_1": {"content": content}}).param


@pytest.mark.parametrize("tool", ["web_search", "mcp", "code_interpreter", "file_search", "computer", "custom"])
def test_only_function_tools_are_kept(tool: str) -> None:
    for kind in (BodyKind.CHAT, BodyKind.RESPONSES, BodyKind.TOKENIZE):
        assert facts(kind, tools=[FUNCTION, {"type": tool}]).left_out == ((1, tool),)
        assert facts(kind, tools=[FUNCTION]).prompt_bytes == facts(kind, tools=[FUNCTION, {"type": tool}]).prompt_bytes


@pytest.mark.parametrize("item", ["mcp_call", "computer_call_output", "image_generation_call", "web_search_call"])
def test_only_stateless_items_pass(item: str) -> None:
    assert refusal(BodyKind.RESPONSES, {"input": [{"type": item}]}).param == "input[0].type"


def _with(text: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"hi"}],' + text + b"}"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "ends too early"),
        (b"{", "ends too early"),
        (b"[]", "must be a JSON object, but it is a list"),
        (b"null", "must be a JSON object, but it is null"),
        (b"model=m", "not valid JSON"),
        (_with(b'"temperature":NaN'), "NaN and Infinity are not JSON"),
        (_with(b'"temperature":-Infinity'), "not valid JSON"),
        (_with(b'"unknown":NaN'), "NaN and Infinity are not JSON"),
        (_with(b'"temperature":1e999'), "out of range"),
        (_with(b'"n":' + b"9" * 5000), "out of range"),
        (_with(b'"user":"\\ud800"'), "unpaired surrogate"),
        (_with(b'"\\ud800":1'), "unpaired surrogate"),
        (_with(b'"user":"\xff"'), "not valid UTF-8"),
        (_with(b'"user":"\xed\xa0\x80"'), "not valid UTF-8"),
        (b"\xef\xbb\xbf" + _with(b'"a":1'), "byte order mark"),
        (_with(b'"a":1').decode().encode("utf-16"), "not valid"),
        (_with(b'"a":1').decode().encode("utf-16-le"), "not valid JSON"),
        (_with(b'"a":1,'), "not valid JSON"),
        (_with(b'"a":01'), "not valid JSON"),
        (_with(b'"a":1') + b"x", "not valid JSON"),
        (_with(b'"user":"\x01"'), "not valid JSON"),
        (b"[" * (4 * 1024 * 1024), "deeper than 64 levels"),
        (b'{"a":' * 1_000_00, "deeper than 64 levels"),
        (_with(b'"unknown":' + b"[" * 64 + b"]" * 64), "deeper than 64 levels"),
        (_with(b'"unknown":[' + b"0," * 65536 + b"0]"), "more than 65536 values"),
        (_with(b'"unknown":[' + b"[]," * 65536 + b"0]"), "more than 65536 values"),
        (b'"' * 1_000_000, "more than 65536 values"),
    ],
)
def test_malformed_bodies(body: bytes, part: str) -> None:
    assert part in refusal(BodyKind.CHAT, body).message


@pytest.mark.parametrize(
    "body",
    [
        _with(b'"chat_templat\\u0065":"x"'),
        _with(b'"\\u0063hat_template":"x"'),
        _with(b'"chat_template":null,"chat_template":"x"'),
        _with(b'"n":1,"n":100'),
        _with(b'"\\u006e":100'),
        _with(b'"n":1,"\\u006e":100'),
        b'{"model":"m","messages":[{"role":"user","content":"x","content":[{"type":"image_url"}]}]}',
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","ty\\u0070e":"image_url"}]}]}',
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"image\\u005furl"}]}]}',
    ],
)
def test_keys_are_read_as_the_engine_reads_them(body: bytes) -> None:
    assert json.loads(body)["model"] == "m"
    refusal(BodyKind.CHAT, body)


def test_the_last_of_a_repeated_key_counts() -> None:
    body = b'{"model":"a","prompt":"x","model":"b","n":2,"n":3,"stream":true,"stream":false}'
    found = read(BodyKind.COMPLETION, body, LIMITS)
    assert (found.model, found.n, found.stream) == ("b", 3, False)
    assert json.loads(body) == {"model": "b", "prompt": "x", "n": 3, "stream": False}


def test_names_differ_by_case() -> None:
    # The engine ignores them, as it does any unknown field.
    assert read(BodyKind.CHAT, _with(b'"N":100,"Chat_Template":"x"'), LIMITS).n == 1


def test_brackets_in_text_are_no_nesting() -> None:
    text = '[{"\\' * 40_000
    assert facts(BodyKind.CHAT, messages=[{"role": "user", "content": text}]).prompt_bytes == len(text)


@pytest.mark.parametrize("run", range(1, 6))
def test_backslashes_hide_no_nesting(run: int) -> None:
    # "\\\\" ends a string, '\\"' does not: whoever mixes them up takes the nesting for text, or the text for nesting.
    edge = "\\" * run
    deep = json.loads("[" * 64 + "]" * 64)
    for before in (edge, edge + '"', '"' + edge):
        assert "deeper than 64" in refusal(BodyKind.CHAT, {"a": before, "b": deep, "c": before}).message
        assert facts(BodyKind.CHAT, a=before, b="[" * 99, c=before).model == "m"


def test_configured_limits_count() -> None:
    limits = LimitsConfig(n=2, json_depth=4, prompt_tokens=3)
    assert "at most 2" in refusal(BodyKind.CHAT, {"n": 3}, limits).message
    assert "deeper than 4" in refusal(BodyKind.CHAT, {"x": [[[[]]]]}, limits).message
    assert "at most 3 tokens" in refusal(BodyKind.COMPLETION, {"prompt": [1] * 4}, limits).message


def test_no_message_repeats_what_was_sent() -> None:
    for fields in (
        {"n": "s3cret"},
        {"s3cret": float("nan")},
        {"logit_bias": {"s3cret": 1000}},
        {"model": "s3cret" * 99},
    ):
        assert "s3cret" not in refusal(BodyKind.CHAT, fields).message


@pytest.mark.parametrize(
    ("kind", "fields", "uses"),
    [
        (BodyKind.COMPLETION, {"prompt": "text"}, ()),
        (BodyKind.COMPLETION, {"prompt": [7, 9, 8]}, (("prompt", 9),)),
        (BodyKind.COMPLETION, {"prompt": [[7], [9, 8]]}, (("prompt", 9),)),
        (BodyKind.EMBEDDING, {"input": [[7], [9, 8]]}, (("input", 9),)),
        (BodyKind.DETOKENIZE, {"tokens": [7, 9]}, (("tokens", 9),)),
        (BodyKind.CHAT, {"stop_token_ids": [4, 5], "min_tokens": 1}, (("stop_token_ids", 5),)),
        (BodyKind.CHAT, {"allowed_token_ids": [4, 5]}, (("allowed_token_ids", 5),)),
        (BodyKind.CHAT, {"logprob_token_ids": [4, 5], "logprobs": True}, (("logprob_token_ids", 5),)),
        (BodyKind.CHAT, {"logit_bias": {"4": 1, "05": 1}}, (("logit_bias", 5),)),
        (BodyKind.RESPONSES, {"logit_bias": {"4": 1}}, (("logit_bias", 4),)),
    ],
)
def test_every_field_that_names_token_ids_is_read(kind: BodyKind, fields: dict[str, Any], uses: Any) -> None:
    assert facts(kind, **fields).token_id_uses == uses


@pytest.mark.parametrize("key", ["x", "-1", " 1", "1_0", "\u0661", "1.0", "", "1" * 11])
def test_keys_of_logit_bias_are_token_ids(key: str) -> None:
    assert refusal(BodyKind.CHAT, {"logit_bias": {key: 1}}).param == "logit_bias"


@pytest.mark.parametrize("kind", [BodyKind.CHAT, BodyKind.RESPONSES])
def test_without_a_limit_an_answer_may_be_as_long_as_the_model_has_room(kind: BodyKind) -> None:
    name = "max_output_tokens" if kind is BodyKind.RESPONSES else "max_tokens"
    for most in (64_000, 2**31 - 1):
        body = json.dumps(BASE[kind] | {name: most}).encode()
        assert read(kind, body, LimitsConfig()).max_output_tokens == most
    assert refusal(kind, {name: 2**31}, LimitsConfig()).param == name


@pytest.mark.parametrize(
    ("kind", "fields", "computed"),
    [
        (BodyKind.COMPLETION, {"echo": True}, False),
        (BodyKind.COMPLETION, {"logprobs": 5}, False),
        (BodyKind.COMPLETION, {"echo": True, "logprobs": 0}, True),
        (BodyKind.COMPLETION, {"prompt": [1] * 131072, "echo": True, "logprobs": 1, "max_tokens": 0}, True),
        (BodyKind.COMPLETION, {"prompt_logprobs": 0}, True),
        (BodyKind.CHAT, {"echo": True}, True),
        (BodyKind.CHAT, {"logprobs": True, "top_logprobs": 5}, False),
        (BodyKind.CHAT, {"prompt_logprobs": 20}, True),
    ],
)
def test_what_has_the_prompts_log_probabilities_computed(
    kind: BodyKind, fields: dict[str, Any], computed: bool
) -> None:
    assert facts(kind, **fields).prompt_logprobs is computed


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (BodyKind.COMPLETION, {"prompt": [1] * 131072, "echo": True, "logprobs": 2}, "logprobs"),
        (BodyKind.COMPLETION, {"prompt": [[1] * 60000] * 2, "echo": True, "logprobs": 2}, "logprobs"),
        (BodyKind.COMPLETION, {"prompt": [1] * 20000, "echo": True, "logprobs": 1, "n": 8}, "logprobs"),
        (BodyKind.COMPLETION, {"prompt": "x" * 100_000, "prompt_logprobs": 20}, "prompt_logprobs"),
        (BodyKind.CHAT, {"messages": [{"role": "user", "content": "x" * 300_000}], "echo": True}, "top_logprobs"),
    ],
)
def test_log_probabilities_of_a_prompt_are_bounded_by_their_number(
    kind: BodyKind, fields: dict[str, Any], param: str
) -> None:
    assert refusal(kind, fields).param == param
