"""The checks that a cluster serves, one function each: from an answer to a sentence, or a failure that says what came.

Each promise that a client relies on is asked for as a client would: the list of models, a whole answer, a streamed
one to its last event, vectors, and the two refusals (a wrong key, a route that is not offered).
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from serving.cli.verify.http import Answer, NoAnswer
from serving.cli.verify.result import FAILED, PASSED, SKIPPED, Check
from serving.errors import GalerneError

PROMPT = "Say hello."
OUTPUT_TOKENS = 16
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
MODELS = "/v1/models"
DONE = "[DONE]"
# Routes of an engine that would pause it, run code in it, load weights or tell of it (THREATS: beside /v1).
UNLISTED = (
    ("POST", "/pause"),
    ("POST", "/collective_rpc"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/invocations"),
    ("GET", "/metrics"),
    ("GET", "/-/routes"),
)
SHOWN_CHARACTERS = 160


class Failure(GalerneError):
    """A check that failed; the message says what was seen."""


class Skip(GalerneError):
    """A check that does not apply; the message says why."""


class Asks(Protocol):
    """The client that a check uses."""

    def ask(self, method: str, path: str, key: str | None, content: dict[str, Any] | None = None) -> Answer:
        """One request; raises NoAnswer."""


class Serving:
    """The checks of one cluster, in order; what the list of models said is used by those after it."""

    def __init__(self, client: Asks, key: str, model: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._key = key
        self._wanted = model
        self._clock = clock
        self._by_task: dict[str, list[str]] = {}
        self._unreachable = False

    def run(self) -> Iterator[Check]:
        """Every check, as it ends."""
        for name, check in (
            ("models", self._models),
            ("chat", self._chat),
            ("stream", self._stream),
            ("embeddings", self._embeddings),
            ("wrong key", self._wrong_key),
            ("unlisted routes", self._unlisted),
        ):
            yield self._checked(name, check)

    def _checked(self, name: str, check: Callable[[], str]) -> Check:
        began_s = self._clock()
        if self._unreachable:
            return Check(name, SKIPPED, "the list of models was not answered", 0.0)
        try:
            verdict, detail = PASSED, check()
        except Skip as reason:
            verdict, detail = SKIPPED, str(reason)
        except (Failure, NoAnswer) as failure:
            verdict, detail = FAILED, str(failure)
            self._unreachable = name == "models"
        return Check(name, verdict, detail, self._clock() - began_s)

    def _models(self) -> str:
        answer = self._client.ask("GET", MODELS, self._key)
        rows = _field(_ok(answer), "data", list)
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                self._by_task.setdefault(str(row.get("task", "generate")), []).append(row["id"])
        known = [model for models in self._by_task.values() for model in models]
        if not known:
            raise Failure("the list of models is empty: this key may use none")
        if self._wanted is not None and self._wanted not in known:
            raise Failure(f"no model {self._wanted!r}; models of this key: {', '.join(known)}")
        return f"{len(known)}: {_shown(', '.join(known))}"

    def _of_task(self, task: str) -> str:
        models = self._by_task.get(task, [])
        if not models:
            raise Skip(f"no model of the task {task!r}")
        return self._wanted if self._wanted in models else models[0]

    def _chat(self) -> str:
        model = self._of_task("generate")
        document = _ok(self._client.ask("POST", CHAT, self._key, _chat_request(model)))
        choice = _first(document, "choices")
        text = (choice.get("message") or {}).get("content")
        tokens = _tokens(document.get("usage"))
        if not isinstance(text, str) and choice.get("finish_reason") is None:
            raise Failure("the answer has neither text nor a reason why it ended")
        return f"{model}: {tokens} tokens, {_shown(repr(text))}"

    def _stream(self) -> str:
        model = self._of_task("generate")
        request = _chat_request(model) | {"stream": True, "stream_options": {"include_usage": True}}
        answer = self._client.ask("POST", CHAT, self._key, request)
        if answer.status != 200 or not answer.content_type.startswith("text/event-stream"):  # noqa: PLR2004
            raise Failure(f"no stream: {_seen(answer)}")
        events = answer.events()
        if not events or events[-1] != DONE:
            raise Failure(f"the stream does not end with {DONE}: {_shown(events[-1] if events else 'it is empty')}")
        chunks = [_json_event(event) for event in events[:-1]]
        content = [chunk for chunk in chunks if chunk.get("choices")]
        if not content:
            raise Failure("the stream has no chunk with a choice")
        finished = [c for chunk in content for c in chunk["choices"] if isinstance(c, dict) and c.get("finish_reason")]
        if not finished:
            raise Failure("no chunk says why the answer ended")
        usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        if not usages:
            raise Failure("the stream was asked for its usage and has none")
        tokens = _tokens(usages[-1])
        return (
            f"{model}: {len(content)} chunks, {tokens} tokens, usage, {DONE}; first after {answer.first_byte_s:.2f} s"
        )

    def _embeddings(self) -> str:
        model = self._of_task("embed")
        document = _ok(self._client.ask("POST", EMBEDDINGS, self._key, {"model": model, "input": PROMPT}))
        vector = _first(document, "data").get("embedding")
        if not isinstance(vector, list) or not vector or not all(_finite(value) for value in vector):
            raise Failure("the answer holds no vector of finite numbers")
        if not any(vector):
            raise Failure("the vector is nothing but zeros")
        return f"{model}: {len(vector)} dimensions"

    def _wrong_key(self) -> str:
        wrong = f"sk-{secrets.token_urlsafe(32)}"
        for key, whose in ((wrong, "a wrong key"), (None, "no key")):
            for method, path, content in (("GET", MODELS, None), ("POST", CHAT, _chat_request("any"))):
                answer = self._client.ask(method, path, key, content)
                if answer.status != 401:  # noqa: PLR2004
                    raise Failure(f"{method} {path} with {whose} must be 401: {_seen(answer)}")
        return "401 with a wrong key and with none"

    def _unlisted(self) -> str:
        for method, path in UNLISTED:
            answer = self._client.ask(method, path, self._key, {} if method == "POST" else None)
            if answer.status != 404:  # noqa: PLR2004
                raise Failure(f"{method} {path} must be 404: {_seen(answer)}")
        return f"404: {', '.join(path for _, path in UNLISTED)}"


def _chat_request(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": OUTPUT_TOKENS}


def _ok(answer: Answer) -> dict[str, Any]:
    document = answer.json()
    if answer.status != 200 or not isinstance(document, dict):  # noqa: PLR2004
        raise Failure(_seen(answer))
    return document


def _seen(answer: Answer) -> str:
    document = answer.json()
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f"status {answer.status}, {_shown(str(message or answer.body.decode(errors='replace')))}"


def _field(document: dict[str, Any], name: str, kind: type) -> Any:
    value = document.get(name)
    if not isinstance(value, kind):
        raise Failure(f"the answer has no {name!r}: {_shown(json.dumps(document))}")
    return value


def _first(document: dict[str, Any], name: str) -> dict[str, Any]:
    rows = _field(document, name, list)
    if not rows or not isinstance(rows[0], dict):
        raise Failure(f"{name!r} of the answer is empty")
    return rows[0]


def _tokens(usage: Any) -> int:
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or not 1 <= tokens <= OUTPUT_TOKENS:
        raise Failure(f"usage must count 1 to {OUTPUT_TOKENS} completion tokens: {_shown(json.dumps(usage))}")
    return tokens


def _json_event(event: str) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise Failure(f"an event is no JSON object: {_shown(event)}")
    if "error" in chunk:
        raise Failure(f"the stream ended with an error: {_shown(event)}")
    return chunk


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
