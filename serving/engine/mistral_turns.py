"""Conversations as Mistral's own tokenizers take them.

mistral-common checks a conversation by the rules of Mistral's training and refuses what OpenAI's API and every other
model's chat template take: assistant turns without content, text beside tool calls (version 3 of the format), system
turns in the middle, results of calls that were cut away, ids that are not nine letters or digits. The histories of
agents hold all of that, and what is in a history is sent again with every turn.

Promise: a conversation that mistral-common takes is left as it is. Of another as much as its format has a place for is
kept, in order, and no text of a user or a tool is lost; what is left out is text beside tool calls, which version 3 has
no place for, and reasoning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

Turn = dict[str, Any]

# From here on an assistant's turn may hold text beside tool calls.
TEXT_BESIDE_CALLS: Final = 7
ID_CHARACTERS: Final = 9
_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
_NAME: Final = re.compile(r"[^a-zA-Z0-9_-]")
MOST_NAME_CHARACTERS: Final = 64
_REASONING: Final = frozenset({"reasoning", "reasoning_content"})


def fitted(turns: Sequence[Turn], version: int) -> list[Turn]:
    """The conversation for a tokenizer of this version of the format."""
    found: list[Turn] = []
    for turn in turns:
        role, last = turn.get("role"), found[-1] if found else {}
        fit = _with_text(turn)
        if role == "assistant":
            fit = _assistant(fit)
            if not fit.get("tool_calls") and not fit["content"]:
                continue
            if fit.get("tool_calls") and version < TEXT_BESIDE_CALLS:
                fit = fit | {"content": ""}
                if last.get("role") == "assistant" and not last.get("tool_calls"):
                    # mistral-common makes one turn of both.
                    found.pop()
        elif role == "tool":
            if not (last.get("role") == "tool" or last.get("tool_calls")):
                # Its call is not there, as where a history was cut.
                fit = {"role": "user", "content": fit["content"]}
            elif isinstance(call_id := fit.get("tool_call_id"), str):
                fit = fit | {"tool_call_id": _nine(call_id)}
        elif role == "system" and last.get("role") in {"assistant", "tool"}:
            fit = fit | {"role": "user"}
        found.append(fit)
    return found or [dict(turn) for turn in turns]


def _with_text(turn: Turn) -> Turn:
    """A turn whose content is a text: parts one behind the other; null is empty."""
    content = turn.get("content")
    if isinstance(content, Iterable) and not isinstance(content, str):
        # Not always a list: pydantic leaves an iterator in its place.
        texts = (part if isinstance(part, str) else _text(part) for part in content)
        content = "".join(text for text in texts if text)
    return {**turn, "content": "" if content is None else content}


def _text(part: Any) -> str | None:
    if not isinstance(part, dict):
        return None
    text = part.get("text", part.get("refusal"))
    return text if isinstance(text, str) else None


def _assistant(turn: Turn) -> Turn:
    fit = {name: value for name, value in turn.items() if name not in _REASONING}
    calls = fit.get("tool_calls")
    if calls:
        fit["tool_calls"] = [_call(call) if isinstance(call, dict) else call for call in calls]
    return fit


def _call(call: Turn) -> Turn:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(name := function.get("name"), str):
        call = call | {"function": function | {"name": _NAME.sub("_", name)[:MOST_NAME_CHARACTERS]}}
    call_id = call.get("id")
    return call | {"id": _nine(call_id)} if isinstance(call_id, str) else call


def _nine(call_id: str) -> str:
    """An id of nine letters and digits: the same for the same id, so that a result still finds its call."""
    if _ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:ID_CHARACTERS]
