"""What becomes of agents' histories for Mistral's own tokenizers."""

from __future__ import annotations

from typing import Any

import pytest

from serving.engine.mistral_turns import Turn, fitted

CALL = {"id": "aB3456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT: Turn = {"role": "tool", "tool_call_id": "aB3456789", "content": "ok"}


def user(text: Any = "hi") -> Turn:
    return {"role": "user", "content": text}


def said(content: Any, **more: Any) -> Turn:
    return {"role": "assistant", "content": content, **more}


PLAIN: list[list[Turn]] = [
    [user(), said("x"), user()],
    [{"role": "system", "content": "s"}, user(), said("", tool_calls=[CALL]), RESULT, user()],
    [{"role": "developer", "content": "s"}, user(), user()],
]


@pytest.mark.parametrize("version", [3, 7, 13])
@pytest.mark.parametrize("turns", PLAIN)
def test_what_the_format_has_is_left_alone(turns: list[Turn], version: int) -> None:
    assert fitted(turns, version) == turns


@pytest.mark.parametrize("empty", ["", None, [], [{"type": "text", "text": ""}]])
def test_an_assistants_turn_without_content_is_left_out(empty: Any) -> None:
    assert fitted([user("a"), said(empty), user("b")], 3) == [user("a"), user("b")]
    assert fitted([user("a"), said(empty, tool_calls=[])], 7) == [user("a")]
    (_, called, _) = fitted([user(), said(empty, tool_calls=[CALL]), RESULT], 3)
    assert called == said("", tool_calls=[CALL])


def test_nothing_is_made_empty() -> None:
    assert fitted([said("")], 3) == [said("")]


def test_text_beside_calls_stays_where_the_format_has_a_place_for_it() -> None:
    turns = [user(), said("Let me look.", tool_calls=[CALL]), RESULT]
    assert fitted(turns, 7) == turns
    assert fitted(turns, 3) == [user(), said("", tool_calls=[CALL]), RESULT]
    # As a responses request's items come.
    apart = [user(), said("Let me look."), said(None, tool_calls=[CALL]), RESULT]
    assert fitted(apart, 3) == [user(), said("", tool_calls=[CALL]), RESULT]
    assert fitted(apart, 7) == [user(), said("Let me look."), said("", tool_calls=[CALL]), RESULT]


def test_ids_are_nine_letters_and_digits_and_results_find_their_calls() -> None:
    for given in ("call_1234567890", "c1", "functions.f:0", "\ud800"):
        _, called, result = fitted(
            [user(), said("", tool_calls=[CALL | {"id": given}]), RESULT | {"tool_call_id": given}], 3
        )
        (call,) = called["tool_calls"]
        assert call["id"] == result["tool_call_id"]
        assert len(call["id"]) == 9
        assert call["id"].isalnum()


def test_roles_stand_where_the_format_has_them() -> None:
    reminder = {"role": "system", "content": "Stay brief."}
    assert fitted([user(), said("x"), reminder], 3)[-1] == user("Stay brief.")
    assert fitted([user(), said("", tool_calls=[CALL]), RESULT, reminder], 3)[-1] == user("Stay brief.")
    # Its call was cut away.
    assert fitted([user(), RESULT], 3) == [user(), user("ok")]
    two = [
        user(),
        said("", tool_calls=[CALL, CALL | {"id": "123456789"}]),
        RESULT,
        RESULT | {"tool_call_id": "123456789"},
    ]
    assert fitted(two, 3) == two


def test_parts_are_text_and_reasoning_is_left_out() -> None:
    parts = [
        {"type": "input_text", "text": "a"},
        "b",
        {"type": "text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert fitted([user(parts)], 3) == fitted([user(iter(parts))], 3) == [user("abcd")]
    assert fitted([user(), said(iter(())), user()], 3) == [user(), user()]
    assert fitted([user(), said("x", reasoning_content="r", reasoning="r"), user()], 3) == [user(), said("x"), user()]
    assert fitted([user(), said("", tool_calls=[CALL]), RESULT | {"content": None}], 3)[-1] == RESULT | {"content": ""}
    named = {**CALL, "function": {"name": "server.tool name", "arguments": "{}"}}
    (_, called) = fitted([user(), said("", tool_calls=[named])], 3)
    assert called["tool_calls"][0]["function"]["name"] == "server_tool_name"
