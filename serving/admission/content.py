"""The checks of what a model reads: messages, prompts, tools. Each returns the bytes of text it found.

Text only: the engine's media loaders (URLs, decoders, tensors) are never reached, because a part is let
through by an allow-list of types and refused by any key that the engine would take for media.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import astuple

from serving.admission import json_shape, shapes
from serving.admission.complaints import (
    decode,
    is_given,
    missing,
    too_long,
    too_many,
    unsupported,
)
from serving.config import LimitsConfig
from serving.errors import BadRequest
from serving.metering.usage import BYTES_PER_TOKEN

# JSON values in one body, token ids aside: several times what the most messages and tools amount to.
MAX_VALUES = 65536
# Of a tool call's arguments: as deep as an engine's parser and its chat template go in any case.
ARGUMENTS_DEPTH: Final = 128
# All tools together against one tool: an agent has many small ones.
TOOLS_SCHEMAS = 8

TEXT_PARTS: Final = frozenset(
    {"text", "input_text", "output_text", "refusal", "thinking", "reasoning_text", "summary_text"}
)
# The tools that an engine takes: functions, on /v1/responses also several of them under a common name.
FUNCTIONS: Final[frozenset[str | None]] = frozenset({None, "function"})
FUNCTIONS_AND_NAMESPACES: Final = FUNCTIONS | {"namespace"}
INPUT_ITEMS: Final = frozenset({"message", "function_call", "function_call_output", "reasoning"})
_TEXT_KEYS = 4  # type, text, refusal and thinking; all other fields of a Part are media
_MEDIA_KEYS = shapes.Part.__struct_fields__[_TEXT_KEYS:]
_NO_MEDIA = (shapes.ABSENT,) * len(_MEDIA_KEYS)
_TEXT_ONLY = "this cluster serves text only; send parts of type 'text'"
# The first structural characters tell which of the four forms a prompt has.
_PROMPT = re.compile(rb'\s*(?:(")|\[\s*(?:(")|(\[)|[-\d]))')
_TEXT, _TEXTS, _TOKEN_LISTS = 1, 2, 3

_tool_head = msgspec.json.Decoder(shapes.ToolHead)
_text = msgspec.json.Decoder(str)
_texts = msgspec.json.Decoder(list[str])
_tokens = msgspec.json.Decoder(list[shapes.TokenId])
_token_lists = msgspec.json.Decoder(list[list[shapes.TokenId]])


class Turns(NamedTuple):
    """What a conversation holds: bytes of text; and whether a tool call's arguments are none that an engine reads."""

    size_bytes: int
    unreadable: bool = False


class Tools(NamedTuple):
    """The tools of a request: bytes of those that its engine gets, and which it does not get, by number and type."""

    size_bytes: int
    left_out: tuple[tuple[int, str], ...] = ()


class Prompts(NamedTuple):
    """What a request has its model read: bytes of text, a token id as four of them; in how many prompts; of ids how
    many, and the greatest (-1: none); which of its tools are left out; and whether its tool calls have arguments that
    no engine reads.
    """

    size_bytes: int
    number: int = 1
    token_ids: int = 0
    highest_id: int = -1
    left_out: tuple[tuple[int, str], ...] = ()
    unreadable: bool = False


def utf8_bytes(text: str | None) -> int:
    """Length of a text in UTF-8."""
    if text is None:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def messages(found: list[shapes.Message] | None, limits: LimitsConfig) -> Turns:
    """A conversation; raises BadRequest."""
    if found is None:
        raise missing("messages")
    if not found:
        raise BadRequest(
            "Invalid 'messages': expected at least 1 message, but got an empty list.",
            code="empty_array",
            param="messages",
        )
    if len(found) > limits.messages:
        raise too_many("messages", limits.messages, len(found), "messages")
    total = 0
    unreadable = False
    for i, message in enumerate(found):
        at = f"messages[{i}]"
        if message.role is None:
            raise missing(f"{at}.role")
        if is_given(message.audio):
            raise unsupported(f"{at}.audio", _TEXT_ONLY)
        total += content(message.content, f"{at}.content")
        total += utf8_bytes(message.reasoning) + utf8_bytes(message.reasoning_content)
        for call in message.tool_calls or ():
            arguments = None if call.function is None else call.function.arguments
            total += utf8_bytes(arguments)
            unreadable = unreadable or not is_readable(arguments)
    return Turns(total, unreadable)


