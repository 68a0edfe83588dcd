"""The clients that users bring, unmodified, through a whole cluster: with simulated engines and with real ones.

What each may do is in one table; its programs are in tests/clients/programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import httpx
import pytest

from tests.clients import environments
from tests.integration.running import KEY, RunningCluster

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(1800)]

OUTPUT_TOKENS = 8
TOOL = "get_weather"
QUESTION = "What is the capital of France?"
TEXTS = ["The cat sat on the mat.", "A cat is on a mat.", "Interest rates rose."]
RUN_TIMEOUT_S = 600

COMMON = ("chat", "stream", "tools", "structured", "embeddings")
REFUSALS = ("wrong_key", "unknown_model", "too_long", "bad_value")
# Each client's own exception for each refusal, in the order above.
OPENAI = ("openai.AuthenticationError", "openai.NotFoundError", "openai.BadRequestError", "openai.BadRequestError")


@dataclass(frozen=True)
class Client:
    """What a client's programs do."""

    can: tuple[str, ...]
    raises: tuple[str | None, ...]
    # Codes of errors are lost in its exceptions for these.
    keeps_no_code: tuple[str, ...] = ()
    # What its prompt is called where it is too long.
    prompt: str = "messages"
    # Of these the model is left to decide which tool to call, or how often: more than one so small can do.
    undecided: tuple[str, ...] = ()


CLIENTS = {
    "openai": Client((*COMMON, "responses", "responses_stream", "responses_structured"), OPENAI),
    "litellm": Client(
        COMMON,
        (
            "litellm.AuthenticationError",
            "litellm.NotFoundError",
            "litellm.ContextWindowExceededError",
            "litellm.BadRequestError",
        ),
        keeps_no_code=("unknown_model", "too_long"),
    ),
    "langchain": Client(
        (*COMMON, "responses"),
        (
            "langchain_core.ModelAuthenticationError",
            "langchain_core.ModelNotFoundError",
            "langchain_core.ContextOverflowError",
            "langchain_core.ModelInvalidRequestError",
        ),
    ),
    # It checks a temperature itself.
    "llama_index": Client(COMMON, (*OPENAI[:3], None), undecided=("tools", "structured")),
    "instructor": Client(("structured", "by_tool", "structured_stream"), OPENAI),
    "pydantic_ai": Client(
        (*COMMON, "responses", "by_tool"), ("pydantic_ai.ModelHTTPError",) * 4, undecided=("tools", "by_tool")
    ),
    "openai_agents": Client(
        ("chat", "stream", "tools", "structured", "responses", "responses_stream"), OPENAI, undecided=("tools",)
    ),
    # It checks a temperature itself.
    "llm": Client(("chat", "stream", "tools", "structured"), (*OPENAI[:3], None), undecided=("tools",)),
    "openai_node": Client(
        (*COMMON, "responses", "responses_stream", "responses_structured"),
        ("AuthenticationError", "NotFoundError", "BadRequestError", "BadRequestError"),
    ),
    # Over /v1/responses.
    "ai_sdk": Client(COMMON, ("APICallError",) * 4, prompt="input", undecided=("tools",)),
    "ai_sdk_chat": Client(("chat", "stream", "tools", "structured"), ("APICallError",) * 4),
    "ai_sdk_compatible": Client(COMMON, ("APICallError",) * 4),
}
REFUSED_WITH = {
    "wrong_key": (401, "invalid_api_key", None),
    "unknown_model": (404, "model_not_found", "model"),
    "too_long": (400, "context_length_exceeded", "messages"),
    "bad_value": (400, "decimal_below_min_value", "temperature"),
}

SIMULATED, REAL = "simulated", "real"
CASES = [
    pytest.param(engine, client, capability, id=f"{engine}-{client}-{capability}")
    for engine in (SIMULATED, REAL)
    for client, programs in CLIENTS.items()
    for capability in (
        *(can for can in programs.can if engine == SIMULATED or can not in programs.undecided),
        *(f"refused_{name}" for name, kind in zip(REFUSALS, programs.raises, strict=True) if kind),
    )
]


@dataclass(frozen=True)
class Served:
    """A cluster, and what it answers to whoever asks it without any client."""

    url: str
    chat: str
    embed: str
    text: str
    tokens: int
    vectors: list[list[float]]


