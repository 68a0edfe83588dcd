"""Token ids beyond a model's vocabulary reach no engine, once a replica has said how many there are."""

from __future__ import annotations

from typing import Any

import pytest

from serving.admission.bounds import BodyKind, read
from serving.admission.vocabulary import Vocabularies
from serving.config import FakeEngineConfig, LimitsConfig
from serving.errors import BadRequest
from tests.unit.test_gateway import AUTH, FAST, rig

SMALL = FakeEngineConfig(decode_ms=1, token_ids=1000)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [1000, 1]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [1000]]}, "prompt"),
        ("/v1/chat/completions", {"stop_token_ids": [1000], "min_tokens": 1}, "stop_token_ids"),
        ("/v1/chat/completions", {"logit_bias": {"1000": 1}}, "logit_bias"),
        ("/detokenize", {"tokens": [1000]}, "tokens"),
    ],
)
async def test_the_gateway_refuses_what_the_embedding_does_not_have(
    stream: bool, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "chat", "max_tokens": 2, "stream": stream} | fields
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "hello"}]
    async with rig(SMALL) as made:
        made.gateway.vocabularies.learn("chat", [1000])
        answer = await made.http.post(path, headers=AUTH, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert "at most 999" in error["message"]
        assert made.total("galerne_requests_accepted_total") == 0


async def test_an_engine_refuses_them_where_its_gateway_does_not_know() -> None:
    async with rig(SMALL) as made:
        body = {"model": "chat", "prompt": [1000, 1], "max_tokens": 2}
        answer = await made.http.post("/v1/completions", headers=AUTH, json=body)
        assert answer.status_code == 400
        assert "vocabulary" in answer.text
        assert (await made.http.post("/v1/completions", headers=AUTH, json=body | {"prompt": [999]})).status_code == 200


async def test_ids_of_any_size_pass_where_nothing_is_known() -> None:
    async with rig(FAST) as made:
        body = {"model": "chat", "prompt": [2**31 - 1], "max_tokens": 2}
        assert (await made.http.post("/v1/completions", headers=AUTH, json=body)).status_code == 200


def test_what_was_said_last_stands_while_no_replica_is_there() -> None:
    facts = read(BodyKind.COMPLETION, b'{"model": "m", "prompt": [5]}', LimitsConfig())
    known = Vocabularies()
    known.check("m", facts)
    known.learn("m", [6, 5])  # an update of weights is under way
    with pytest.raises(BadRequest):
        known.check("m", facts)
    known.learn("m", [])
    with pytest.raises(BadRequest):
        known.check("m", facts)
    known.learn("m", [6])
    known.check("m", facts)
