"""A client's body as engines take it, where OpenAI's API and the engine's differ in what a body may hold.

- A null means absent, as at OpenAI. vLLM takes some nulls for values (`top_logprobs: null` gives no alternatives,
  `max_tokens: null` a completion without a bound) and refuses others.
- Tools that do not run here are left out (`RequestFacts.left_out`), with a choice that meant them.
- Arguments of earlier tool calls that no parser takes are an empty text, which an engine takes for no arguments, as it
  does any that are no JSON.

Promise: a body that needs none of it is the client's bytes, untouched; of one that does, every value that stays keeps
its bytes. What passed `bounds.read` comes out as a body that passes it too, and means the same.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from serving.admission import content
from serving.admission.bounds import RequestFacts
from serving.admission.complaints import decode, is_given

_NULL: Final = b"null"
# Objects of settings, in which a null means absent as well. What a client composes (schemas, messages) is not among
# them: there a null may be a value.
_SETTINGS: Final = frozenset({"stream_options", "reasoning", "text"})
_CONVERSATIONS: Final = ("messages", "input")
# Without tools, nothing but their absence.
_ABOUT_TOOLS: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls"})

# In a header: so many tools, of types that look like types.
MOST_NAMED: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")

_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields)
_list: Final[msgspec.json.Decoder[list[msgspec.Raw]]] = msgspec.json.Decoder(list[msgspec.Raw])
_any = msgspec.json.Decoder(Any)
_encode: Final = msgspec.json.Encoder().encode


def applied(body: bytes, facts: RequestFacts) -> bytes:
    """The body for the engine; `body` passed `bounds.read`, which found `facts`."""
    if not (facts.left_out or facts.unreadable or _NULL in body):
        return body
    fields = decode(_fields, body)
    changed = {name: value for name, value in fields.items() if is_given(value)}
    for name in _SETTINGS & changed.keys():
        changed[name] = _without_nulls(changed[name])
    if facts.left_out:
        _leave_out(changed, {number for number, _ in facts.left_out})
    if facts.unreadable:
        for name in _CONVERSATIONS:
            if name in changed:
                changed[name] = _readable(changed[name])
    return body if changed == fields else _encode(changed)


def named(left_out: tuple[tuple[int, str], ...]) -> str:
    """What was left out, for a header: `tools[4].type=web_search`."""
    shown = [f"tools[{i}].type={kind if _NAME.fullmatch(kind) else '?'}" for i, kind in left_out[:MOST_NAMED]]
    return ", ".join([*shown, *(["..."] if len(left_out) > MOST_NAMED else [])])


def _without_nulls(raw: msgspec.Raw) -> msgspec.Raw:
    if bytes(raw)[:1] != b"{" or _NULL not in bytes(raw):
        return raw
    fields = decode(_fields, raw)
    given = {name: value for name, value in fields.items() if is_given(value)}
    return raw if given == fields else msgspec.Raw(_encode(given))


def _leave_out(fields: _Fields, numbers: set[int]) -> None:
    tools = [tool for i, tool in enumerate(_list.decode(fields["tools"])) if i not in numbers]
    if tools:
        fields["tools"] = msgspec.Raw(_encode(tools))
        return
    for name in _ABOUT_TOOLS & fields.keys():
        del fields[name]


def _readable(raw: msgspec.Raw) -> msgspec.Raw:
    turns = decode(_any, raw)
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            continue
        calls = turn.get("tool_calls")
        functions = (
            [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        )
        for holder in (turn, *functions):
            if isinstance(holder, dict) and isinstance(arguments := holder.get("arguments"), str):
                holder["arguments"] = arguments if content.is_readable(arguments) else ""
    return msgspec.Raw(_encode(turns))
