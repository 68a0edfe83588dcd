"""OpenAI's Agents SDK, over chat completions and over responses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import common
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI

describe = common.described
APART = RunConfig(tracing_disabled=True)


def _client(key: str = common.KEY) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=common.URL, api_key=key, max_retries=0, timeout=common.TIMEOUT_S)


def _agent(kind: type = OpenAIChatCompletionsModel, tokens: int = common.OUTPUT_TOKENS, **settings: Any) -> Agent:
    model_settings = ModelSettings(temperature=0, max_tokens=tokens, include_usage=True)
    return Agent(
        name="assistant", model=kind(common.CHAT, openai_client=_client()), model_settings=model_settings, **settings
    )


def _run(agent: Agent, prompt: str) -> Any:
    return asyncio.run(Runner.run(agent, prompt, run_config=APART, max_turns=3))


def _streamed(agent: Agent) -> dict[str, Any]:
    async def events() -> tuple[list[str], int]:
        running = Runner.run_streamed(agent, common.QUESTION, run_config=APART)
        pieces = [
            event.data.delta
            async for event in running.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        return pieces, running.context_wrapper.usage.output_tokens

    pieces, tokens = asyncio.run(events())
    return {"pieces": pieces, "tokens": tokens}


def chat() -> dict[str, Any]:
    answer = _run(_agent(), common.QUESTION)
    return {"text": answer.final_output, "tokens": answer.context_wrapper.usage.output_tokens}


def responses() -> dict[str, Any]:
    answer = _run(_agent(OpenAIResponsesModel), common.QUESTION)
    return {"text": answer.final_output, "tokens": answer.context_wrapper.usage.output_tokens}


def stream() -> dict[str, Any]:
    return _streamed(_agent())


def responses_stream() -> dict[str, Any]:
    return _streamed(_agent(OpenAIResponsesModel))


def tools() -> dict[str, Any]:
    tool = function_tool(common.weather, name_override=common.TOOL)
    answer = _run(_agent(tokens=common.STRUCTURED_TOKENS, tools=[tool]), common.ASK_TOOL)
    (call,) = [item.raw_item for item in answer.new_items if item.type == "tool_call_item"]
    return {"called": call.name, "arguments": json.loads(call.arguments), "text": answer.final_output}


def structured() -> dict[str, Any]:
    agent = _agent(tokens=common.STRUCTURED_TOKENS, output_type=common.Person)
    return {"value": _run(agent, common.INVENT).final_output.model_dump()}


def ask(refused: common.Refused) -> object:
    model = OpenAIChatCompletionsModel(refused.model, openai_client=_client(refused.key))
    settings = ModelSettings(temperature=refused.temperature, max_tokens=4)
    return _run(Agent(name="assistant", model=model, model_settings=settings), refused.prompt)
