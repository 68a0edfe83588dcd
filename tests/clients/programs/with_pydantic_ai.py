"""Pydantic AI's agents, over chat completions and over responses."""

from __future__ import annotations

import asyncio
from typing import Any

import common
from openai import AsyncOpenAI
from pydantic_ai import Agent, Embedder, Tool
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.output import NativeOutput
from pydantic_ai.providers.openai import OpenAIProvider


def _provider(key: str = common.KEY) -> OpenAIProvider:
    # Retries are its own business: a refusal is to be seen as it comes.
    made = AsyncOpenAI(base_url=common.URL, api_key=key, max_retries=0, timeout=common.TIMEOUT_S)
    return OpenAIProvider(openai_client=made)


def _agent(tokens: int = common.OUTPUT_TOKENS, **settings: Any) -> Agent[None, Any]:
    model = settings.pop("model", None) or OpenAIChatModel(common.CHAT, provider=_provider())
    return Agent(model, model_settings={"max_tokens": tokens, "temperature": 0.0}, retries=0, **settings)


def chat() -> dict[str, Any]:
    answer = asyncio.run(_agent().run(common.QUESTION))
    return {"text": answer.output, "tokens": answer.usage.output_tokens}


def responses() -> dict[str, Any]:
    agent = _agent(model=OpenAIResponsesModel(common.CHAT, provider=_provider()))
    answer = asyncio.run(agent.run(common.QUESTION))
    return {"text": answer.output, "tokens": answer.usage.output_tokens}


def stream() -> dict[str, Any]:
    async def pieces() -> tuple[list[str], int]:
        async with _agent().run_stream(common.QUESTION) as answer:
            found = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
            return found, answer.usage.output_tokens

    found, tokens = asyncio.run(pieces())
    return {"pieces": found, "tokens": tokens}


def tools() -> dict[str, Any]:
    agent = _agent(common.STRUCTURED_TOKENS, tools=[Tool(common.weather, name=common.TOOL)])
    answer = asyncio.run(agent.run(common.ASK_TOOL))
    parts = [part for message in answer.all_messages() for part in message.parts]
    (call,) = [part for part in parts if isinstance(part, ToolCallPart)]
    return {"called": call.tool_name, "arguments": call.args_as_dict(), "text": answer.output}


def structured() -> dict[str, Any]:
    agent = _agent(common.STRUCTURED_TOKENS, output_type=NativeOutput(common.Person))
    return {"value": asyncio.run(agent.run(common.INVENT)).output.model_dump()}


def by_tool() -> dict[str, Any]:
    agent = _agent(common.STRUCTURED_TOKENS, output_type=common.Person)
    return {"value": asyncio.run(agent.run(common.INVENT)).output.model_dump()}


def embeddings() -> dict[str, Any]:
    model = OpenAIEmbeddingModel(common.EMBED, provider=_provider())
    answer = asyncio.run(Embedder(model).embed_documents(common.TEXTS))
    return {"vectors": [list(vector) for vector in answer.embeddings]}


def ask(refused: common.Refused) -> object:
    model = OpenAIChatModel(refused.model, provider=_provider(refused.key))
    agent = Agent(model, model_settings={"max_tokens": 4, "temperature": refused.temperature}, retries=0)
    return asyncio.run(agent.run(refused.prompt))


describe = common.described
