"""What the fake engine will answer, decided before it starts: pure functions from a request to its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.config import FakeEngineConfig
from serving.engine.fake import tokens
from serving.engine.fake.protocol import Message, bad_request
from serving.engine.fake.scheduler import Sequence as EngineSequence
from serving.engine.fake.schema import instance

_CALL = re.compile(r"\bcall ([\w-]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: its tokens, and the same tokens as they stand in a JSON string."""

    index: int
    pieces: Sequence[bytes]
    escaped: Sequence[bytes]
    finish_reason: str
    sequence: EngineSequence

    @property
    def text(self) -> str:
        """The whole answer."""
        return b"".join(self.pieces).decode("ascii")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The bounds a client set; `text` is an answer that must be given word for word."""

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    text: str | None = None
    cache_salt: str | None = None


def plan(
    prompt: bytes, wanted: Wanted, config: FakeEngineConfig, max_model_len: int, *, first_index: int = 0
) -> list[Choice]:
    """The `n` answers to a prompt. Raises RefusalError 400 where prompt and answer exceed the context.

    An answer ends for "stop" after a drawn number of tokens, or for "length" where the client's bound or the context
    comes first; one that is given word for word likewise.
    """
    prompt_tokens = tokens.count(prompt)
    _check_length(prompt_tokens, wanted.max_tokens or 1, max_model_len)
    if wanted.max_tokens is not None and wanted.min_tokens > wanted.max_tokens:
        raise bad_request(
            f"min_tokens must be less than or equal to max_tokens={wanted.max_tokens}, got {wanted.min_tokens}.",
            "min_tokens",
        )
    room = max_model_len - prompt_tokens
    choices = []
    for index in range(first_index, first_index + wanted.n):
        pieces, reason = _answer(prompt, wanted, config, room, index)
        sequence = EngineSequence(
            prompt_tokens,
            len(pieces),
            tokens.block_hashes(prompt + b"".join(pieces), config.block_tokens, wanted.cache_salt),
            finish_reason=reason,
        )
        escaped = pieces if wanted.text is None else [tokens.json_escaped(piece) for piece in pieces]
        choices.append(Choice(index, pieces, escaped, reason, sequence))
    return choices


def pooling(prompt: bytes, config: FakeEngineConfig, max_model_len: int, *, cache_salt: str | None) -> EngineSequence:
    """A sequence that is prefilled and answers no tokens; raises RefusalError 400 for a prompt too long."""
    prompt_tokens = tokens.count(prompt)
    _check_length(prompt_tokens, 0, max_model_len)
    return EngineSequence(prompt_tokens, 0, tokens.block_hashes(prompt, config.block_tokens, cache_salt))


def _check_length(prompt_tokens: int, output_tokens: int, max_model_len: int) -> None:
    total = prompt_tokens + output_tokens
    if total > max_model_len:
        raise bad_request(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{output_tokens} output tokens and your prompt contains {prompt_tokens} input tokens, for a "
            f"total of {total} tokens. Please reduce the length of the input prompt or the number of "
            f"requested output tokens. (parameter=input_tokens, value={prompt_tokens})",
            "input_tokens",
        )


def _answer(prompt: bytes, wanted: Wanted, config: FakeEngineConfig, room: int, index: int) -> tuple[list[bytes], str]:
    if wanted.text is not None:
        pieces = tokens.pieces(wanted.text)
        limit = min(room, wanted.max_tokens or room)
        return pieces[:limit], "stop" if len(pieces) <= limit else "length"
    length, reason = room if wanted.max_tokens is None else wanted.max_tokens, "length"
    if not wanted.ignore_eos:
        drawn = tokens.drawn_length(prompt, config.answer_tokens, config.answer_spread, seed=config.seed, choice=index)
        if (own := max(drawn, wanted.min_tokens)) <= length:
            length, reason = own, "stop"
    return tokens.words(prompt, length, seed=config.seed, choice=index), reason


def render_chat(messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()) -> bytes:
    """The prompt of a conversation: each turn tokenised for itself, then the assistant's header.

    A conversation that goes on therefore begins with the tokens of the one before.
    """
    parts = [tokens.BOS]
    if tools:
        parts += [tokens.role_header("tools"), tokens.encode_text(json.dumps(tools)), tokens.END_OF_TURN]
    for message in messages:
        text = message.content if isinstance(message.content, str) else _part_texts(message.content or [])
        parts += [tokens.role_header(message.role), tokens.encode_text(text)]
        parts += [tokens.encode_text(str(call.get("arguments", ""))) for call in _called(message)]
        parts.append(tokens.END_OF_TURN)
    parts.append(tokens.role_header("assistant"))
    return b"".join(parts)


def _called(message: Message) -> list[dict[str, Any]]:
    """Functions that an assistant's turn called; raises RefusalError, as vLLM does, for calls of anything else."""
    calls = [call.get("function") for call in message.tool_calls or ()] if message.role == "assistant" else []
    functions = [call for call in calls if isinstance(call, dict)]
    if len(functions) < len(calls):
        raise bad_request("chat completions only support assistant tool_calls of type 'function'.", "tool_calls")
    return functions


