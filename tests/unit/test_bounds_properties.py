"""What holds of every body: no exception but RequestError, no bound passed, one view with the engine's parser."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission import json_shape
from serving.admission.bounds import _PROMPTS, BodyKind, read
from serving.config import LimitsConfig
from serving.errors import BadRequest, RequestError

LIMITS = LimitsConfig(prompt_tokens=50, messages=8, batch_prompts=4, batch_inputs=4, json_depth=6)
KINDS = st.sampled_from(list(BodyKind))
NAMES = sorted({name for shape in _PROMPTS for name in shape.__struct_fields__})

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON, max_size=6)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system"])}, optional={"content": JSON, "tool_calls": JSON, "audio": JSON}
)
NEARLY_VALID = st.fixed_dictionaries(
    {"model": st.just("m")},
    optional={
        "messages": st.lists(MESSAGE, max_size=3),
        "prompt": st.text(max_size=9) | st.lists(st.integers() | st.text(max_size=2) | st.lists(st.integers())),
        "input": st.text(max_size=9) | st.lists(MESSAGE) | JSON,
        "n": st.integers(-1, 10),
        "max_tokens": st.integers(-1, 40000),
        "stream": st.booleans() | st.none(),
        "tools": JSON,
        "structured_outputs": JSON,
    },
)


@settings(max_examples=150)
@given(KINDS, FIELDS | NEARLY_VALID | JSON)
def test_any_json_is_answered_or_refused(kind: BodyKind, value: Any) -> None:
    with contextlib.suppress(RequestError):
        read(kind, json.dumps(value).encode(), LIMITS)


@settings(max_examples=150)
@given(KINDS, st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(kind: BodyKind, body: bytes) -> None:
    with contextlib.suppress(RequestError):
        read(kind, body, LIMITS)


@settings(max_examples=150)
@given(KINDS, FIELDS | NEARLY_VALID, st.data())
def test_a_damaged_body_is_answered_or_refused(kind: BodyKind, value: Any, data: st.DataObject) -> None:
    body = bytearray(json.dumps(value).encode())
    at = data.draw(st.integers(0, len(body) - 1))
    body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(RequestError):
        read(kind, bytes(body), LIMITS)


def _escaped(name: str, escapes: list[bool]) -> str:
    flags = escapes + [False] * len(name)
    return "".join(f"\\u{ord(c):04x}" if flag else c for c, flag in zip(name, flags, strict=False))


PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["model", "n", "max_tokens", "stream", "prompt", "chat_template", "prompt_embeds", "x"]),
        st.lists(st.booleans(), max_size=6),
        st.sampled_from(['"a"', '"b"', "1", "2", "99", "true", "false", "null", "[1]", "1e2", '"\\u0061"', "{}"]),
    ),
    max_size=10,
)


@settings(max_examples=300)
@given(PAIRS)
def test_what_passes_means_the_same_to_the_engines_parser(pairs: list[tuple[str, list[bool], str]]) -> None:
    written = [("model", [], '"m"'), ("prompt", [], '"p"'), *pairs]
    body = "{" + ",".join(f'"{_escaped(name, escapes)}": {value}' for name, escapes, value in written) + "}"
    try:
        found = read(BodyKind.COMPLETION, body.encode(), LIMITS)
    except BadRequest:
        return
    engine = json.loads(body)
    assert found.model == engine["model"]
    assert found.n == (engine.get("n") or 1) <= LIMITS.n
    assert found.stream is bool(engine.get("stream"))
    assert engine.get("max_tokens") is None or engine["max_tokens"] == found.max_output_tokens
    assert engine.get("chat_template") is None
    assert engine.get("prompt_embeds") is None


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


TRICKY_TEXT = st.text(st.sampled_from('[]{}",\\/\nué中'), max_size=12)
NESTED = st.recursive(
    TRICKY_TEXT | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY_TEXT, inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=150)
@given(NESTED, st.integers(0, 6), st.booleans())
def test_depth_is_exact(value: Any, limit: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    try:
        json_shape.check(body, limit, 1000)
    except BadRequest:
        assert _depth(value) > limit
    else:
        assert _depth(value) <= limit


@settings(max_examples=40)
@given(st.integers(-9, 9), st.integers(1, 9), st.sampled_from(['"', "\\", "x"]))
def test_depth_is_exact_across_blocks(shift: int, run: int, filler: str) -> None:
    # Escapes and quotes around the end of the first 64 KiB block.
    text = "a" * (64 * 1024 - 4 + shift) + filler * run + "[" * 9
    for value, depth in (([text, [[1]]], 3), ({"k": text, text: {"z": []}}, 3)):
        body = json.dumps(value).encode()
        json_shape.check(body, depth, 1000)
        with pytest.raises(BadRequest):
            json_shape.check(body, depth - 1, 1000)


@settings(max_examples=200)
@given(
    st.sampled_from(["n", "best_of", "max_tokens", "max_completion_tokens", "top_logprobs", "prompt_logprobs"]),
    st.integers(min_value=32769),
    KINDS.filter(lambda kind: kind in {BodyKind.CHAT, BodyKind.COMPLETION, BodyKind.RESPONSES}),
)
def test_whatever_is_over_a_bound_is_refused(name: str, value: int, kind: BodyKind) -> None:
    body = {"model": "m", "messages": [{"role": "user"}], "prompt": "p", "input": "i", name: value}
    if kind is BodyKind.RESPONSES:
        del body["prompt"]
    with pytest.raises(BadRequest) as caught:
        read(kind, json.dumps(body).encode(), LimitsConfig(output_tokens=32768))
    assert caught.value.param == name
