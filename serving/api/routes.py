"""The allow-list: every path the gateway answers, and what an engine has to be to serve it.

Whatever is not here is 404 and never reaches an engine: vLLM's app has routes that pause it, load weights or
run code (THREATS: engine endpoints beside /v1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.admission.bounds import BodyKind

Task = Literal["generate", "embed"]
BOTH: frozenset[Task] = frozenset({"generate", "embed"})
GENERATE: frozenset[Task] = frozenset({"generate"})
EMBED: frozenset[Task] = frozenset({"embed"})


@dataclass(frozen=True, slots=True)
class EngineRoute:
    """A POST that is relayed: its path, the shape of its body, the tasks that serve it."""

    path: str
    kind: BodyKind
    tasks: frozenset[Task]

    @property
    def computes(self) -> bool:
        """Whether the engine computes on a prompt for it, and caches what it computed."""
        return self.kind not in {BodyKind.TOKENIZE, BodyKind.DETOKENIZE}

    @property
    def says_usage(self) -> bool:
        """Whether a stream of it ends with a usage event where `stream_options` ask for one."""
        return self.kind in {BodyKind.CHAT, BodyKind.COMPLETION}


RELAYED: dict[str, EngineRoute] = {
    route.path: route
    for route in (
        EngineRoute("/v1/chat/completions", BodyKind.CHAT, GENERATE),
        EngineRoute("/v1/completions", BodyKind.COMPLETION, GENERATE),
        EngineRoute("/v1/responses", BodyKind.RESPONSES, GENERATE),
        EngineRoute("/v1/embeddings", BodyKind.EMBEDDING, EMBED),
        EngineRoute("/v1/rerank", BodyKind.RERANK, EMBED),
        EngineRoute("/v1/score", BodyKind.SCORE, EMBED),
        EngineRoute("/tokenize", BodyKind.TOKENIZE, BOTH),
        EngineRoute("/detokenize", BodyKind.DETOKENIZE, BOTH),
    )
}

MODELS = "/v1/models"
MODEL_PREFIX = "/v1/models/"
LIVE = "/health/live"
READY = "/health/ready"
# As vLLM has them, for tools that were made for its servers: a status and no body.
HEALTH = "/health"
PING = "/ping"
VERSION = "/version"
# A model's tokenizer, as vLLM tells of it; one of the model's replicas is asked.
TOKENIZER_INFO = "/tokenizer_info"
# What the key's own tenant used.
USAGE = "/v1/usage"
# For administrators, by POST: which replica a request would go to, and why.
EXPLAIN = "/ops/route"
OPENAPI = "/v1/openapi.json"
# Answered by the gateway itself, by GET.
OWN: frozenset[str] = frozenset({MODELS, LIVE, READY, HEALTH, PING, VERSION, OPENAPI, TOKENIZER_INFO, USAGE})
# Answered without a key.
PROBES: frozenset[str] = frozenset({LIVE, READY, HEALTH, PING})

_GET = ("GET", "HEAD")


def methods(path: str) -> tuple[str, ...]:
    """What a path takes; empty where there is no such route for clients."""
    if path in RELAYED:
        return ("POST",)
    if path == PING:
        return (*_GET, "POST")
    return _GET if path in OWN or path.startswith(MODEL_PREFIX) else ()


def label(path: str) -> str:
    """A known path as metrics and messages name it: bounded, whatever a client asked for."""
    return MODEL_PREFIX + "{id}" if path.startswith(MODEL_PREFIX) else path
