"""/v1/chat/completions and /v1/completions: answers whole and as event streams, in vLLM 0.29's shapes.

A stream costs one `send` per token and sequence: what surrounds a token in its event is built once per
answer, and the token's bytes are put between.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from serving.engine.fake import plan
from serving.engine.fake.engine import Engine, Usage, random_id, request_id
from serving.engine.fake.exchange import Exchange
from serving.engine.fake.plan import Choice, Wanted
from serving.engine.fake.protocol import (
    FINGERPRINT,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse,
    prompts,
)

DONE = b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Shape:
    """How an answer is written down; one per request, a subclass per endpoint."""

    stream_object: str
    object: str

    def __init__(self, answer_id: str, model_id: str) -> None:
        self.base = {"id": answer_id, "object": self.stream_object, "created": int(time.time())}
        self.base["model"] = model_id

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002
        """What a choice's stream begins with, before its first token; None where there is no such thing."""
        return None

    def part(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A choice in a stream's event: some text, and at its end why it ended."""
        raise NotImplementedError

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice of an answer that is not streamed."""
        raise NotImplementedError

    def frame(self, index: int) -> tuple[bytes, bytes]:
        """The bytes around the text of a choice's events, all but the last."""
        # A text that JSON leaves alone and that no id holds: ids come from headers, which are Latin-1.
        mark = "␟"
        head, tail = _event({**self.base, "choices": [self.part(index, mark, None)]}).split(mark.encode(), 1)
        return head, tail


class CompletionShape(Shape):
    """/v1/completions."""

    stream_object = object = "text_completion"

    def part(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**choice, "stop_reason": None, "prompt_token_ids": None, "token_ids": None}

    def whole(self, choice: Choice) -> dict[str, Any]:
        unset = {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
        return {**self.part(choice.index, choice.text, choice.finish_reason), **unset}


class ChatShape(Shape):
    """/v1/chat/completions; with `tool` (its name) the text is the arguments of one call."""

    stream_object = "chat.completion.chunk"
    object = "chat.completion"

    def __init__(self, answer_id: str, model_id: str, *, tool: str | None, tool_named: bool) -> None:
        super().__init__(answer_id, model_id)
        self._tool = tool
        # OpenAI's rule, kept by vLLM: "stop" after a call that the client named.
        self._stop = "tool_calls" if tool and not tool_named else "stop"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._tool:
            call = {"id": f"chatcmpl-tool-{random_id()}", "type": "function", "index": 0}
            delta["tool_calls"] = [{**call, "function": {"name": self._tool, "arguments": ""}}]
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if self._tool:
            delta = {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        choice = {"index": index, "delta": delta, "logprobs": None}
        if finish_reason is None:
            return {**choice, "finish_reason": None, "token_ids": None}
        return {
            **choice,
            "finish_reason": self._reason(finish_reason),
            "stop_reason": None,
            "token_ids": None,
        }

    def whole(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "" if self._tool else choice.text}
        message |= {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        if self._tool:
            function = {"name": self._tool, "arguments": choice.text}
            message["tool_calls"] = [{"id": f"chatcmpl-tool-{random_id()}", "type": "function", "function": function}]
        message["reasoning"] = None
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(choice.finish_reason),
            "stop_reason": None,
            "token_ids": None,
            "routed_experts": None,
        }

    def _reason(self, reason: str) -> str:
        return self._stop if reason == "stop" else reason


async def chat(engine: Engine, exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    request = parse(ChatRequest, await exchange.body())
    name = engine.check_model(request)
    tools = request.tools or []
    call = plan.tool_call(tools, request.tool_choice, request.messages)
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    text = call[1] if call else plan.structured_text(request.response_format)
    wanted = _wanted(engine, request, limit, text)
    prompt = plan.render_chat(request.messages, tools)
    choices = plan.plan(prompt, wanted, engine.config, engine.max_model_len)
    shape = ChatShape(
        request_id("chatcmpl", exchange),
        name,
        tool=call[0] if call else None,
        tool_named=isinstance(request.tool_choice, dict),
    )
    await _answer(engine, exchange, request, choices, shape)


async def completions(engine: Engine, exchange: Exchange) -> None:
    """POST /v1/completions."""
    request = parse(CompletionRequest, await exchange.body())
    name = engine.check_model(request)
    text = plan.structured_text(request.response_format)
    wanted = _wanted(engine, request, request.max_tokens, text)
    choices: list[Choice] = []
    given = prompts(request.prompt, "prompt")
    engine.check_token_ids(given)
    for prompt in given:
        rendered = plan.render_prompt(prompt)
        choices += plan.plan(rendered, wanted, engine.config, engine.max_model_len, first_index=len(choices))
    shape = CompletionShape(request_id("cmpl", exchange), name)
    await _answer(engine, exchange, request, choices, shape)


def _wanted(engine: Engine, request: GenerationRequest, max_tokens: int | None, text: str | None) -> Wanted:
    return Wanted(
        n=request.n or 1,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        text=text,
        cache_salt=engine.salt(request),
    )


async def _answer(
    engine: Engine, exchange: Exchange, request: GenerationRequest, choices: list[Choice], shape: Shape
) -> None:
    n = request.n or 1
    sequences = [choice.sequence for choice in choices]
    engine.metrics.record_request(n, max(sequence.output_tokens for sequence in sequences))
    if request.stream:
        await _stream(engine, exchange, request, choices, shape)
        return
    async with engine.running(sequences, exchange, per_prompt=n) as ticket:
        await ticket.finished()
    await exchange.json(
        {
            **shape.base,
            "object": shape.object,
            "choices": [shape.whole(choice) for choice in choices],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": Usage.of(sequences, per_prompt=n).full(),
        }
    )


async def _stream(
    engine: Engine, exchange: Exchange, request: GenerationRequest, choices: list[Choice], shape: Shape
) -> None:
    options = request.stream_options
    include_usage = bool(options and options.include_usage)
    continuous = include_usage and bool(options and options.continuous_usage_stats)
    sequences = [choice.sequence for choice in choices]
    writers = [Writer(choice, shape, include_usage=include_usage, continuous=continuous) for choice in choices]
    async with engine.running(sequences, exchange, per_prompt=request.n or 1) as ticket:
        await exchange.start_stream()
        opening = b"".join(writer.opening() for writer in writers)
        while writers:
            await ticket.progress()
            for writer in writers:
                if body := writer.new():
                    await exchange.write(opening + body)
                    opening = b""
            writers = [writer for writer in writers if not writer.done]
    end = DONE
    if include_usage:
        usage = Usage.of(sequences, per_prompt=request.n or 1).final()
        end = _event({**shape.base, "choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}) + DONE
    await exchange.write(end, more=False)


class Writer:
    """The events of one choice, as far as its tokens exist."""

    def __init__(self, choice: Choice, shape: Shape, *, include_usage: bool, continuous: bool) -> None:
        self._choice = choice
        self._sequence = choice.sequence
        self._escaped = choice.escaped
        self._shape = shape
        self._last = len(choice.escaped) - 1
        self._written = 0
        self._include_usage = include_usage
        self._continuous = continuous
        self._head, self._tail = shape.frame(choice.index)

    @property
    def done(self) -> bool:
        """Whether the last token's event has been taken."""
        return self._written > self._last

    def opening(self) -> bytes:
        """What comes before the first token."""
        opening = self._shape.opening(self._choice.index)
        if opening is None:
            return b""
        event = {**self._shape.base, "choices": [opening]}
        # vLLM sends these two with a chat's first event only.
        event |= {"prompt_token_ids": None, "prompt_text": None}
        if self._continuous:
            event["usage"] = Usage(self._sequence.prompt_tokens, 0, 0).brief()
        return _event(event)

    def new(self) -> bytes:
        """Events of the tokens that came since the last call; several at once only for a slow reader."""
        start, stop = self._written, self._sequence.produced
        if start == stop:
            return b""
        self._written = stop
        if stop <= self._last and not self._continuous:
            if stop - start == 1:
                return self._head + self._escaped[start] + self._tail
            separator = self._tail + self._head
            return self._head + separator.join(self._escaped[start:stop]) + self._tail
        return b"".join(self._single(i) for i in range(start, stop))

    def _single(self, i: int) -> bytes:
        last = i == self._last
        if not last and not self._continuous:
            return self._head + self._escaped[i] + self._tail
        reason = self._choice.finish_reason if last else None
        text = self._choice.pieces[i].decode("ascii")
        event: dict[str, Any] = {
            **self._shape.base,
            "choices": [self._shape.part(self._choice.index, text, reason)],
        }
        if self._continuous:
            event["usage"] = Usage(self._sequence.prompt_tokens, i + 1, 0).brief()
        if last and not self._include_usage:
            event["system_fingerprint"] = FINGERPRINT
        return _event(event)
