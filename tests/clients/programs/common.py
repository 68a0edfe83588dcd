"""What the Python clients' programs share: where the server is, what is asked, which tool there is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

URL = os.environ["GALERNE_URL"] + "/v1"
KEY = os.environ["GALERNE_KEY"]
CHAT = os.environ["GALERNE_CHAT"]
EMBED = os.environ["GALERNE_EMBED"]
# Whether the model may be left to decide when to call a tool and when to answer: the simulated one does as it is told.
LOOPS = os.environ["GALERNE_LOOPS"] == "1"

QUESTION = "What is the capital of France?"
INVENT = "Invent a person."
# The simulated engine calls a tool that it is told to call.
ASK_TOOL = "Call get_weather for Paris."
TOOL = "get_weather"
TEXTS = ["The cat sat on the mat.", "A cat is on a mat.", "Interest rates rose."]
OUTPUT_TOKENS = 8
STRUCTURED_TOKENS = 64
TIMEOUT_S = 240.0


class Person(BaseModel):
    """Bounded: so small a model may never end a string by itself."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=8)


def weather(city: str) -> str:
    """What the tool answers."""
    return f"It is sunny in {city}."


TOOL_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED_TOOL = {"type": "function", "function": {"name": TOOL}}


@dataclass(frozen=True)
class Refused:
    """A request that the server refuses: what differs from one that it answers."""

    key: str = KEY
    model: str = CHAT
    prompt: str = QUESTION
    temperature: float = 0.0


# Longer than any context that is served here.
TOO_LONG = "word " * 140_000
REFUSALS = {
    "wrong_key": Refused(key="sk-nobody"),
    "unknown_model": Refused(model="no-such-model"),
    "too_long": Refused(prompt=TOO_LONG),
    "bad_value": Refused(temperature=-3.0),
}


def described(error: BaseException, body: object = None, status: int | None = None) -> dict[str, Any]:
    """An exception as a program meets it: its classes, and the fields of OpenAI's error object that it carries."""
    found = body if body is not None else getattr(error, "body", None)
    holder = found.get("error", found) if isinstance(found, dict) else {}
    return {
        "classes": [f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__],
        "status": status if status is not None else getattr(error, "status_code", None),
        "code": holder.get("code", getattr(error, "code", None)),
        "type": holder.get("type", getattr(error, "type", None)),
        "param": holder.get("param", getattr(error, "param", None)),
        "message": str(holder.get("message") or error)[:300],
    }
