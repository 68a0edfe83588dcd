"""Reads an OpenAI event stream as it arrives and keeps only what a measurement needs.

Every event is parsed (typed, in C): a byte pattern would be faster still, but would count a role
announcement or a change of spacing as a token.
"""

from __future__ import annotations

from typing import Any

import msgspec

# What is kept of a body or an error event to show to a person.
DETAIL_BYTES = 300

_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class EventStream:
    """One response body: when content came, the usage told at the end, the first error seen.

    Events that one read delivers share its time: they reached the client together.
    """

    __slots__ = ("_rest", "completion_tokens", "content_ns", "done", "error", "malformed", "prompt_tokens")

    def __init__(self) -> None:
        self._rest = b""
        self.content_ns: list[int] = []
        self.completion_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.done = False
        # The engine's own error event.
        self.error: str | None = None
        # An event that is no OpenAI event.
        self.malformed: str | None = None

    def feed(self, data: bytes, now_ns: int) -> None:
        """Take the next bytes of the body, read at `now_ns`; an event may be split anywhere."""
        if b"\r" in data:  # CRLF streams; JSON escapes a carriage return, so none is lost
            data = data.replace(b"\r", b"")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and b"\n" not in event:
                self._take(event[5:].strip(), now_ns)
            else:
                # Comments (keep-alives) and fields other than data carry no token.
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        self._take(line[5:].strip(), now_ns)

    def _take(self, payload: bytes, now_ns: int) -> None:
        if payload == _DONE:
            self.done = True
            return
        try:
            event = _decode(payload)
        except msgspec.MsgspecError as problem:
            self.malformed = self.malformed or f"{problem}: {_show(payload)}"
            return
        if event.error is not None:
            self.error = self.error or _show(payload)
        if event.usage is not None:
            self.completion_tokens = event.usage.completion_tokens
            self.prompt_tokens = event.usage.prompt_tokens
        if any(_has_content(choice) for choice in event.choices):
            self.content_ns.append(now_ns)


def _has_content(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return bool(choice.text)
    return bool(delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)


def _show(payload: bytes) -> str:
    return payload[:DETAIL_BYTES].decode("utf-8", "replace")