def content(found: shapes.Content, at: str) -> int:
    """A message's or an item's content: a string or a list of text parts."""
    if found is None or isinstance(found, str):
        return utf8_bytes(found)
    total = 0
    for i, part in enumerate(found):
        if isinstance(part, str):
            total += utf8_bytes(part)
            continue
        media = astuple(part)[_TEXT_KEYS:]
        if media != _NO_MEDIA:
            # Even a null: the engine asks whether the key is there.
            key = next(k for k, value in zip(_MEDIA_KEYS, media, strict=True) if value != shapes.ABSENT)
            raise unsupported(f"{at}[{i}].{key}", _TEXT_ONLY)
        if part.type is None:
            raise missing(f"{at}[{i}].type")
        if part.type not in TEXT_PARTS:
            raise unsupported(f"{at}[{i}].type", _TEXT_ONLY)
        total += utf8_bytes(part.text) + utf8_bytes(part.refusal) + utf8_bytes(part.thinking)
    return total


def is_readable(arguments: str | None) -> bool:
    """Whether an engine can read a tool call's arguments, as it does for its chat template.

    They are a model's own text, which may be anything, and stand in the conversation for good: what no parser takes is
    no reason to refuse them. What is merely no JSON the engine takes for an empty object itself.
    """
    if arguments is None or len(arguments) < ARGUMENTS_DEPTH:
        return True
    try:
        json_shape.check(arguments.encode(), ARGUMENTS_DEPTH, MAX_VALUES)
    except BadRequest:
        return False
    return True


def json_in_string(text: str | None, at: str, limits: LimitsConfig) -> int:
    """JSON that the engine takes out of a string and parses again: the same bounds as the body's."""
    if text is None:
        return 0
    encoded = text.encode()
    json_shape.check(encoded, limits.json_depth, MAX_VALUES, at)
    return len(encoded)


def prompt(found: msgspec.Raw, param: str, max_prompts: int, limits: LimitsConfig) -> Prompts:
    """A prompt or a batch of them: text, token ids, or a list of either; raises BadRequest."""
    if not is_given(found):
        raise missing(param)
    shape = _PROMPT.match(found)
    if shape is None:
        raise BadRequest(
            f"Invalid type for '{param}': expected a string, a list of strings, a list of token ids "
            "or a list of such lists, and none of them empty.",
            code="invalid_type",
            param=param,
        )
    if shape.lastindex == _TEXT:
        return Prompts(utf8_bytes(decode(_text, found, param)))
    if shape.lastindex == _TEXTS:
        texts = decode(_texts, found, param)
        _batch(param, len(texts), max_prompts)
        return Prompts(sum(map(utf8_bytes, texts)), len(texts))
    count = 1
    if shape.lastindex == _TOKEN_LISTS:
        lists = decode(_token_lists, found, param)
        count = len(lists)
        _batch(param, count, max_prompts)
        tokens = sum(map(len, lists))
        highest = max(chain.from_iterable(lists), default=-1)
    else:
        ids = decode(_tokens, found, param)
        tokens, highest = len(ids), max(ids, default=-1)
    if tokens > limits.prompt_tokens:
        raise too_many(param, limits.prompt_tokens, tokens, "tokens in one request")
    return Prompts(tokens * BYTES_PER_TOKEN, count, tokens, highest)


def _batch(param: str, prompts: int, max_prompts: int) -> None:
    if prompts > max_prompts:
        raise too_many(param, max_prompts, prompts, "prompts")


