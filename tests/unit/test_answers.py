"""Usage out of answers: exact, whatever the chunks; and a client sees what it would have seen without."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serving.admission.bounds import RequestFacts
from serving.metering import answers
from serving.metering.usage import Usage

FINGERPRINT = 'vllm-0.29.0-"quoted"'
TEXTS = st.text(max_size=40) | st.sampled_from(
    ['"choices":[],"usage":{"prompt_tokens":9}', '"finish_reason":"stop"', "\n\ndata: [DONE]\n\n", '"usage":{']
)


@dataclass
class Exchange:
    path: str = "/v1/chat/completions"
    facts: RequestFacts | None = None


@dataclass
class Peer:
    fingerprint: bytes | None = None


def facts(*, include_usage: bool) -> RequestFacts:
    return RequestFacts("m", True, include_usage, 10, None, 1)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def chunk(text: str, finish: str | None = None, index: int = 0) -> dict[str, object]:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def stream(texts: list[str], usage: Usage | None, *, n: int, fingerprint: str | None) -> bytes:
    """As vLLM writes it: with a usage event the fingerprint is on that, without on each choice's last."""
    parts = [event(chunk(text, index=i % n)) for i, text in enumerate(texts)]
    for i in range(n):
        last = chunk("end", "stop", i)
        if usage is None and fingerprint is not None:
            last["system_fingerprint"] = fingerprint
        parts.append(event(last))
        parts += [event(chunk(text, index=n - 1)) for text in texts[:2] if i < n - 1]
    if usage is not None:
        counted = {
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "completion_tokens": usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
        said: dict[str, object] = {"id": "x", "model": "m", "choices": [], "usage": counted}
        if fingerprint is not None:
            said["system_fingerprint"] = fingerprint
        parts.append(event(said))
    return b"".join([*parts, b"data: [DONE]\n\n"])


def told(asked: bytes) -> bytes:
    """To a client that asked: every event but the last says that there is no usage yet."""
    *events, last, done, _ = asked.split(b"\n\n")
    return b"\n\n".join([*(event[:-1] + b',"usage":null}' for event in events), last, done, b""])


def cut(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """Chunks of whole events, as the relay hands them on."""
    events = [e + b"\n\n" for e in data.split(b"\n\n")[:-1]]
    at = 0
    for place in sorted({p % (len(events) + 1) for p in places} | {len(events)}):
        if place > at:
            yield b"".join(events[at:place])
        at = place


def relayed(meter: answers.Meter, chunks: Iterable[bytes]) -> bytes:
    return b"".join([meter.feed(c) for c in chunks]) + meter.end()


@given(
    texts=st.lists(TEXTS.filter(lambda t: "\n\n" not in json.dumps(t)), max_size=8),
    places=st.lists(st.integers(0, 100), max_size=10),
    n=st.integers(1, 3),
    include=st.booleans(),
    known=st.booleans(),
    fingerprint=st.sampled_from([None, FINGERPRINT]),
    tokens=st.tuples(*[st.integers(0, 10**6)] * 3),
)
def test_a_stream_looks_as_if_nobody_had_asked(
    texts: list[str],
    places: list[int],
    n: int,
    include: bool,
    known: bool,
    fingerprint: str | None,
    tokens: tuple[int, int, int],
) -> None:
    usage = Usage(*tokens)
    peer = Peer()
    if known:
        relayed(
            answers.meter(Exchange(facts=facts(include_usage=False)), peer, events=True),
            cut(stream([], usage, n=1, fingerprint=fingerprint), []),
        )
    meter = answers.meter(Exchange(facts=facts(include_usage=include)), peer, events=True)
    asked = stream(texts, usage, n=n, fingerprint=fingerprint)
    wanted = told(asked) if include else stream(texts, None, n=n, fingerprint=fingerprint)
    assert relayed(meter, cut(asked, places)) == wanted
    assert meter.usage == usage
    assert meter.usage_events == 1


@given(
    text=TEXTS,
    size=st.sampled_from([0, answers.WHOLE_BYTES - 300, answers.WHOLE_BYTES, 3 * answers.WHOLE_BYTES]),
    places=st.lists(st.integers(0, 4 * answers.WHOLE_BYTES), max_size=6),
    path=st.sampled_from(["/v1/chat/completions", "/v1/embeddings", "/v1/rerank", "/v1/responses"]),
    behind=st.booleans(),
)
def test_a_whole_answer_says_its_usage(text: str, size: int, places: list[int], path: str, behind: bool) -> None:
    names = ("input_tokens", "output_tokens", "input_tokens_details")
    if path != "/v1/responses":
        names = ("prompt_tokens", "completion_tokens", "prompt_tokens_details")
    usage = {names[0]: 7, names[1]: 5, names[2]: {"cached_tokens": 3, "multimodal_tokens": {"image": 2}}}
    forged = {"usage": {names[0]: 1}}
    body: dict[str, object] = {"id": text, "data": ["x" * size, text, forged], "usage": usage}
    if path == "/v1/rerank":
        body = {"id": text, "usage": usage, "results": ["x" * size, text, forged]}
    if behind:
        body["prompt_token_ids"] = [1] * 900
    data = json.dumps(body, separators=(",", ":")).encode()
    bounds = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    chunks = [data[a:b] for a, b in pairwise(bounds) if b > a]
    meter = answers.meter(Exchange(path, facts(include_usage=False)), Peer(), events=False)
    assert relayed(meter, chunks) == data
    assert meter.usage == Usage(7, 5, 3)


def test_responses_say_it_in_their_last_event() -> None:
    meter = answers.meter(Exchange("/v1/responses", facts(include_usage=False)), Peer(), events=True)
    details = {"input_tokens": 4, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 1}}
    ended = b"event: response.completed\n" + event({"response": {"usage": details}, "type": "response.completed"})
    begun = b"event: response.created\n" + event({"response": {"usage": None}})
    assert relayed(meter, [begun, ended]) == begun + ended
    assert meter.usage == Usage(4, 6, 1)


def test_a_stream_that_breaks_off_says_nothing() -> None:
    meter = answers.meter(Exchange(facts=facts(include_usage=False)), Peer(b""), events=True)
    begun = event(chunk("a")) + event(chunk("b", "stop"))
    assert relayed(meter, [begun]) == begun
    assert meter.usage is None


def test_what_waits_for_a_fingerprint_is_bounded() -> None:
    meter = answers.meter(Exchange(facts=facts(include_usage=False)), Peer(), events=True)
    large = event(chunk("x" * (answers.HELD_BYTES // 2), "stop"))
    assert meter.feed(large) == b""
    assert meter.feed(large) + meter.feed(large) == large * 3


def test_usage_that_is_said_all_along_stays() -> None:
    meter = answers.meter(Exchange(facts=facts(include_usage=True)), Peer(), events=True)
    running = event(chunk("a") | {"usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}})
    assert relayed(meter, [running, running + running]) == running * 3


@given(
    st.integers(0, 10**6), st.integers(0, 12), st.lists(st.integers(0, 9000), max_size=5), st.sampled_from([0, 5000])
)
def test_of_an_answer_without_tokens_none_is_told(prompt: int, written: int, places: list[int], size: int) -> None:
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + written, "completion_tokens": written}
    usage_text = json.dumps(usage, separators=(",", ":"))
    body = {"text": "x" * size + usage_text, "usage": usage | {"prompt_tokens_details": {"cached_tokens": 0}}}
    data = json.dumps(body, separators=(",", ":")).encode()
    bounds = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    chunks = [data[a:b] for a, b in pairwise(bounds) if b > a]
    exchange = Exchange("/v1/completions", RequestFacts("m", False, False, 10, 0, 1))
    meter = answers.meter(exchange, Peer(), events=False)
    out = relayed(meter, chunks)
    assert len(out) == len(data)
    assert json.loads(out) == body | {
        "usage": usage | {"total_tokens": prompt, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    }
    # What the engine counted: the row says what of it is billed.
    assert meter.usage == Usage(prompt, written, 0)
    streamed = Exchange("/v1/completions", RequestFacts("m", True, True, 10, 0, 1))
    meter = answers.meter(streamed, Peer(), events=True)
    last = relayed(meter, [event({"choices": [], "usage": usage})])
    assert json.loads(last.removeprefix(b"data: "))["usage"] == usage | {"total_tokens": prompt, "completion_tokens": 0}
    # What the engine counted: the row says what of it is billed.
    assert meter.usage == Usage(prompt, written, 0)
