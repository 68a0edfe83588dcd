"""/v1/responses: one text message or one call of a function, whole or as the events that vLLM 0.29 sends for it.

Nothing is stored: `previous_response_id` finds nothing.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from serving.engine.fake import plan
from serving.engine.fake.engine import Engine, Usage, random_id
from serving.engine.fake.exchange import Exchange
from serving.engine.fake.plan import Choice, Wanted
from serving.engine.fake.protocol import Message, RefusalError, ResponsesRequest, parse


def conversation(request: ResponsesRequest) -> list[Message]:
    """The turns of a request: its instructions, then its input."""
    turns = [Message("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return [*turns, Message("user", request.input)]
    for item in request.input:
        role, content = item.get("role"), item.get("content")
        if isinstance(role, str) and isinstance(content, str | list):
            turns.append(Message(role, content))
        else:
            # Function calls and their results: what stands in them is part of the prompt.
            turns.append(Message("tool", msgspec.json.encode(item).decode()))
    return turns


def functions(request: ResponsesRequest) -> tuple[list[dict[str, Any]], str | dict[str, Any] | None]:
    """Its functions and which of them to call, in the form that chat has for them."""
    tools = [{"type": "function", "function": tool} for tool in request.tools or [] if tool.get("type") == "function"]
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": choice}
    return tools, choice


class Output(Protocol):
    """The one item that a response consists of, and the events that tell of it."""

    # The event of each token; its fields but the text itself, which is "".
    delta_kind: str
    delta_fields: dict[str, Any]

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        """With the first token, before it."""

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        """After the last token."""

    def item(self) -> dict[str, Any]:
        """The whole item."""


class Text:
    """A message of the assistant's."""

    delta_kind = "response.output_text.delta"

    def __init__(self, text: str) -> None:
        self._text = text
        self._id = f"msg_{random_id()}"
        self._place: dict[str, Any] = {"item_id": self._id, "output_index": 0, "content_index": 0}
        self.delta_fields = {**self._place, "delta": "", "logprobs": []}

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("response.output_item.added", {"output_index": 0, "item": self._item("in_progress", [])}),
            ("response.content_part.added", {**self._place, "part": self._part("")}),
        ]

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("response.output_text.done", {**self._place, "text": self._text, "logprobs": []}),
            ("response.content_part.done", {**self._place, "part": self._part(self._text)}),
            ("response.output_item.done", {"output_index": 0, "item": self.item()}),
        ]

    def item(self) -> dict[str, Any]:
        return self._item("completed", [self._part(self._text)])

    def _part(self, text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": []}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "content": content, "role": "assistant", "status": status, "type": "message"}


class Call:
    """A call of a function."""

    delta_kind = "response.function_call_arguments.delta"

    def __init__(self, name: str, arguments: str) -> None:
        self._name = name
        self._arguments = arguments
        self._id = random_id()
        self._call_id = f"call_{random_id()}"
        self._place: dict[str, Any] = {"item_id": self._id, "output_index": 0}
        self.delta_fields = {**self._place, "delta": ""}

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        return [("response.output_item.added", {"output_index": 0, "item": self._item("in_progress", "")})]

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        done = {**self._place, "arguments": self._arguments, "name": self._name}
        return [
            ("response.function_call_arguments.done", done),
            ("response.output_item.done", {"output_index": 0, "item": self.item()}),
        ]

    def item(self) -> dict[str, Any]:
        return self._item("completed", self._arguments)

    def _item(self, status: str, arguments: str) -> dict[str, Any]:
        call = {"name": self._name, "arguments": arguments, "call_id": self._call_id}
        return {"id": self._id, **call, "status": status, "type": "function_call"}


class Response:
    """The response object of one request, in its states."""

    def __init__(self, request: ResponsesRequest, model_id: str, choice: Choice, output: Output) -> None:
        self._request = request
        self._choice = choice
        self._output = output
        self._id = f"resp_{random_id()}"
        self._model_id = model_id
        self._created = int(time.time())

    def begun(self) -> dict[str, Any]:
        """Before the first token."""
        return self._object("in_progress", [], None)

    def ended(self) -> dict[str, Any]:
        """After the last token."""
        usage = Usage.of([self._choice.sequence])
        status = "completed" if self._choice.finish_reason == "stop" else "incomplete"
        return self._object(
            status,
            [self._output.item()],
            {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            },
        )

    def _object(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        request = self._request
        return {
            "id": self._id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "metadata": request.metadata,
            "model": self._model_id,
            "object": "response",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
            "tools": request.tools or [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "background": False,
            "max_output_tokens": self._choice.sequence.output_tokens,
            "previous_response_id": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": request.text,
            "truncation": "disabled",
            "usage": usage,
            "user": None,
        }


async def responses(engine: Engine, exchange: Exchange) -> None:
    """POST /v1/responses."""
    request = parse(ResponsesRequest, await exchange.body())
    name = engine.check_model(request)
    if request.previous_response_id:
        message = f"Response with id '{request.previous_response_id}' not found."
        raise RefusalError(404, message, kind="invalid_request_error", param="response_id")
    turns = conversation(request)
    tools, tool_choice = functions(request)
    call = plan.tool_call(tools, tool_choice, turns)
    wanted = Wanted(
        max_tokens=request.max_output_tokens,
        ignore_eos=bool(request.ignore_eos),
        text=call[1] if call else plan.structured_text((request.text or {}).get("format")),
        cache_salt=engine.salt(request),
    )
    (choice,) = plan.plan(plan.render_chat(turns, tools), wanted, engine.config, engine.max_model_len)
    engine.metrics.record_request(1, choice.sequence.output_tokens)
    output = Call(call[0], choice.text) if call else Text(choice.text)
    response = Response(request, name, choice, output)
    async with engine.running([choice.sequence], exchange) as ticket:
        if not request.stream:
            await ticket.finished()
            await exchange.json(response.ended())
            return
        await exchange.start_stream()
        events = Events(response, choice, output)
        await exchange.write(events.begun())
        written = 0
        while written < len(choice.pieces):
            await ticket.progress()
            produced = choice.sequence.produced
            opening = events.item_added() if written == 0 < produced else b""
            if body := b"".join(events.delta(i) for i in range(written, produced)):
                await exchange.write(opening + body)
            written = produced
    await exchange.write(events.ended(), more=False)


class Events:
    """The numbered events of one streamed response."""

    def __init__(self, response: Response, choice: Choice, output: Output) -> None:
        self._response = response
        self._choice = choice
        self._output = output
        self._number = 0
        encoded = msgspec.json.encode({**output.delta_fields, "type": output.delta_kind})
        before, after = encoded.split(b'"delta":""', 1)
        self._head = f"event: {output.delta_kind}\ndata: ".encode() + before + b'"delta":"'
        self._tail = b'"' + after[:-1] + b',"sequence_number":%d}\n\n'

    def begun(self) -> bytes:
        """Before the first token."""
        begun = self._response.begun()
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def item_added(self) -> bytes:
        """With the first token, before it."""
        return b"".join(self._event(kind, **fields) for kind, fields in self._output.opening())

    def delta(self, i: int) -> bytes:
        """A token."""
        number = self._number
        self._number += 1
        return self._head + self._choice.escaped[i] + self._tail % number

    def ended(self) -> bytes:
        """After the last token."""
        closing = b"".join(self._event(kind, **fields) for kind, fields in self._output.closing())
        return closing + self._event("response.completed", response=self._response.ended())

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
