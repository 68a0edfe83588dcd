"""What a request is expected to take: bodies of many prompts, and tenants whose traffic is nobody else's business."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from serving.admission.bounds import BodyKind, RequestFacts, read
from serving.admission.capacity import Capacity
from serving.admission.estimates import OUTPUT_TOKENS, TokenEstimates
from serving.admission.in_flight import InFlight
from serving.config import FakeEngineConfig, GalerneConfig, LimitsConfig, QuotaConfig
from serving.metering.usage import Usage
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, rig

OTHER = {"authorization": "Bearer sk-other"}
# Of a default system prompt and a chat template.
WITHOUT_TEXT = 30


def facts(size_bytes: int, most: int | None = None, **more: Any) -> RequestFacts:
    return RequestFacts("m", False, False, size_bytes, most, more.pop("n", 1), **more)


def learn(estimates: TokenEstimates, tenant: str, size_bytes: int, prompt: int, answer: int, **more: Any) -> None:
    estimates.learn(tenant, facts(size_bytes, **more), Usage(prompt, answer))


def test_a_body_of_many_prompts_is_as_many_sequences_and_answers() -> None:
    estimates = TokenEstimates()
    cost = estimates.cost("a", facts(64 * 40, 200, prompts=64, n=2), 0)
    assert (cost.sequences, cost.output_tokens, cost.input_tokens) == (128, 128 * 200, 640)
    for _ in range(300):
        learn(estimates, "a", 64 * 40, 64 * 12, 64 * 2 * 50, prompts=64, n=2)
    assert estimates.output_tokens == pytest.approx(50, rel=0.05)
    assert estimates.cost("a", facts(40), 0).output_tokens == pytest.approx(50, rel=0.05)
    assert estimates.cost("a", facts(40), 0).input_tokens == pytest.approx(12, rel=0.05)


def test_short_prompts_say_little_of_long_ones() -> None:
    """300 times "hi" under a chat template: it is the template that costs, not the text."""
    estimates = TokenEstimates()
    for _ in range(300):
        learn(estimates, "a", 2, WITHOUT_TEXT + 1, 8)
    assert estimates.cost("a", facts(2), 0).input_tokens == pytest.approx(31, rel=0.05)
    assert estimates.cost("a", facts(8000), 0).input_tokens == pytest.approx(2030, rel=0.15)


@pytest.mark.parametrize("bytes_per_token", [1.5, 2.5, 4.5])
def test_prompts_of_all_lengths_are_told_within_a_tenth(bytes_per_token: float) -> None:
    rng, estimates = Random(1), TokenEstimates()
    for _ in range(100):
        size = round(10 ** rng.uniform(0.5, 4.5))
        learn(estimates, "a", size, WITHOUT_TEXT + round(size / bytes_per_token), 8)
    for size in (300, 3000, 30_000):
        expected = WITHOUT_TEXT + size / bytes_per_token
        assert estimates.cost("a", facts(size), 0).input_tokens == pytest.approx(expected, rel=0.1)


def test_a_new_kind_of_traffic_is_believed_after_some_requests() -> None:
    estimates = TokenEstimates()
    for _ in range(300):
        learn(estimates, "a", 2, 31, 8)
    for _ in range(20):
        learn(estimates, "a", 8000, WITHOUT_TEXT + 5000, 900)
    assert estimates.cost("a", facts(8000), 0).input_tokens == pytest.approx(5030, rel=0.05)


@pytest.mark.parametrize(
    "neighbour",
    [
        [(2, 31, 8)],  # short prompts under a long template
        [(1, 5000, 1)],
        [(9000, 9000, 5000), (3, 4, 7000)],  # tokens of one byte each, and answers without end
    ],
)
def test_what_is_expected_of_a_tenant_is_not_moved_by_another(neighbour: list[tuple[int, int, int]]) -> None:
    estimates, alone = TokenEstimates(), TokenEstimates()
    for known in (estimates, alone):
        for _ in range(20):
            learn(known, "quiet", 800, 230, 100)
    for _ in range(300):
        for size, prompt, answer in neighbour:
            learn(estimates, "loud", size, prompt, answer)
    for tenant in ("quiet", "new"):
        for asked in (facts(5), facts(8000), facts(8000, 4000)):
            assert estimates.cost(tenant, asked, 0) == alone.cost(tenant, asked, 0)


def test_what_an_engine_reports_is_believed_within_bounds() -> None:
    estimates = TokenEstimates()
    for size, prompt in ((10, 10**9), (10**6, 1), (0, 50), (10, 0)) * 50:
        learn(estimates, "a", size, prompt, 1)
        for asked in (1, 10**6):
            assert asked / 16 <= estimates.cost("a", facts(asked), 0).input_tokens <= asked + 4096
    estimates.keep({"b"})
    assert estimates.cost("a", facts(4), 0).output_tokens == OUTPUT_TOKENS


def test_token_ids_are_counted_not_guessed() -> None:
    estimates = TokenEstimates()
    for _ in range(100):
        learn(estimates, "a", 100, 80, 8)
    cost = estimates.cost("a", facts(4 * 500, 10, prompts=2, token_ids=500), 0)
    assert cost.input_tokens == pytest.approx(500, rel=0.1)
    assert cost.stated_tokens == 500 + 2 * 10


# -- more than engines compute at a time


def test_what_is_larger_than_all_slots_gets_its_turn_and_then_the_others() -> None:
    flight = InFlight(Capacity(8))
    flight.resize(1)
    assert flight.room(0, 64, reserve=False)  # nothing is in flight
    flight.take(0, 64)
    assert not flight.room(0, 1, reserve=True)
    flight.give(0, 64)
    for _ in range(4):
        flight.take(0, 1)
    assert flight.room(0, 64, reserve=False)  # while others go on
    flight.take(0, 1)
    assert not flight.room(0, 64, reserve=False)
    assert flight.room(0, 3, reserve=False)


async def test_bodies_of_many_prompts_take_slots_of_the_gateway_and_tokens_of_the_quota() -> None:
    body = {"model": "chat", "prompt": ["hello there friend"] * 64, "max_tokens": 20, "ignore_eos": True}
    engine = FakeEngineConfig(decode_ms=5, batch_slots=8)
    quota = {"quota": {"tokens_per_minute": 3000}}
    async with rig(engine, tenant=quota, chat={"hold": {"sequences_per_replica": 8}}) as made:
        asking = asyncio.create_task(made.http.post("/v1/completions", headers=AUTH, json=body))
        await asyncio.sleep(0.1)
        (_, _), (sequences, _) = made.gateway.hold["chat"].budget()
        assert sequences == 64
        second = asyncio.create_task(made.http.post("/v1/completions", headers=OTHER, json=body))
        await asyncio.sleep(0.05)
        assert made.gateway.hold["chat"].held() == {"other": 1}
        answer = await asking
        assert answer.status_code == 200
        reserved = 3000 - int(answer.headers["x-ratelimit-remaining-tokens"])
        assert reserved >= 64 * 20
        assert (await second).status_code == 200
        # As many answers as the limit does not have tokens for.
        large = await made.http.post(
            "/v1/completions", headers=AUTH, json=body | {"max_tokens": 200, "ignore_eos": True}
        )
        assert large.status_code == 429
        assert "Request too large" in large.json()["error"]["message"]
        assert large.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("kind", "fields", "sequences", "token_ids"),
    [
        (BodyKind.COMPLETION, {"prompt": "a"}, 1, 0),
        (BodyKind.COMPLETION, {"prompt": ["a", "b", "c"], "n": 2}, 6, 0),
        (BodyKind.COMPLETION, {"prompt": [1, 2, 3]}, 1, 3),
        (BodyKind.COMPLETION, {"prompt": [[1, 2, 3], [4]]}, 2, 4),
        (BodyKind.EMBEDDING, {"input": ["a", "b", "c"]}, 3, 0),
        (BodyKind.EMBEDDING, {"messages": [{"role": "user", "content": "a"}]}, 1, 0),
        (BodyKind.RERANK, {"query": "q", "documents": ["a", "b"]}, 3, 0),
        (BodyKind.SCORE, {"text_1": "q", "text_2": ["a", "b", "c", "d"]}, 5, 0),
        (BodyKind.CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3}, 3, 0),
        (BodyKind.RESPONSES, {"input": "a"}, 1, 0),
    ],
)
def test_prompts_of_a_body_are_counted(kind: BodyKind, fields: dict[str, Any], sequences: int, token_ids: int) -> None:
    found = read(kind, json.dumps({"model": "m"} | fields).encode(), LimitsConfig())
    assert (found.sequences, found.token_ids) == (sequences, token_ids)
    generates = kind not in {BodyKind.EMBEDDING, BodyKind.RERANK, BodyKind.SCORE}
    cost = TokenEstimates(generates=generates).cost("a", found, 0)
    assert cost.sequences == sequences
    assert (cost.output_tokens > 0) is generates


# -- what nobody is refused for


def limited(tokens_per_minute: int) -> Any:
    def change(config: GalerneConfig) -> GalerneConfig:
        first, other, *rest = config.tenants
        quota = QuotaConfig(tokens_per_minute=tokens_per_minute)
        return config.model_copy(update={"tenants": (first, other.model_copy(update={"quota": quota}), *rest)})

    return change


async def test_nobody_is_refused_for_what_others_send() -> None:
    hello = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
    long = hello | {
        "messages": [{"role": "user", "content": "The harbour lies quiet at night. " * 240}],
        "max_tokens": 8,
    }
    async with rig(FakeEngineConfig(decode_ms=0), change=limited(10_000)) as made:
        batch = {"model": "chat", "prompt": ["x"] * 64, "max_tokens": 300, "ignore_eos": True}
        for _ in range(5):
            assert (await made.http.post("/v1/completions", headers=AUTH, json=batch)).status_code == 200
        hi = hello | {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        for _ in range(6):
            await asyncio.gather(*(made.http.post(COMPLETIONS, headers=AUTH, json=hi) for _ in range(50)))
        for body in (long, hello):
            answer = await made.http.post(COMPLETIONS, headers=OTHER, json=body)
            assert answer.status_code == 200, answer.text
            remaining = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert remaining > 10_000 - 2200 - 300


async def test_what_is_only_expected_to_be_too_large_waits_for_its_minute() -> None:
    async with rig(FAST, change=limited(200)) as made:
        # An answer of 256 tokens is expected, where 200 a minute are allowed: nobody knows that it will be so long.
        unnamed = {name: value for name, value in CHAT.items() if name != "max_tokens"}
        assert (await made.http.post(COMPLETIONS, headers=OTHER, json=unnamed)).status_code == 200
        again = await made.http.post(COMPLETIONS, headers=OTHER, json=unnamed)
        assert again.status_code == 429
        assert 0 < int(again.headers["retry-after"]) <= 61
        assert "x-should-retry" not in again.headers
        named = await made.http.post(COMPLETIONS, headers=OTHER, json=CHAT | {"max_tokens": 1000, "ignore_eos": True})
        assert "Request too large" in named.json()["error"]["message"]
        assert named.headers["x-should-retry"] == "false"


def test_what_is_computed_without_a_token_is_expected_too() -> None:
    ids = RequestFacts("m", False, False, 400, 0, 2, token_ids=100)
    plain = TokenEstimates().cost("t", ids, 0)
    scored = TokenEstimates().cost("t", replace(ids, prompt_logprobs=True), 0)
    # The head over the vocabulary for each token of the prompt, and for each of two answers.
    assert (scored.beside_tokens, scored.input_tokens, scored.stated_tokens) == (200, plain.input_tokens + 200, 300)
    compiled = TokenEstimates().cost("t", replace(ids, schema_states=40), 0)
    assert (compiled.beside_tokens, compiled.input_tokens, compiled.stated_tokens) == (40, 140, 140)
