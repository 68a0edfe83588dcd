"""The `openai` package, both of its APIs."""

from __future__ import annotations

import json
from typing import Any

import common
from openai import OpenAI

client = OpenAI(base_url=common.URL, api_key=common.KEY, max_retries=0, timeout=common.TIMEOUT_S)
describe = common.described


def _asked(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def chat() -> dict[str, Any]:
    answer = client.chat.completions.create(
        model=common.CHAT, messages=_asked(common.QUESTION), max_tokens=common.OUTPUT_TOKENS, temperature=0
    )
    return {"text": answer.choices[0].message.content, "tokens": answer.usage.completion_tokens}


def stream() -> dict[str, Any]:
    pieces, tokens = [], None
    for chunk in client.chat.completions.create(
        model=common.CHAT,
        messages=_asked(common.QUESTION),
        max_tokens=common.OUTPUT_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return {"pieces": pieces, "tokens": tokens}


def responses() -> dict[str, Any]:
    answer = client.responses.create(
        model=common.CHAT, input=common.QUESTION, max_output_tokens=common.OUTPUT_TOKENS, temperature=0
    )
    return {"text": answer.output_text, "tokens": answer.usage.output_tokens}


def responses_stream() -> dict[str, Any]:
    with client.responses.stream(
        model=common.CHAT, input=common.QUESTION, max_output_tokens=common.OUTPUT_TOKENS, temperature=0
    ) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        answer = events.get_final_response()
    return {"pieces": pieces, "tokens": answer.usage.output_tokens}


def tools() -> dict[str, Any]:
    messages = _asked(common.ASK_TOOL)
    settings = {"model": common.CHAT, "tools": [common.TOOL_SCHEMA], "temperature": 0}
    answer = client.chat.completions.create(
        messages=messages,
        tool_choice="auto" if common.LOOPS else common.NAMED_TOOL,
        max_tokens=common.STRUCTURED_TOKENS,
        **settings,
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": common.weather(**arguments)}
    final = client.chat.completions.create(
        messages=[*messages, message.model_dump(exclude_none=True), result],
        max_tokens=common.OUTPUT_TOKENS,
        **settings,
    )
    return {"called": call.function.name, "arguments": arguments, "text": final.choices[0].message.content}


def structured() -> dict[str, Any]:
    answer = client.chat.completions.parse(
        model=common.CHAT,
        messages=_asked(common.INVENT),
        response_format=common.Person,
        max_tokens=common.STRUCTURED_TOKENS,
        temperature=0,
    )
    return {"value": answer.choices[0].message.parsed.model_dump()}


def responses_structured() -> dict[str, Any]:
    answer = client.responses.parse(
        model=common.CHAT,
        input=common.INVENT,
        text_format=common.Person,
        max_output_tokens=common.STRUCTURED_TOKENS,
        temperature=0,
    )
    return {"value": answer.output_parsed.model_dump()}


def embeddings() -> dict[str, Any]:
    # Without an encoding the package asks for base64 and decodes it.
    return {"vectors": [v.embedding for v in client.embeddings.create(model=common.EMBED, input=common.TEXTS).data]}


def ask(refused: common.Refused) -> object:
    return client.with_options(api_key=refused.key).chat.completions.create(
        model=refused.model, messages=_asked(refused.prompt), temperature=refused.temperature, max_tokens=4
    )