def score_input(found: shapes.ScoreInput, param: str, limits: LimitsConfig) -> Prompts:
    """One side of a score, or rerank documents."""
    elements: Sequence[str | shapes.ScoreObject] = found if isinstance(found, list) else [found]
    if len(elements) > limits.batch_inputs:
        raise too_many(param, limits.batch_inputs, len(elements))
    total = 0
    for i, element in enumerate(elements):
        at = f"{param}[{i}]" if isinstance(found, list) else param
        if isinstance(element, str):
            total += utf8_bytes(element)
        else:
            total += content(element.content, f"{at}.content")
    return Prompts(total, len(elements))


def responses_input(found: str | list[shapes.Item] | None, limits: LimitsConfig) -> Turns:
    """The input of a responses request: text, or items that need no state and no server-side tool."""
    if found is None:
        raise missing("input")
    if isinstance(found, str):
        return Turns(utf8_bytes(found))
    if len(found) > limits.messages:
        raise too_many("input", limits.messages, len(found), "items")
    total = 0
    unreadable = False
    for i, item in enumerate(found):
        at = f"input[{i}]"
        if item.type is not None and item.type not in INPUT_ITEMS:
            raise unsupported(
                f"{at}.type",
                f"responses are not stored and tools run at the client; use {_names(INPUT_ITEMS)}",
            )
        total += content(item.content, f"{at}.content") + content(item.output, f"{at}.output")
        total += utf8_bytes(item.arguments)
        unreadable = unreadable or not is_readable(item.arguments)
    return Turns(total, unreadable)


def tools(
    found: list[msgspec.Raw] | None, choice: msgspec.Raw, kept: frozenset[str | None], limits: LimitsConfig
) -> Tools:
    """A request's tools and `tool_choice`: number, the size of each and of all; raises BadRequest.

    Those of other types than `kept` run at OpenAI's servers or are a form of their own: clients such as coding agents
    send them unasked, and the model may answer without them. They are left out; a choice that needs one is refused.
    """
    found = found or []
    if len(found) > limits.tools:
        raise too_many("tools", limits.tools, len(found), "tools")
    total = 0
    left_out: list[tuple[int, str]] = []
    for i, tool in enumerate(found):
        size = len(bytes(tool))
        if size > limits.schema_bytes:
            raise too_long(f"tools[{i}]", limits.schema_bytes, size)
        head = decode(_tool_head, tool, f"tools[{i}]")
        if head.type in kept:
            total += size
        elif head.type and not is_given(head.function) and not is_given(head.parameters):
            left_out.append((i, head.type))
        else:
            # It describes a function, which the client runs: without it the answer would be another.
            raise unsupported(f"tools[{i}].type", f"tools that describe a function have a type of {_names(kept)}")
    if total > TOOLS_SCHEMAS * limits.schema_bytes:
        raise too_long("tools", TOOLS_SCHEMAS * limits.schema_bytes, total)
    _choice(choice, len(left_out) == len(found), kept, limits)
    return Tools(total, tuple(left_out))


def _choice(raw: msgspec.Raw, none_left: bool, kept: frozenset[str | None], limits: LimitsConfig) -> None:
    """Refuse a `tool_choice` that asks for a tool which is left out, or for any where none is left."""
    if (size := len(bytes(raw))) > limits.schema_bytes:
        raise too_long("tool_choice", limits.schema_bytes, size)
    if bytes(raw)[:1] == b"{":
        kind = decode(_tool_head, raw, "tool_choice").type
        if kind not in {*kept, "function", "allowed_tools"}:
            raise unsupported("tool_choice", "the tool that it asks for does not run here")
    elif none_left and bytes(raw) == b'"required"':
        raise unsupported("tool_choice", "no tool that runs here is given, so none can be required")


def _names(values: frozenset[str] | frozenset[str | None]) -> str:
    return ", ".join(f"'{v}'" for v in sorted(v for v in values if v is not None))
