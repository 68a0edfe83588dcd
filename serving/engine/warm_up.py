"""The first request to an engine, made by itself: what it loads late is loaded before a user waits for it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from serving.config import ModelConfig
from serving.engine.private_server import TOKEN_HEADER
from serving.errors import EngineError

SERVER_ERROR = 500


def warm_up(url: str, token: str, model: ModelConfig) -> None:
    """Have one request of the model's kind answered; raises EngineError where the engine cannot.

    A refusal is no failure: a model without a chat template answers 400, and has woken up all the same.
    """
    path, body = _request(model)
    headers = {"content-type": "application/json", TOKEN_HEADER.decode(): token}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)  # noqa: S310 - our own server
    try:
        with urllib.request.urlopen(request, timeout=model.start_timeout_s) as answer:  # noqa: S310
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code >= SERVER_ERROR:
            detail = error.read(500).decode(errors="replace")
            raise EngineError(f"it does not answer its first request: {detail}") from None
    except OSError as error:
        raise EngineError(f"it does not answer its first request: {error}") from None


def _request(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    if model.task == "embed":
        return "/v1/embeddings", {"model": model.id, "input": "warm-up"}
    messages = [{"role": "user", "content": "warm-up"}]
    return "/v1/chat/completions", {"model": model.id, "messages": messages, "max_tokens": 2}
