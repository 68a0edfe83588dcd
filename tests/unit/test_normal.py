"""What a body loses on its way to an engine, and that one which needs nothing of it is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.admission import normal
from serving.admission.bounds import BodyKind, RequestFacts, read
from serving.config import LimitsConfig
from serving.errors import BadRequest

LIMITS = LimitsConfig()
MESSAGES = [{"role": "user", "content": "Say hello."}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FLAT = {"type": "function", "name": "f", "parameters": {"type": "object"}}
NAMESPACE = {"type": "namespace", "name": "agents", "description": "d", "tools": [FLAT]}


def applied(kind: BodyKind, fields: dict[str, Any]) -> tuple[dict[str, Any], RequestFacts]:
    """What the engine gets of a body, and what was found in it."""
    own = {"input": "hi"} if kind is BodyKind.RESPONSES else {"messages": MESSAGES}
    body = json.dumps({"model": "m", **own, **fields}).encode()
    facts = read(kind, body, LIMITS)
    sent = normal.applied(body, facts)
    assert read(kind, sent, LIMITS).left_out == ()
    return json.loads(sent), facts


def test_a_body_that_needs_nothing_is_left_alone() -> None:
    for body in (
        b'{ "model" : "m", "messages":[{"role":"user","content":"hi"}] , "temperature":1.00}',
        # A null inside of what the client composes is a value.
        b'{"model":"m","messages":[{"role":"assistant","content":null},{"role":"user","content":"null"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"response_format":{"enum":[null]}}',
    ):
        assert normal.applied(body, read(BodyKind.CHAT, body, LIMITS)) is body


def test_a_null_means_absent() -> None:
    body = (
        b'{"model":"m","top_logprobs":null,"messages":[{"role":"user","content":"\\u00e9"}],"seed":1e0,'
        b'"stream_options":{"include_usage":null},"metadata":{"a":null},"\\u006eew":null}'
    )
    with pytest.raises(BadRequest):
        read(BodyKind.CHAT, body, LIMITS)
    body = body.replace(b"1e0", b"1")
    sent = normal.applied(body, read(BodyKind.CHAT, body, LIMITS))
    assert json.loads(sent) == {
        "model": "m",
        "messages": [{"role": "user", "content": "\u00e9"}],
        "seed": 1,
        "stream_options": {},
        "metadata": {"a": None},
    }
    # Every value that stays keeps its bytes.
    assert b"\\u00e9" in sent
    # Of a key that stands twice the last counts, here as everywhere.
    twice = b'{"model":"m","messages":[],"messages":[{"role":"user","content":"a"}],"n":2,"n":null}'
    assert json.loads(normal.applied(twice, read(BodyKind.CHAT, twice, LIMITS))) == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
    }


@pytest.mark.parametrize(
    "tool",
    [
        *("web_search", "web_search_preview_2025_03_11", "file_search", "code_interpreter", "image_generation"),
        *("mcp", "local_shell", "shell", "computer", "computer_use_preview", "custom", "apply_patch", "tool_search"),
    ],
)
def test_tools_that_do_not_run_here_are_left_out_and_named(tool: str) -> None:
    for kind, function in ((BodyKind.CHAT, FUNCTION), (BodyKind.RESPONSES, FLAT), (BodyKind.TOKENIZE, FUNCTION)):
        fields = {"tools": [function, {"type": tool, "name": "x"}], "tool_choice": "auto", "parallel_tool_calls": True}
        sent, facts = applied(kind, fields)
        assert sent["tools"] == [function]
        assert sent["tool_choice"] == "auto"
        assert normal.named(facts.left_out) == f"tools[1].type={tool}"
        # With none left there is nothing to choose.
        sent, facts = applied(kind, fields | {"tools": [{"type": tool}]})
        assert not {"tools", "tool_choice", "parallel_tool_calls"} & sent.keys()
        assert normal.named(facts.left_out) == f"tools[0].type={tool}"


def test_several_functions_under_one_name_are_kept_where_the_engine_takes_them() -> None:
    sent, facts = applied(BodyKind.RESPONSES, {"tools": [FLAT, NAMESPACE]})
    assert sent["tools"] == [FLAT, NAMESPACE]
    assert facts.left_out == ()
    sent, facts = applied(BodyKind.CHAT, {"tools": [FUNCTION, NAMESPACE]})
    assert sent["tools"] == [FUNCTION]
    assert normal.named(facts.left_out) == "tools[1].type=namespace"


def test_what_is_left_out_makes_a_header_whatever_it_is_called() -> None:
    assert normal.named(((3, "a\r\nx: y"), (5, "\u00e9"))) == "tools[3].type=?, tools[5].type=?"
    assert len(normal.named(tuple((i, "x" * 64) for i in range(128)))) < 2000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [FLAT, {"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [FLAT], "tool_choice": {"type": "custom", "name": "x"}}, "tool_choice"),
        # It describes a function, which the client runs.
        ({"tools": [{"type": "functoin", "name": "f", "parameters": {}}]}, "tools[0].type"),
        ({"tools": [{"type": "functoin", "function": {}}]}, "tools[0].type"),
        ({"tools": [{"type": ""}]}, "tools[0].type"),
    ],
)
def test_what_would_change_the_answer_is_refused(fields: dict[str, Any], param: str) -> None:
    for kind in (BodyKind.CHAT, BodyKind.RESPONSES):
        with pytest.raises(BadRequest) as caught:
            applied(kind, fields)
        assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a": 1}', True),
        ("not json", True),
        ("[" * 70, True),
        ('{"a":' * 70 + "1" + "}" * 70, True),
        ('{"text": "' + "[" * 1000 + '"}', True),
        ("[" * 100_000, False),
        ('{"a":' * 500 + "1" + "}" * 500, False),
        ("{}," * 100_000, False),
    ],
)
def test_arguments_of_tool_calls_are_text(arguments: str, kept: bool) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "1", "content": arguments})
    sent, facts = applied(BodyKind.CHAT, {"messages": turns})
    found = sent["messages"][1]["tool_calls"][0]["function"]
    assert found["arguments"] == (arguments if kept else "")
    assert facts.unreadable is not kept
    assert sent["messages"][2]["content"] == arguments
    items = [
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "1", "output": arguments},
    ]
    sent, _ = applied(BodyKind.RESPONSES, {"input": items})
    assert sent["input"] == [items[0] | {"arguments": found["arguments"]}, items[1]]
