"""Instructor: values of a pydantic class, by a tool call and by a schema."""

from __future__ import annotations

from typing import Any

import common
import instructor
from openai import OpenAI


def _client(mode: instructor.Mode, key: str = common.KEY) -> instructor.Instructor:
    made = OpenAI(base_url=common.URL, api_key=key, max_retries=0, timeout=common.TIMEOUT_S)
    return instructor.from_openai(made, mode=mode)


def _value(mode: instructor.Mode, **settings: Any) -> common.Person:
    settings = {"model": common.CHAT, "temperature": 0, "max_tokens": common.STRUCTURED_TOKENS} | settings
    key = settings.pop("key", common.KEY)
    prompt = settings.pop("prompt", common.INVENT)
    return _client(mode, key).chat.completions.create(
        response_model=common.Person, messages=[{"role": "user", "content": prompt}], max_retries=0, **settings
    )


def structured() -> dict[str, Any]:
    return {"value": _value(instructor.Mode.JSON_SCHEMA).model_dump()}


def by_tool() -> dict[str, Any]:
    return {"value": _value(instructor.Mode.TOOLS).model_dump()}


def structured_stream() -> dict[str, Any]:
    parts = _client(instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(
        model=common.CHAT,
        temperature=0,
        max_tokens=common.STRUCTURED_TOKENS,
        response_model=common.Person,
        messages=[{"role": "user", "content": common.INVENT}],
    )
    seen = [part.model_dump() for part in parts]
    return {"value": seen[-1], "parts": len(seen)}


def ask(refused: common.Refused) -> object:
    return _value(
        instructor.Mode.JSON_SCHEMA,
        key=refused.key,
        model=refused.model,
        prompt=refused.prompt,
        temperature=refused.temperature,
    )


def describe(error: Exception) -> dict[str, Any]:
    # It raises its own exception, and keeps the package's as the cause.
    cause: BaseException = error
    while cause.__cause__ is not None and not hasattr(cause, "status_code"):
        cause = cause.__cause__
    return common.described(cause)
