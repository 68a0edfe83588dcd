"""The error bodies, read by the client our users have: the openai SDK raises its own typed exceptions."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from serving.api import errors
from serving.errors import (
    BadRequest,
    Forbidden,
    HeadersTooLarge,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestError,
    RequestTimeout,
    Unauthenticated,
    Unavailable,
    UpstreamFailed,
    UpstreamTimeout,
)

CASES: list[tuple[RequestError, type[openai.APIStatusError]]] = [
    (BadRequest("'n' is too large.", code="integer_above_max_value", param="n"), openai.BadRequestError),
    (Unauthenticated("The API key is not valid."), openai.AuthenticationError),
    (Forbidden("Not for this key."), openai.PermissionDeniedError),
    (NotFound("There is no such model.", code="model_not_found", param="model"), openai.NotFoundError),
    (MethodNotAllowed("Use POST.", allow=("POST",)), openai.APIStatusError),
    (RequestTimeout("The body did not arrive."), openai.APIStatusError),
    (PayloadTooLarge("At most 4 MiB."), openai.APIStatusError),
    (HeadersTooLarge("At most 8 KiB."), openai.APIStatusError),
    (UpstreamFailed("The engine broke off."), openai.InternalServerError),
    (Unavailable("The model is starting.", retry_after_s=5), openai.InternalServerError),
    (UpstreamTimeout("The engine did not answer."), openai.InternalServerError),
]


def client(response: httpx.Response) -> openai.OpenAI:
    transport = httpx.MockTransport(lambda request: response)
    return openai.OpenAI(
        api_key="sk-x",
        base_url="http://gateway.test/v1",
        max_retries=0,
        http_client=httpx.Client(transport=transport),
    )


@pytest.mark.parametrize(("error", "kind"), CASES, ids=lambda case: type(case).__name__)
def test_the_sdk_raises_its_typed_error(error: RequestError, kind: type[openai.APIStatusError]) -> None:
    response = httpx.Response(error.status, headers=errors.headers(error), content=errors.body(error))
    with client(response) as sdk, pytest.raises(kind) as caught:
        sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    raised = caught.value
    assert raised.status_code == error.status
    assert (raised.code, raised.param, raised.type) == (error.code, error.param, error.type)
    assert isinstance(raised.body, dict)
    assert raised.body["message"] == error.message
    assert error.message in raised.message


@pytest.mark.parametrize(("error", "kind"), CASES, ids=lambda case: type(case).__name__)
def test_headers(error: RequestError, kind: type) -> None:
    found = dict(errors.headers(error))
    assert found[b"content-type"] == b"application/json"
    assert int(found[b"content-length"]) == len(errors.body(error))
    assert (b"www-authenticate" in found) == (error.status == 401)
    assert found.get(b"retry-after") == (b"5" if error.retry_after_s else None)


def test_body_has_the_four_fields_alone() -> None:
    found = json.loads(errors.body(BadRequest("quote \" and 'é' and \n", code="c", param="p")))
    assert found == {
        "error": {
            "message": "quote \" and 'é' and \n",
            "type": "invalid_request_error",
            "param": "p",
            "code": "c",
        }
    }


def test_a_stream_that_breaks_raises_in_the_sdk() -> None:
    chunk = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}],
    }
    stream = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    stream += errors.sse_event(UpstreamFailed("The engine broke off.\n\ndata: [DONE]"))
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    seen = []

    def read_all(sdk: openai.OpenAI) -> None:
        message: ChatCompletionUserMessageParam = {"role": "user", "content": "x"}
        for event in sdk.chat.completions.create(model="m", messages=[message], stream=True):
            seen.append(event.choices[0].delta.content)

    with client(response) as sdk, pytest.raises(openai.APIError, match="broke off") as caught:
        read_all(sdk)
    assert seen == ["Hel"]
    assert caught.value.code == "engine_failed"


def test_what_utf8_cannot_carry_is_replaced() -> None:
    found = json.loads(errors.body(NotFound("no route /\udcff", param="\ud800")))
    assert found["error"]["message"] == "no route /?"
    assert found["error"]["param"] == "?"
