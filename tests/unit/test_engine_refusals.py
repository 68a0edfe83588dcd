"""What an engine refuses, as clients hear it: texts of vLLM 0.29, recorded from one that runs, and texts of no engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.engine_refusals import MOST_BYTES, MOST_CHARACTERS, PROMPTS, event_status, of_event, translated
from serving.errors import UpstreamFailed

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, RERANK, SCORE, TOKENIZE = "/v1/embeddings", "/v1/rerank", "/v1/score", "/tokenize"
CONTEXT = (
    "This model's maximum context length is 2048 tokens. However, you requested {} output tokens and your prompt contains "
    "{} input tokens, for a total of {} tokens. Please reduce the length of the input prompt or the number of "
    "requested output tokens. (parameter=input_tokens, value=9)"
)
CHARACTERS = (
    "This model's maximum context length is 256 tokens. However, you requested 0 output tokens and your prompt contains "
    "15000 characters (more than 4608 characters, which is the upper bound for 256 input tokens). Please reduce the "
    "length of the input prompt or the number of requested output tokens. (parameter=input_text, value=15000)"
)
# Route, message, param of the engine's; code, param, message for the client.
RECORDED: list[tuple[str, str, str | None, str, str | None, str]] = [
    (
        CHAT,
        CONTEXT.format(2, "at least 2047", "at least 2049"),
        "input_tokens",
        "context_length_exceeded",
        "messages",
        "This model's maximum context length is 2048 tokens. However, you requested at least 2049 tokens (at least 2047 "
        "in the messages, 2 in the completion). Please reduce the length of the messages or completion.",
    ),
    (
        EMBEDDINGS,
        CHARACTERS,
        "input_text",
        "context_length_exceeded",
        "input",
        "This model's maximum context length is 256 tokens. However, your input resulted in more tokens than that. "
        "Please reduce the length of the input.",
    ),
    (
        RESPONSES,
        "The engine prompt length 2048 exceeds the max_model_len 2048. Please reduce prompt.",
        "input",
        "context_length_exceeded",
        "input",
        "This model's maximum context length is 2048 tokens. However, your input resulted in 2048 tokens. "
        "Please reduce the length of the input.",
    ),
    (
        CHAT,
        "max_tokens=5000 cannot be greater than max_model_len=max_total_tokens=2048. Please request fewer output tokens. "
        "(parameter=max_tokens, value=5000)",
        "max_tokens",
        "context_length_exceeded",
        "max_tokens",
        "Invalid 'max_tokens': this model's maximum context length is 2048 tokens, but 5000 were requested for the "
        "completion alone.",
    ),
    (
        CHAT,
        "top_p must be in (0, 1], got 0.0. (parameter=top_p, value=0.0)",
        "top_p",
        "invalid_value",
        "top_p",
        "top_p must be in (0, 1], got 0.0.",
    ),
    (
        CHAT,
        "Requested sample logprobs of 30, which is greater than max allowed: 20 (parameter=logprobs, value=30)",
        "logprobs",
        "invalid_value",
        "top_logprobs",
        "Requested sample logprobs of 30, which is greater than max allowed: 20.",
    ),
    (
        CHAT,
        "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)",
        "tool_choice",
        "invalid_value",
        "tool_choice",
        "When using 'tool_choice', 'tools' must be set.",
    ),
    (
        CHAT,
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        None,
        "unsupported_parameter",
        "tool_choice",
        "This model is not set up to choose tools by itself. Name a function in 'tool_choice', or ask the operator to set "
        "a tool parser for the model.",
    ),
    (
        CHAT,
        'Grammar error: Unimplemented keys: ["uniqueItems"]',
        None,
        "invalid_value",
        None,
        'Grammar error: Unimplemented keys: ["uniqueItems"].',
    ),
    (CHAT, "n must be at least 1, got 0.", None, "invalid_value", "n", "n must be at least 1, got 0."),
    (
        COMPLETION,
        "suffix is not currently supported",
        None,
        "unsupported_parameter",
        "suffix",
        "suffix is not currently supported.",
    ),
    (
        EMBEDDINGS,
        "Model 'm' does not support Matryoshka embeddings; dimensions must be unset (received dimensions=100).",
        None,
        "unsupported_parameter",
        "dimensions",
        "Model 'm' does not support Matryoshka embeddings; dimensions must be unset (received dimensions=100).",
    ),
    (
        COMPLETION,
        "Token id 60000 is out of vocabulary",
        None,
        "invalid_value",
        "prompt",
        "Token id 60000 is out of vocabulary.",
    ),
    (
        CHAT,
        "1 validation error:\n  {'type': 'int_parsing', 'loc': ('body', 'n'), 'msg': 'Input should be a valid integer, "
        "unable to parse string as an integer', 'input': 'x'}",
        "body.n",
        "invalid_type",
        "n",
        "Invalid 'n': Input should be a valid integer, unable to parse string as an integer.",
    ),
    (
        CHAT,
        "11 validation errors:\n  {'type': 'missing', 'loc': ('body', 'messages', 0, 'ChatCompletionDeveloperMessageParam', "
        "'role'), 'msg': 'Field required', 'input': {'content': 'x'}}\n  {'type': 'missing'}",
        "body.messages.0.ChatCompletionDeveloperMessageParam.role",
        "missing_required_parameter",
        "messages[0].role",
        "Missing required parameter: 'messages[0].role'.",
    ),
    (
        CHAT,
        "1 validation error:\n  {'type': 'literal_error', 'loc': ('body', 'reasoning_effort'), 'msg': \"Input should be "
        "'none' or 'max'\", 'input': 'wat', 'ctx': {'expected': \"'none' or 'max'\"}}",
        "body.reasoning_effort",
        "invalid_value",
        "reasoning_effort",
        "Invalid 'reasoning_effort': Input should be 'none' or 'max'.",
    ),
    (
        RESPONSES,
        "1 validation error for ResponsesResponse\nbackground\n  Input should be a valid boolean [type=bool_type, "
        "input_value=None, input_type=NoneType]\n    For further information visit https://errors.pydantic.dev/2.14/v/x",
        None,
        "invalid_type",
        "background",
        "Invalid 'background': Input should be a valid boolean.",
    ),
    (
        CHAT,
        "7 validation errors for ValidatorIterator\n0.ChatCompletionContentPartTextParam.text\n  Field required "
        "[type=missing, input_value={'type': 'text'}, input_type=dict]\n    For further information visit https://x.dev",
        None,
        "missing_required_parameter",
        None,
        "Invalid request: a required field is missing.",
    ),
    (
        RERANK,
        "At least one text_pair element must be given",
        None,
        "invalid_value",
        None,
        "At least one text_pair element must be given.",
    ),
]
INTERNALS = ("validation error", "Traceback", "File ", "0x", "pydantic", "parameter=", "vllm", "Param", "https:", "--")


def answer(message: Any, param: Any = None, code: Any = 400, kind: str = "BadRequestError") -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


@pytest.mark.parametrize(("path", "message", "engines_param", "code", "param", "told"), RECORDED)
def test_what_vllm_says_is_told_in_openais_way(
    path: str, message: str, engines_param: str | None, code: str, param: str | None, told: str
) -> None:
    body = answer(message, engines_param)
    for refusal in (translated(400, body, path), of_event(b"data: " + body + b"\n\ndata: [DONE]\n\n", path)):
        error = refusal.error
        assert (error.status, error.type, error.code, error.param) == (400, "invalid_request_error", code, param)
        assert error.message == told
        assert not [word for word in INTERNALS if word in error.message]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (CONTEXT.format(2000, 100, 2100), True),
        (CONTEXT.format(2000, "at least 49", "at least 2049"), True),
        # The prompt alone does not fit, or no answer was asked for.
        (CONTEXT.format(2000, 2100, 4100), False),
        (CHARACTERS, False),
        ("max_tokens=5000 cannot be greater than max_model_len=max_total_tokens=2048.", True),
        ("top_p must be in (0, 1], got 0.0.", False),
    ],
)
def test_when_a_shorter_answer_would_do(message: str, expected: bool) -> None:
    assert translated(400, answer(message), CHAT).answer_too_long is expected


def test_a_model_that_the_engine_does_not_have() -> None:
    error = translated(404, answer("The model `a.b-c` does not exist.", "model", 404, "NotFoundError"), CHAT).error
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert error.message == "The model 'a.b-c' does not exist."


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("bad value in /opt/app/vllm/x.py: 5", "bad value in : 5."),
        ("vllm.exceptions.VLLMValidationError: seed is odd (parameter=seed, value=1)", "seed is odd."),
        ("object <vllm.Foo object at 0x7f00aa> is odd", "object <the engine object> is odd."),
        (
            "<class 'vllm.x.Sampler'> cannot. Set VLLM_FOO=1 or --allow-foo to do it. Use less",
            "Sampler cannot. Use less.",
        ),
        ("See https://docs.vllm.ai/x for more", "See for more."),
        ("", "The engine refused the request."),
        (None, "The engine refused the request."),
    ],
)
def test_an_unknown_text_keeps_its_sentence_and_leaks_nothing(message: str | None, told: str) -> None:
    error = translated(400, answer(message), CHAT).error
    assert (error.code, error.message) == ("invalid_value", told)


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[]", b'{"error": "x"}', b'{"error": null}', b"\xff", b'{"a":' * 9999]
)
def test_a_body_of_no_engine_is_a_refusal_still(body: bytes) -> None:
    error = translated(400, body, CHAT).error
    assert (error.status, error.code) == (400, "invalid_value")


def test_what_the_engine_says_to_the_gateway_is_no_clients_fault() -> None:
    for status in (401, 403, 405, 415):
        assert isinstance(translated(status, answer("who are you"), CHAT).error, UpstreamFailed)


def test_an_answer_that_is_longer_than_what_is_read_keeps_its_first_sentence() -> None:
    body = answer("n must be at least 1, got 0.\n" + "x" * MOST_BYTES)[:MOST_BYTES]
    error = translated(400, body, CHAT).error
    assert error.message.startswith("n must be at least 1, got 0. xxx")
    assert len(error.message) <= MOST_CHARACTERS + 1


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"error": {"code": 400}}\n\n', 400),
        (b'data: {"error": {"code": 500}}\n\ndata: [DONE]\n\n', 500),
        (b'data: {"error": {"code": "x"}}\n\n', None),
        (b'data: {"error": {"code": true}}\n\n', None),
        (b'data: {"error": {"code": 200}}\n\n', None),
        (b'data: {"error": null}\n\n', None),
        (b'data: {"error"', None),
    ],
)
def test_the_status_of_an_error_event(event: bytes, status: int | None) -> None:
    assert event_status(event) == status


@given(
    st.text() | st.binary().map(lambda b: b.decode("latin-1")), st.none() | st.text(), st.sampled_from(sorted(PROMPTS))
)
def test_nothing_raises(message: str, param: str | None, path: str) -> None:
    error = translated(400, answer(message, param), path).error
    assert error.message
    assert error.code
    assert len(error.message) <= MOST_CHARACTERS + 1
