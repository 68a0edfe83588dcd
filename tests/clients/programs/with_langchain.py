"""LangChain's `langchain-openai`."""

from __future__ import annotations

from typing import Any

import common
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

describe = common.described


def _model(tokens: int = common.OUTPUT_TOKENS, **settings: Any) -> ChatOpenAI:
    settings = {"model": common.CHAT, "api_key": common.KEY, "temperature": 0} | settings
    return ChatOpenAI(base_url=common.URL, max_retries=0, timeout=common.TIMEOUT_S, max_tokens=tokens, **settings)


@tool(common.TOOL, args_schema=common.Weather)
def weather(city: str) -> str:
    """The weather of a city."""
    return common.weather(city)


def chat() -> dict[str, Any]:
    answer = _model().invoke(common.QUESTION)
    return {"text": answer.content, "tokens": answer.usage_metadata["output_tokens"]}


def stream() -> dict[str, Any]:
    chunks = list(_model(stream_usage=True).stream(common.QUESTION))
    tokens = [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]
    return {"pieces": [chunk.content for chunk in chunks if chunk.content], "tokens": sum(tokens)}


def responses() -> dict[str, Any]:
    answer = _model(use_responses_api=True).invoke(common.QUESTION)
    return {"text": answer.text, "tokens": answer.usage_metadata["output_tokens"]}


def tools() -> dict[str, Any]:
    choice = "auto" if common.LOOPS else common.TOOL
    asked = HumanMessage(common.ASK_TOOL)
    called = _model(common.STRUCTURED_TOKENS).bind_tools([weather], tool_choice=choice).invoke([asked])
    (call,) = called.tool_calls
    result: ToolMessage = weather.invoke(call)
    final = _model().bind_tools([weather]).invoke([asked, called, result])
    return {"called": call["name"], "arguments": call["args"], "text": final.content}


def structured() -> dict[str, Any]:
    value = _model(common.STRUCTURED_TOKENS).with_structured_output(common.Person).invoke(common.INVENT)
    return {"value": value.model_dump()}


def embeddings() -> dict[str, Any]:
    # Its check of lengths needs a tokenizer that it would download.
    model = OpenAIEmbeddings(
        model=common.EMBED, base_url=common.URL, api_key=common.KEY, check_embedding_ctx_length=False, max_retries=0
    )
    return {"vectors": model.embed_documents(common.TEXTS)}


def ask(refused: common.Refused) -> object:
    model = _model(4, model=refused.model, api_key=refused.key, temperature=refused.temperature)
    return model.invoke(refused.prompt)
