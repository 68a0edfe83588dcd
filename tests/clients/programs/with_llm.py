"""The `llm` tool, its model registered as its documentation says: extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import common

# It reads its models when it is imported.
home = Path(os.environ["LLM_USER_PATH"])
home.mkdir(parents=True, exist_ok=True)
(home / "extra-openai-models.yaml").write_text(
    json.dumps(
        [
            {
                "model_id": name,
                "model_name": name,
                "api_base": common.URL,
                "api_key_name": "galerne",
                "can_stream": True,
                "supports_schema": True,
                "supports_tools": True,
            }
            for name in (common.CHAT, "no-such-model")
        ]
    )
)

import llm  # noqa: E402 - after its models are written

describe = common.described


def _prompt(prompt: str, model: str = common.CHAT, **settings: Any) -> Any:
    settings = {"key": common.KEY, "temperature": 0, "max_tokens": common.OUTPUT_TOKENS} | settings
    return llm.get_model(model).prompt(prompt, **settings)


def chat() -> dict[str, Any]:
    answer = _prompt(common.QUESTION, stream=False)
    return {"text": answer.text(), "tokens": answer.usage().output}


def stream() -> dict[str, Any]:
    answer = _prompt(common.QUESTION, stream=True)
    return {"pieces": [piece for piece in answer if piece], "tokens": answer.usage().output}


def tools() -> dict[str, Any]:
    calls: list[Any] = []
    tool = llm.Tool.function(common.weather, name=common.TOOL)
    answer = llm.get_model(common.CHAT).chain(
        common.ASK_TOOL,
        key=common.KEY,
        tools=[tool],
        options={"temperature": 0, "max_tokens": common.STRUCTURED_TOKENS},
        after_call=lambda _, call, __: calls.append(call),
    )
    text = answer.text()
    (call,) = calls
    return {"called": call.name, "arguments": call.arguments, "text": text}


def structured() -> dict[str, Any]:
    answer = _prompt(common.INVENT, schema=common.Person, stream=False, max_tokens=common.STRUCTURED_TOKENS)
    return {"value": json.loads(answer.text())}


def ask(refused: common.Refused) -> object:
    return _prompt(
        refused.prompt, refused.model, key=refused.key, temperature=refused.temperature, max_tokens=4, stream=False
    ).text()