def served(cluster: RunningCluster, chat: str, embed: str) -> Served:
    with httpx.Client(base_url=cluster.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120) as http:
        asked = {"model": chat, "messages": [{"role": "user", "content": QUESTION}]}
        text = http.post("/v1/chat/completions", json=asked | {"temperature": 0, "max_tokens": OUTPUT_TOKENS}).json()
        vectors = http.post("/v1/embeddings", json={"model": embed, "input": TEXTS}).json()
    return Served(
        cluster.url,
        chat,
        embed,
        text["choices"][0]["message"]["content"],
        text["usage"]["completion_tokens"],
        [row["embedding"] for row in vectors["data"]],
    )


def found_by_programs(
    engine: str, of: Served, request: pytest.FixtureRequest, factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the selected programs found; one process a language, because clients take long to import."""
    names = sorted(
        {
            f"{item.callspec.params['client']}:{item.callspec.params['capability']}"
            for item in request.session.items
            if isinstance(item, pytest.Function)
            and item.originalname == test_a_client_finds_what_it_knows.__name__
            and item.callspec.params["engine"] == engine
        },
        key=lambda name: (environments.language_of(name), name),
    )
    variables = {
        "GALERNE_URL": of.url,
        "GALERNE_KEY": KEY,
        "GALERNE_CHAT": of.chat,
        "GALERNE_EMBED": of.embed,
        "GALERNE_LOOPS": "1" if engine == SIMULATED else "0",
    }
    found: dict[str, dict[str, Any]] = {}
    for language, group in groupby(names, environments.language_of):
        home = factory.mktemp(f"{language}-clients")
        found |= environments.run_programs(group, home, variables, RUN_TIMEOUT_S)
    return found


@pytest.fixture(scope="module")
def simulated(
    fake_cluster: RunningCluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, dict[str, dict[str, Any]]]:
    of = served(fake_cluster, "chat", "vectors")
    return of, found_by_programs(SIMULATED, of, request, tmp_path_factory)


@pytest.fixture(scope="module")
def real(
    engine_cluster: RunningCluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, dict[str, dict[str, Any]]]:
    of = served(engine_cluster, "smollm2-135m-instruct", "all-minilm-l6-v2")
    return of, found_by_programs(REAL, of, request, tmp_path_factory)


@pytest.mark.parametrize(("engine", "client", "capability"), CASES)
def test_a_client_finds_what_it_knows(
    engine: str, client: str, capability: str, request: pytest.FixtureRequest
) -> None:
    of, lines = request.getfixturevalue(engine)
    line = lines[f"{client}:{capability}"]
    assert "failed" not in line, line["failed"]
    found = line["found"]
    if capability.startswith("refused_"):
        refused(CLIENTS[client], capability.removeprefix("refused_"), found)
    elif capability in ("chat", "responses"):
        assert (found["text"], found["tokens"]) == (of.text, of.tokens)
    elif capability in ("stream", "responses_stream"):
        assert "".join(found["pieces"]) == of.text
        assert len(found["pieces"]) > 1
        # A client that tells no tokens of a stream has none here.
        assert found.get("tokens", of.tokens) == of.tokens
    elif capability == "tools":
        assert found["called"] == TOOL
        assert set(found["arguments"]) == {"city"}
        assert engine == REAL or found["text"]
    elif capability == "embeddings":
        assert len(found["vectors"]) == len(TEXTS)
        for vector, expected in zip(found["vectors"], of.vectors, strict=True):
            assert vector == pytest.approx(expected, abs=1e-5)
    else:
        assert set(found["value"]) == {"name", "age"}
        assert len(found["value"]["name"]) <= 8
        assert 0 <= found["value"]["age"] <= 99
        assert found.get("parts", 2) > 1


def refused(client: Client, name: str, found: dict[str, Any]) -> None:
    """The client's own exception, with what OpenAI's error object tells a program."""
    status, code, param = REFUSED_WITH[name]
    param = client.prompt if name == "too_long" else param
    kind = client.raises[REFUSALS.index(name)]
    assert kind in found["classes"], found
    assert found["status"] == status
    if name not in client.keeps_no_code:
        assert (found["code"], found["param"], found["type"]) == (code, param, "invalid_request_error")
