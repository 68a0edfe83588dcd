"""Block hashes of prompts: the same exactly as far as what an engine would cache is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.routing.fingerprint import BLOCKS_MOST, ENDS, fingerprint, of_length, prompt_bytes, secret

KEY = secret("engine-token")
TEXT = "the sea is far and the fog is low, " * 200


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 5} | fields).encode()


def chat(*contents: Any, **fields: Any) -> bytes:
    roles = ("system", "user", "assistant")
    return body(messages=[{"role": roles[min(i, 2)], "content": c} for i, c in enumerate(contents)], **fields)


def hashes(of: bytes, *owner: str) -> tuple[int, ...]:
    return fingerprint(prompt_bytes(of), *(owner or ("press", "m")), key=KEY).hashes


def test_a_conversation_that_goes_on_keeps_its_blocks() -> None:
    before, after = hashes(chat(TEXT, "a question")), hashes(chat(TEXT, "a question", "an answer " * 100, "more"))
    assert len(before) > 10
    assert after[: len(before)] == before


def test_what_differs_early_shares_nothing_later() -> None:
    one, two = hashes(chat("you are kind. " + TEXT)), hashes(chat("you are rude. " + TEXT))
    assert not set(one) & set(two)
    head = TEXT[:3000]
    one, two = hashes(chat(head + "x" + TEXT)), hashes(chat(head + "y" + TEXT))
    shared = sum(a == b for a, b in zip(one, two, strict=True))
    assert 0 < shared < len(one)
    assert set(one[shared:]).isdisjoint(two[shared:])


def test_tenants_and_models_share_nothing() -> None:
    ours = set(hashes(chat(TEXT), "press", "m"))
    assert ours.isdisjoint(hashes(chat(TEXT), "other", "m"))
    assert ours.isdisjoint(hashes(chat(TEXT), "press", "m-adapter"))
    assert hashes(chat(TEXT), "ab", "c") != hashes(chat(TEXT), "a", "bc")


def test_every_gateway_of_a_cluster_names_a_prompt_alike_and_no_other_cluster_does() -> None:
    # What another process has found, with another seed of Python's own hashes.
    program = (
        "from serving.routing.fingerprint import fingerprint, secret; "
        "print(*fingerprint(b'x' * 1000, 'press', 'm', key=secret('engine-token')).hashes)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    ).stdout
    mine = fingerprint(b"x" * 1000, "press", "m", key=KEY).hashes
    assert tuple(map(int, told.split())) == mine
    assert len(mine) == 3
    assert set(mine).isdisjoint(fingerprint(b"x" * 1000, "press", "m", key=secret("another-token")).hashes)


def test_spacing_escapes_and_parts_make_no_difference() -> None:
    text = "fôg ☁ " * 300
    plain = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False).encode()
    other = json.dumps({"temperature": 0, "messages": [{"content": text, "role": "user"}]}, indent=2).encode()
    parts = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}).encode()
    assert len({hashes(plain), hashes(other), hashes(parts)}) == 1


def test_roles_and_where_messages_end_count() -> None:
    def one(*messages: tuple[str, str]) -> bytes:
        return prompt_bytes(body(messages=[{"role": role, "content": content} for role, content in messages]))

    assert one(("user", "ab")) != one(("assistant", "ab"))
    assert one(("user", "a"), ("user", "b")) != one(("user", "ab"))
    assert one(("user", "a"), ("user", "b")) != one(("user", "a\xffuser\xfeb"))


def test_tools_stand_before_messages() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}", "description": TEXT[:500]}} for i in range(3)]
    assert hashes(chat("x", tools=tools))[0] == hashes(chat("y", "z", tools=tools))[0]
    assert hashes(chat("x" * 300, tools=tools))[0] != hashes(chat("x" * 300))[0]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"prompt": TEXT}, {"prompt": [TEXT, "another"]}),
        ({"prompt": list(range(5000))}, {"prompt": [list(range(5000)), [1]]}),
        ({"input": TEXT}, {"input": TEXT, "stream": True}),
        ({"input": [{"role": "user", "content": TEXT}]}, {"messages": [{"role": "user", "content": TEXT}]}),
    ],
)
def test_other_bodies(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert hashes(body(**one)) == hashes(body(**two)) != ()


def test_token_ids_are_compared_as_tokens() -> None:
    ids = fingerprint(prompt_bytes(body(prompt=list(range(1000)))), key=KEY)
    assert ids.tokens == 1000
    more = fingerprint(prompt_bytes(body(prompt=list(range(2000)))), key=KEY)
    assert more.hashes[: len(ids.hashes)] == ids.hashes


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff", b'{"messages": 5}', b'{"documents": []}'])
def test_anything_else_has_no_prompt(broken: bytes) -> None:
    assert prompt_bytes(broken) == b""
    assert fingerprint(b"", key=KEY).hashes == ()
    assert of_length(0).tokens == 1


def test_a_prompt_of_any_length_has_so_many_blocks_at_most() -> None:
    found = fingerprint(b"x" * 3_000_000, key=KEY)
    assert len(found.hashes) == BLOCKS_MOST == len(ENDS)
    assert found.tokens == 750_000


@given(st.binary(max_size=8000), st.binary(max_size=8000), st.binary(max_size=3000))
def test_hashes_agree_exactly_as_far_as_whole_blocks_do(head: bytes, one: bytes, two: bytes) -> None:
    first, second = fingerprint(head + one, key=KEY), fingerprint(head + two, key=KEY)
    agreed = next(
        (i for i, (a, b) in enumerate(zip(head + one, head + two, strict=False)) if a != b),
        min(len(head + one), len(head + two)),
    )
    whole = sum(end * 4 <= agreed for end in ENDS)
    assert first.hashes[:whole] == second.hashes[:whole]
    assert set(first.hashes[whole:]).isdisjoint(second.hashes[whole:])