def render_prompt(prompt: str | Iterable[int], *, add_special_tokens: bool = True) -> bytes:
    """The tokens of a plain prompt: token ids as they are, text after a start token."""
    if not isinstance(prompt, str):
        return tokens.encode_ids(prompt)
    return (tokens.BOS if add_special_tokens else b"") + tokens.encode_text(prompt)


def structured_text(response_format: dict[str, Any] | None) -> str | None:
    """The answer that a `response_format` asks for; None where any text will do.

    Takes OpenAI's chat form ({"json_schema": {"schema": …}}) and the flat one of /v1/responses.
    """
    kind = (response_format or {}).get("type")
    if response_format is None or kind in (None, "text"):
        return None
    if kind == "json_object":
        return "{}"
    if kind != "json_schema":
        raise bad_request(f"The fake engine does not support response_format {kind!r}.", "response_format")
    holder = response_format.get("json_schema", response_format)
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict | bool):
        raise bad_request("response_format of type json_schema needs a schema.", "response_format")
    return _instance_text(schema, "response_format")


def tool_call(
    tools: Sequence[dict[str, Any]], tool_choice: str | dict[str, Any] | None, messages: Sequence[Message] = ()
) -> tuple[str, str] | None:
    """Name and arguments (JSON) of the tool that is called; None where text is answered.

    A named tool is called, for "required" the first. For "auto" one that a user's last message asks for ("Call tide."):
    programs' loops of calls and results then run as they do with a model that decides.
    """
    if tool_choice == "none":
        return None
    functions = {f.get("name"): f for f in (tool.get("function") for tool in tools) if isinstance(f, dict)}
    if tool_choice in (None, "auto"):
        name = next((name for name in _CALL.findall(_asked(messages)) if name in functions), None)
        if name is None:
            return None
    elif isinstance(tool_choice, dict):
        named = tool_choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
    elif tool_choice == "required":
        name = next(iter(functions), None)
    else:
        name = None
    if not isinstance(name, str) or name not in functions:
        raise bad_request("tool_choice names no function of tools.", "tool_choice")
    return name, _instance_text(functions[name].get("parameters") or {"type": "object"}, "tools")


def _instance_text(schema: Any, param: str) -> str:
    try:
        return json.dumps(instance(schema))
    except ValueError as error:
        raise bad_request(str(error), param) from error


def _asked(messages: Sequence[Message]) -> str:
    """What a user says in the last message; "" where that is somebody else's."""
    if not messages or messages[-1].role != "user":
        return ""
    content = messages[-1].content
    return content if isinstance(content, str) else _part_texts(content or [])


def _part_texts(parts: Iterable[str | dict[str, Any]]) -> str:
    """The text of content parts; others (images …) count with what stands in them."""
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text")
        texts.append(text if isinstance(text, str) else json.dumps(part))
    return "".join(texts)
