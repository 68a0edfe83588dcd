"""/v1/embeddings, /v1/score and /v1/rerank: prefill without an answer.

Vectors are pseudo-random, the same for the same input; scores are the share of words that two texts have
in common, so that a demo's order looks sensible.
"""

from __future__ import annotations

import math
import re
import struct
import time
from base64 import b64encode
from collections.abc import Sequence
from itertools import repeat

from serving.engine.fake import plan, tokens
from serving.engine.fake.engine import Engine, Usage, request_id
from serving.engine.fake.exchange import Exchange
from serving.engine.fake.protocol import (
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    bad_request,
    invalid,
    parse,
    prompts,
)

_WORD = re.compile(r"\w+")


def embedding(prompt: bytes, dimensions: int, *, seed: int) -> list[float]:
    """A vector of length one; a shorter one is the longer one cut and normalised again."""
    raw = tokens.vector(prompt, dimensions, seed=seed)
    norm = math.sqrt(math.fsum(value * value for value in raw)) or 1.0
    return [value / norm for value in raw]


def relevance(query: str, document: str) -> float:
    """Words in common over all words of both, 0 to 1 (Jaccard); 0 for two empty texts."""
    one, other = set(_WORD.findall(query.lower())), set(_WORD.findall(document.lower()))
    return len(one & other) / len(one | other) if one or other else 0.0


async def embeddings(engine: Engine, exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    request = parse(EmbeddingRequest, await exchange.body())
    engine.check_model(request)
    if request.encoding_format not in (None, "float", "base64"):
        raise bad_request("encoding_format must be float or base64.", "encoding_format")
    full = engine.config.embedding_dimensions
    dimensions = full if request.dimensions is None else request.dimensions
    if dimensions > full:
        raise bad_request(f"dimensions must be at most {full}, got {dimensions}.", "dimensions")
    given = prompts(request.input, "input")
    engine.check_token_ids(given)
    inputs = [plan.render_prompt(item) for item in given]
    usage = await _prefill(engine, exchange, inputs, request.cache_salt)
    vectors = [embedding(item, dimensions, seed=engine.config.seed) for item in inputs]
    packed = request.encoding_format == "base64"
    data = [
        {"index": i, "object": "embedding", "embedding": _base64(vector) if packed else vector}
        for i, vector in enumerate(vectors)
    ]
    await exchange.json(
        {
            "id": request_id("embd", exchange),
            "object": "list",
            "created": int(time.time()),
            "model": engine.model_id,
            "data": data,
            "usage": _pooling_usage(usage),
        }
    )


async def score(engine: Engine, exchange: Exchange) -> None:
    """POST /v1/score: one text against each of several, or pair by pair."""
    request = parse(ScoreRequest, await exchange.body())
    engine.check_model(request)
    for left, right in (
        (request.queries, request.documents),
        (request.queries, request.items),
        (request.data_1, request.data_2),
        (request.text_1, request.text_2),
    ):
        if left is not None and right is not None:
            pairs = _pairs(_as_list(left), _as_list(right))
            break
    else:
        raise invalid("missing", ["text_2" if request.text_1 is not None else "text_1"], "Field required")
    usage = await _prefill(engine, exchange, [_pair_prompt(*pair) for pair in pairs], request.cache_salt)
    data = [{"index": i, "object": "score", "score": relevance(*pair)} for i, pair in enumerate(pairs)]
    await exchange.json(
        {
            "id": request_id("score", exchange),
            "object": "list",
            "created": int(time.time()),
            "model": engine.model_id,
            "data": data,
            "usage": _pooling_usage(usage),
        }
    )


async def rerank(engine: Engine, exchange: Exchange) -> None:
    """POST /v1/rerank: documents by falling relevance."""
    request = parse(RerankRequest, await exchange.body())
    engine.check_model(request)
    documents = _as_list(request.documents)
    pairs = [(request.query, document) for document in documents]
    usage = await _prefill(engine, exchange, [_pair_prompt(*pair) for pair in pairs], request.cache_salt)
    scores = [relevance(*pair) for pair in pairs]
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    results = [
        {
            "index": i,
            "document": {"text": documents[i], "multi_modal": None},
            "relevance_score": scores[i],
        }
        for i in order[: request.top_n or None]
    ]
    await exchange.json(
        {
            "id": request_id("rerank", exchange),
            "model": engine.model_id,
            "usage": {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt},
            "results": results,
        }
    )


async def _prefill(engine: Engine, exchange: Exchange, inputs: Sequence[bytes], cache_salt: str | None) -> Usage:
    sequences = [plan.pooling(item, engine.config, engine.max_model_len, cache_salt=cache_salt) for item in inputs]
    async with engine.running(sequences, exchange) as ticket:
        await ticket.finished()
    return Usage.of(sequences)


def _pairs(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    if not left or not right or (len(left) != 1 and len(left) != len(right)):
        raise bad_request("Input lengths must be either 1:1, 1:N or N:N")
    return list(zip(repeat(left[0]) if len(left) == 1 else left, right, strict=False))


def _pair_prompt(query: str, document: str) -> bytes:
    return plan.render_prompt(query) + tokens.END_OF_TURN + tokens.encode_text(document)


def _pooling_usage(usage: Usage) -> dict[str, object]:
    return {**usage.brief(), "prompt_tokens_details": None, "completion_tokens_details": None}


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
