"""A stream of responses begins when there is something to say; what is refused before is a plain answer."""

from __future__ import annotations

from typing import Any

import pytest

from serving.engine.late_head import LateHead

CREATED = b"event: response.created\ndata: {}\n\n"
IN_PROGRESS = b"event: response.in_progress\ndata: {}\n\n"
DELTA = b"event: response.output_text.delta\ndata: {}\n\n"
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
JSON = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


def body(content: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def answered(messages: list[Any], path: str = "/v1/responses") -> list[list[dict[str, Any]]]:
    """What has gone out after each step of an app's; an exception among its messages is raised."""
    sent: list[dict[str, Any]] = []
    steps = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            if isinstance(message, Exception):
                raise message
            await send(message)
            steps.append(list(sent))

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        await LateHead(app, lambda error: (422, {"error": str(error)}))({"type": "http", "path": path}, None, send)
    finally:
        steps.append(sent)
    return steps


async def test_nothing_goes_out_before_the_first_event_that_says_something() -> None:
    whole = [START, body(CREATED), body(IN_PROGRESS), body(DELTA), body(DELTA), body(b"", more=False)]
    steps = await answered(whole)
    assert [len(step) for step in steps] == [0, 0, 0, 4, 5, 6, 6]
    assert steps[-1] == whole


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_other_answers_are_passed_on_as_they_come(path: str) -> None:
    whole = [JSON, body(b"{}", more=False)]
    assert [len(step) for step in await answered(whole, path)] == [1, 2, 2]
    stream = [START, body(CREATED), body(b"", more=False)]
    expected = [1, 2, 3, 3] if path != "/v1/responses" else [0, 0, 3, 3]
    assert [len(step) for step in await answered(stream, path)] == expected


async def test_what_is_refused_before_is_a_plain_answer() -> None:
    wrapped = RuntimeError("Caught handled exception, but response already started.")
    wrapped.__cause__ = ValueError("no such schema")
    for error in (ValueError("no such schema"), wrapped):
        steps = await answered([START, body(CREATED), body(IN_PROGRESS), error])
        start, content = steps[-1]
        assert (start["status"], content["body"]) == (422, b'{"error":"no such schema"}')


async def test_what_fails_later_or_elsewhere_is_the_servers() -> None:
    for messages in ([START, body(DELTA), ValueError("x")], [ValueError("x")], [JSON, ValueError("x")]):
        with pytest.raises(ValueError, match="x"):
            await answered(messages)
