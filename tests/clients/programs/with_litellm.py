"""LiteLLM's library, with its provider for servers that speak OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

import common
import litellm

MODEL = f"openai/{common.CHAT}"
SERVER = {"api_base": common.URL, "api_key": common.KEY, "timeout": common.TIMEOUT_S, "num_retries": 0}


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def chat() -> dict[str, Any]:
    answer = litellm.completion(
        MODEL, _asked(common.QUESTION), max_tokens=common.OUTPUT_TOKENS, temperature=0, **SERVER
    )
    return {"text": answer.choices[0].message.content, "tokens": answer.usage.completion_tokens}


def stream() -> dict[str, Any]:
    chunks = litellm.completion(
        MODEL,
        _asked(common.QUESTION),
        max_tokens=common.OUTPUT_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **SERVER,
    )
    pieces, tokens = [], None
    for chunk in chunks:
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        usage = getattr(chunk, "usage", None)
        tokens = usage.completion_tokens if usage else tokens
    return {"pieces": pieces, "tokens": tokens}


def tools() -> dict[str, Any]:
    messages: list[Any] = _asked(common.ASK_TOOL)
    settings = {"tools": [common.TOOL_SCHEMA], "temperature": 0, **SERVER}
    answer = litellm.completion(
        MODEL,
        messages,
        tool_choice="auto" if common.LOOPS else common.NAMED_TOOL,
        max_tokens=common.STRUCTURED_TOKENS,
        **settings,
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": common.weather(**arguments)}
    final = litellm.completion(MODEL, [*messages, message, result], max_tokens=common.OUTPUT_TOKENS, **settings)
    return {"called": call.function.name, "arguments": arguments, "text": final.choices[0].message.content}


def structured() -> dict[str, Any]:
    answer = litellm.completion(
        MODEL,
        _asked(common.INVENT),
        response_format=common.Person,
        max_tokens=common.STRUCTURED_TOKENS,
        temperature=0,
        **SERVER,
    )
    return {"value": json.loads(answer.choices[0].message.content)}


def embeddings() -> dict[str, Any]:
    answer = litellm.embedding(f"openai/{common.EMBED}", input=common.TEXTS, encoding_format="float", **SERVER)
    return {"vectors": [row["embedding"] for row in answer.data]}


def ask(refused: common.Refused) -> object:
    return litellm.completion(
        f"openai/{refused.model}",
        _asked(refused.prompt),
        temperature=refused.temperature,
        max_tokens=4,
        **(SERVER | {"api_key": refused.key}),
    )


def describe(error: Exception) -> dict[str, Any]:
    return common.described(error)
