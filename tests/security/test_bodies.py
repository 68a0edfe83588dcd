"""Bodies that cost an engine or a gateway dear (THREATS 3 to 9): refused by name, before an engine hears of them.

How long a refusal takes is for benchmarks; what is held here is that no engine is called and that memory stays bounded.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.bounds import BodyKind, read
from serving.config import LimitsConfig
from serving.errors import BadRequest
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, Rig, rig

COMPLETION, RESPONSES = "/v1/completions", "/v1/responses"
PROMPT = {"model": "chat", "prompt": "x"}
INPUT = {"model": "chat", "input": "x"}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}}
    return found


def image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def part(**fields: Any) -> dict[str, Any]:
    # The engine looks at a media key even where the type says text.
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | fields]}]}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def tool(value: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "x", "parameters": value}}]}


HOSTILE: list[tuple[int, str, dict[str, Any]]] = [
    # 3: unbounded numbers and lists
    (3, COMPLETIONS, {"n": 10**9}),
    (3, COMPLETIONS, {"n": 2**63}),
    (3, COMPLETIONS, {"max_tokens": 2**31}),
    (3, COMPLETIONS, {"max_completion_tokens": 10**12}),
    (3, COMPLETIONS, {"stop": ["x"] * 10_000}),
    (3, COMPLETIONS, {"stop": ["x" * 100_000]}),
    (3, COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(5000)}}),
    (3, COMPLETIONS, {"bad_words": ["x"] * 10_000}),
    (3, COMPLETION, PROMPT | {"best_of": 10_000}),
    (3, COMPLETION, PROMPT | {"use_beam_search": True, "n": 8}),
    (3, COMPLETION, PROMPT | {"prompt": ["x"] * 10_000}),
    (3, COMPLETION, PROMPT | {"prompt": [[1] * 50_000, [1] * 50_000]}),
    (3, RESPONSES, INPUT | {"max_output_tokens": 10**10}),
    # 4: logprobs
    (4, COMPLETIONS, {"prompt_logprobs": -1}),
    (4, COMPLETIONS, {"prompt_logprobs": 10**6}),
    # As many of each token of a long prompt, by their own name and by what `echo` makes of others.
    (4, COMPLETIONS, {"prompt_logprobs": 20, "messages": [{"role": "user", "content": "x " * 50_000}]}),
    (4, COMPLETION, PROMPT | {"prompt": [1] * 100_000, "echo": True, "logprobs": 20, "max_tokens": 0}),
    (4, COMPLETIONS, {"logprobs": True, "top_logprobs": 100_000}),
    (4, COMPLETION, PROMPT | {"logprobs": 10**6}),
    # 5: templates
    (5, COMPLETIONS, {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}),
    (5, COMPLETIONS, {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}),
    (5, COMPLETIONS, {"chat_template_kwargs": {"chat_template": "x"}}),
    # 6: schemas
    (6, COMPLETIONS, schema(nested(200))),
    (6, COMPLETIONS, schema({"pattern": "x" * 100_000})),
    (6, COMPLETIONS, tool(nested(200))),
    (6, COMPLETIONS, tool({"enum": ["x" * 50] * 2000})),
    (6, COMPLETIONS, {"structured_outputs": {"structural_tag": "[" * 5000}}),
    (6, COMPLETIONS, {"guided_regex": "(" * 100_000}),
    # 7: media by address
    (7, COMPLETIONS, image("http://169.254.169.254/latest/meta-data/")),
    (7, COMPLETIONS, image("http://allowed.example\\@169.254.169.254/")),
    (7, COMPLETIONS, image("https://redirect.example/to-metadata")),
    (7, COMPLETIONS, image("file:///etc/passwd")),
    (7, COMPLETIONS, part(image_url={"url": "http://[::ffff:169.254.169.254]/"})),
    (7, COMPLETIONS, part(file_url="http://127.0.0.1:8265/")),
    # 8: media as bytes
    (8, COMPLETIONS, image("data:image/jp2;base64,AAAA")),
    (8, COMPLETIONS, part(input_audio={"data": "AAAA", "format": "wav"})),
    (8, COMPLETIONS, part(video_url={"url": "data:video/mp4;base64,AAAA"})),
    (8, COMPLETIONS, {"mm_processor_kwargs": {"num_crops": 10**6}}),
    # 9: tensors
    (9, COMPLETION, PROMPT | {"prompt_embeds": "gAJjdG9yY2gK"}),
    (9, COMPLETIONS, part(prompt_embeds="gAJjdG9yY2gK")),
    (9, COMPLETIONS, part(image_embeds="gAJjdG9yY2gK")),
]


@pytest.fixture
async def counted() -> AsyncIterator[tuple[Rig, list[str]]]:
    """A rig, and the paths that its engine was asked for."""
    asked: list[str] = []

    def wrap(app: Any) -> Any:
        async def counting(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                asked.append(scope["path"])
            await app(scope, receive, send)

        return counting

    async with rig(FAST, wrap=wrap) as made:
        yield made, asked


async def test_none_of_them_reaches_an_engine(counted: tuple[Rig, list[str]]) -> None:
    made, asked = counted
    for threat, path, fields in HOSTILE:
        body = fields if "prompt" in fields or "input" in fields else CHAT | fields
        answer = await made.http.post(path, headers=AUTH, json=body)
        what = (threat, path, str(fields)[:80], answer.text[:200])
        # Where one is larger than a body may be, that is said first.
        assert answer.status_code in {400, 413}, what
        assert asked == [], what
    assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
    assert asked == [COMPLETIONS]
    assert made.total("galerne_requests_accepted_total") == 1


def test_every_class_is_among_them() -> None:
    assert {threat for threat, _, _ in HOSTILE} == set(range(3, 10))


WIDE = [
    b'{"model": "m", "messages": [' + b'{"role": "user", "content": "x"},' * 100_000 + b"{}]}",
    b'{"model": "m", "messages": [], "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(250_000)) + b"}}",
    b'{"model": "m", "messages": ' + b"[" * 2_000_000,
    b'{"model": "m", "messages": [], "x": [' + b"1," * 1_900_000 + b"1]}",
    b'{"model": "m", "messages": [], "tools": [' + b"{}," * 900_000 + b"{}]}",
    b'{"model": "m", "messages": [], "stop": [' + b'"",' * 900_000 + b'""]}',
]


@pytest.mark.parametrize("body", WIDE, ids=range(len(WIDE)))
def test_refusing_a_body_takes_no_multiple_of_its_size(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest):
            read(BodyKind.CHAT, body, LimitsConfig())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(body) + 1024 * 1024


NUMBERS = ("n", "max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs", "prompt_logprobs")


@settings(max_examples=200)
@given(st.sampled_from(NUMBERS), st.integers(min_value=2**31) | st.integers(max_value=-1))
def test_no_number_out_of_bounds_passes(name: str, value: int) -> None:
    with pytest.raises(BadRequest):
        read(BodyKind.CHAT, json.dumps(CHAT | {name: value}).encode(), LimitsConfig())
