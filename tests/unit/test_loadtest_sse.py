"""The event stream reader: what counts as content, wherever the bytes are split."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sse import EventStream


def event(payload: dict[str, Any], end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(payload).encode() + end


def delta(**fields: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": fields}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}}


@pytest.mark.parametrize(
    ("payload", "counts"),
    [
        (delta(role="assistant", content=""), False),
        (delta(content=None), False),
        (delta(content="a"), True),
        (delta(content=" "), True),
        (delta(reasoning_content="hm"), True),
        (delta(reasoning="hm"), True),
        (delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]), True),
        (delta(tool_calls=[]), False),
        ({"choices": [{"index": 0, "text": "a"}]}, True),
        ({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}, False),
        ({"choices": []}, False),
        (USAGE, False),
    ],
)
def test_only_content_counts(payload: dict[str, Any], counts: bool) -> None:
    stream = EventStream()
    stream.feed(event(payload), 42)
    assert stream.content_ns == ([42] if counts else [])
    assert stream.error is None
    assert stream.malformed is None


WHOLE = (
    event(delta(role="assistant", content=""))
    + event(delta(content="é\n\n"))
    + b": keep-alive\n\n"
    + b"event: message\nid: 3\n"
    + event(delta(content="b"), b"\r\n\r\n")
    + event(USAGE)
    + b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_any_split_reads_the_same(cuts: list[int]) -> None:
    stream = EventStream()
    edges = [0, *sorted(cuts), len(WHOLE)]
    for now_ns, (start, end) in enumerate(pairwise(edges)):
        stream.feed(WHOLE[start:end], now_ns)
    assert len(stream.content_ns) == 2
    assert stream.content_ns == sorted(stream.content_ns)
    assert (stream.prompt_tokens, stream.completion_tokens) == (5, 7)
    assert stream.done
    assert stream.malformed is None


def test_an_error_event_is_kept_and_the_first_wins() -> None:
    stream = EventStream()
    stream.feed(event({"error": {"message": "engine died"}}) + event({"error": {"message": "later"}}), 1)
    assert stream.error is not None
    assert "engine died" in stream.error


@pytest.mark.parametrize("payload", [b"{not json", b'"text"', b'{"choices": 3}'])
def test_what_is_no_event_is_malformed(payload: bytes) -> None:
    stream = EventStream()
    stream.feed(b"data: " + payload + b"\n\n", 1)
    assert stream.malformed is not None
    assert payload.decode() in stream.malformed
