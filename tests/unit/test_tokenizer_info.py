"""A model's tokenizer for harnesses that have no copy of it: what is told, of whom, and what is not."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serving.api.tokenizer_info import asked_model
from serving.config import FakeEngineConfig
from serving.errors import BadRequest
from tests.unit.test_gateway import KEY, rig

ONE_MODEL: dict[str, Any] = {"models": ["chat"]}
ENGINE = FakeEngineConfig(decode_ms=0)
AUTH = {"authorization": f"Bearer {KEY}"}


def telling(content: dict[str, Any]) -> Callable[[Any], Any]:
    """An engine that tells this of its tokenizer, as vLLM does: with the paths of its machine."""

    def wrap(app: Any) -> Any:
        async def answer(
            scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
        ) -> None:
            if scope["path"] != "/tokenizer_info":
                await app(scope, receive, send)
                return
            assert scope["method"] == "GET"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(content).encode()})

        return answer

    return wrap


async def test_what_harnesses_need_is_told_and_nothing_of_the_machine() -> None:
    told = {"tokenizer_class": "T", "eos_token": "</s>", "chat_template": "{{ m }}", "model_max_length": 1e30}
    own = {"name_or_path": "/secret/path", "is_local": True, "vocab_file": "/secret/vocab", "unheard_of": "/secret/x"}
    async with rig(ENGINE, tenant=ONE_MODEL, wrap=telling(told | own)) as running:
        answer = await running.http.get("/tokenizer_info", headers=AUTH)
        named = await running.http.get("/tokenizer_info", params={"model": "chat"}, headers=AUTH)
    assert answer.status_code == 200, answer.text
    assert answer.json() == named.json() == told


async def test_the_simulated_engine_tells_of_its_own() -> None:
    async with rig(ENGINE, tenant=ONE_MODEL) as running:
        answer = await running.http.get("/tokenizer_info", headers=AUTH)
    assert answer.json() == {"tokenizer_class": "FakeTokenizer"}


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 400, "missing_required_parameter"),
        ("?model=nope", 404, "model_not_found"),
        ("?modell=chat", 400, "unknown_parameter"),
    ],
)
async def test_a_key_with_several_models_names_one(query: str, status: int, code: str) -> None:
    async with rig(ENGINE) as running:
        refused = await running.http.get(f"/tokenizer_info{query}", headers=AUTH)
        nobody = await running.http.get(f"/tokenizer_info{query}")
        post = await running.http.post(f"/tokenizer_info{query}", headers=AUTH)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert (nobody.status_code, post.status_code) == (401, 405)


async def test_an_answer_that_cannot_be_read_is_not_passed_on() -> None:
    async with rig(ENGINE, tenant=ONE_MODEL, wrap=telling({"tokenizer_class": {"path": "/secret"}})) as running:
        refused = await running.http.get("/tokenizer_info", headers=AUTH)
    assert refused.status_code == 503
    assert "secret" not in refused.text


async def test_without_a_replica_it_is_a_503() -> None:
    async with rig(dead=1, tenant=ONE_MODEL) as running:
        refused = await running.http.get("/tokenizer_info", headers=AUTH)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)


@pytest.mark.parametrize("tenant", [ONE_MODEL, None])
async def test_text_routes_mean_the_keys_only_model(tenant: dict[str, Any] | None) -> None:
    async with rig(ENGINE, tenant=tenant) as running:
        tokens = await running.http.post("/tokenize", json={"prompt": "abcd"}, headers=AUTH)
        text = await running.http.post("/detokenize", json={"tokens": [1684234849]}, headers=AUTH)
        chat = await running.http.post("/v1/completions", json={"prompt": "abcd", "max_tokens": 1}, headers=AUTH)
    if tenant is None:
        assert {found.status_code for found in (tokens, text, chat)} == {400}
        assert tokens.json()["error"]["param"] == "model"
    else:
        assert tokens.json()["count"] > 0
        assert text.json() == {"prompt": "abcd"}
        assert chat.status_code == 400, "what computes names its model, as OpenAI asks for"


def test_a_query_names_at_most_one_model() -> None:
    assert (asked_model(b""), asked_model(b"model=a%2Fb")) == (None, "a/b")
    for query in (b"model=a&model=b", b"model", b"model=%ff", b"\xff=1", b"x=1"):
        with pytest.raises(BadRequest):
            asked_model(query)
