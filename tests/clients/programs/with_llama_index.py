"""LlamaIndex: `OpenAILike` and `OpenAILikeEmbedding`, its classes for servers that speak OpenAI's API."""

from __future__ import annotations

from typing import Any

import common
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

describe = common.described


def _model(tokens: int = common.OUTPUT_TOKENS, **settings: Any) -> OpenAILike:
    settings = {"model": common.CHAT, "api_key": common.KEY, "temperature": 0.0} | settings
    return OpenAILike(
        api_base=common.URL,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=tokens,
        max_retries=0,
        timeout=common.TIMEOUT_S,
        **settings,
    )


def _asked(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=prompt)]


def chat() -> dict[str, Any]:
    answer = _model().chat(_asked(common.QUESTION))
    return {"text": answer.message.content, "tokens": answer.raw.usage.completion_tokens}


def stream() -> dict[str, Any]:
    pieces = [chunk.delta for chunk in _model().stream_chat(_asked(common.QUESTION)) if chunk.delta]
    return {"pieces": pieces}


def tools() -> dict[str, Any]:
    tool = FunctionTool.from_defaults(common.weather, name=common.TOOL, fn_schema=common.Weather)
    model = _model(common.STRUCTURED_TOKENS)
    asked = _asked(common.ASK_TOOL)
    called = model.chat_with_tools([tool], chat_history=asked, tool_required=not common.LOOPS)
    (call,) = model.get_tool_calls_from_response(called)
    result = tool.call(**call.tool_kwargs)
    back = ChatMessage(role="tool", content=result.content, additional_kwargs={"tool_call_id": call.tool_id})
    final = _model().chat([*asked, called.message, back])
    return {"called": call.tool_name, "arguments": call.tool_kwargs, "text": final.message.content}


def structured() -> dict[str, Any]:
    value = _model(common.STRUCTURED_TOKENS).structured_predict(common.Person, PromptTemplate(common.INVENT))
    return {"value": value.model_dump()}


def embeddings() -> dict[str, Any]:
    model = OpenAILikeEmbedding(model_name=common.EMBED, api_base=common.URL, api_key=common.KEY, max_retries=0)
    return {"vectors": model.get_text_embedding_batch(common.TEXTS)}


def ask(refused: common.Refused) -> object:
    model = _model(4, model=refused.model, api_key=refused.key, temperature=refused.temperature)
    return model.chat(_asked(refused.prompt))
