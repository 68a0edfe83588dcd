"""Random bodies over every field that vLLM's request classes or the gateway know, and what an accepted one may mean.

The gateway reads a body with its own parser and its own bounds; the engine reads the same bytes with vLLM's classes and
makes its parameters of them. `judge` holds the second against the first: whatever a field is called, what the engine would
compute is inside the limits.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from serving.admission.bounds import REFUSED, BodyKind, RequestFacts, read
from serving.admission.schema_cost import SchemaCost
from serving.admission.vocabulary import Vocabularies
from serving.config import LimitsConfig
from serving.errors import BadRequest

MODEL = "smollm2-135m-instruct"
TOKEN_IDS = 49152
GENERATING = frozenset({BodyKind.CHAT, BodyKind.COMPLETION, BodyKind.RESPONSES})
# vLLM's default where a body names no number: the room in the model's context.
ROOM = 2048
MEDIA = ("image_url", "image_embeds", "image_pil", "input_audio", "audio_url", "video_url", "file", "prompt_embeds")

SCHEMAS: list[Any] = [
    {"type": "string", "maxLength": 20},
    {"type": "string", "maxLength": 100000},
    {"type": "object", "properties": {f"f{i}": {"type": "string"} for i in range(9)}},
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 500}, "b": {"maxLength": 501}}},
    {"type": "array", "items": {"type": "string", "pattern": "^.{1,300}$"}, "maxItems": 1000},
    {"anyOf": [{"type": "string", "maxLength": i} for i in range(1, 60)]},
    {"type": "string", "pattern": ".?" * 60},
    {"enum": ["a", "b", 1, None]},
    {},
    True,
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS[0]}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": SCHEMAS[0]}
IDS = [0, 1, 2, 49151, 49152, 49153, 2**31 - 1, 2**31, -1]
COUNTS: list[Any] = [
    None,
    0,
    1,
    2,
    3,
    8,
    9,
    20,
    21,
    100,
    2048,
    2049,
    10**6,
    2**31,
    2**63,
    -1,
    -2,
    1.0,
    "3",
    True,
    math.pi,
]
SHARES: list[Any] = [None, 0, 0.0, 0.1, 0.5, 1, 1.0, 1.5, 2, 2.5, -0.5, -2, -3, 1e-9, 1e308, "0.5", True]
FLAGS: list[Any] = [None, True, False, True, False, 0, 1, "true", "yes", {}]
TEXTS: list[Any] = [None, "", "a", "hello there", "é" * 9, "x" * 300, "\u0000", "<|im_end|>", 5]
MESSAGES: list[Any] = [
    [{"role": "user", "content": "Say hello."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": "http://127.0.0.1/x.png"}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": []}],
    [{"role": "user", "content": "x" * 5000}],
    [],
]


def _list(draw: random.Random, pool: list[Any], most: int) -> list[Any]:
    return [draw.choice(pool) for _ in range(draw.choice([0, 1, 1, 2, 3, most]))]


def _value(draw: random.Random, name: str) -> Any:
    """A value that a field of this name may be sent, rarely one of another type."""
    if draw.random() < 0.03:
        return draw.choice([None, True, -1, 2**70, "x", [], {}, [[1]], {"a": 1}, 1e30])
    if name in {"messages"}:
        return draw.choice(MESSAGES)
    if name == "prompt":
        ids = _list(draw, [*IDS[:4] * 3, *IDS], 40)
        return draw.choice(["Once upon", "", ["a", "b"], ids, [ids, [1]], [["a"]], ["a"] * 65, [[1]] * 70, [1] * 3000])
    if name == "input":
        ids = _list(draw, IDS[:5], 9)
        return draw.choice(["text", ["a", "b"], ids, [ids], draw.choice(MESSAGES), ["a"] * 2049, ""])
    if name in {"tokens", "stop_token_ids", "allowed_token_ids", "logprob_token_ids", "trace_decode_token_ids"}:
        return _list(draw, IDS[:4] if draw.random() < 0.5 else IDS, draw.choice([4, 19, 30, 200, 1100]))
    if name == "logit_bias":
        return {str(draw.choice([*IDS, "x", "1_0", " 5", "٣"])): draw.choice([0, 1, -100, 100, 101]) for _ in range(3)}
    if name in {"stop", "bad_words"}:
        return draw.choice(["x", ["x"], ["x"] * 16, ["x"] * 17, ["y" * 300], [""], [], None])
    if name in {"response_format", "text"}:
        schema = draw.choice(SCHEMAS)
        inner = draw.choice(
            [
                {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                {"type": "json_schema", "name": "x", "schema": schema},
                {"type": "json_object"},
                {"type": "text"},
                {
                    "type": "structural_tag",
                    "structures": [{"begin": "<", "schema": schema, "end": ">"}],
                    "triggers": ["<"],
                },
                {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}},
            ]
        )
        return {"format": inner} if name == "text" else inner
    if name == "structured_outputs":
        schema = draw.choice(SCHEMAS)
        return draw.choice(
            [
                {"json": schema},
                {"json": json.dumps(schema)},
                {"regex": draw.choice(["[a-z]+", ".{1,600}.{1,600}", ".?" * 60, "a"])},
                {"choice": ["yes", "no"]},
                {"grammar": draw.choice(['root ::= "a"', "root ::= a{1,300} b{1,300}\na ::= [^x]\nb ::= ."])},
                {"structural_tag": json.dumps({"structures": [{"begin": "<", "schema": schema, "end": ">"}]})},
                {"json": schema, "whitespace_pattern": "[^x]{1,900}" * 3},
                {"json_object": True},
                {"_backend": "outlines", "regex": "a"},
            ]
        )
    if name in {"guided_json", "guided_regex", "guided_choice", "guided_grammar"}:
        return draw.choice([*SCHEMAS, "x", ".?" * 60])
    if name == "tools":
        return draw.choice([[TOOL], [FLAT_TOOL], [TOOL, TOOL], [{"type": "web_search"}], [], None])
    if name == "tool_choice":
        named = {"type": "function", "function": {"name": "f"}}
        return draw.choice(["auto", "none", "required", named, {"type": "function", "name": "f"}, None])
    if name == "stream_options":
        return draw.choice([{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, {}, None])
    if name == "repetition_detection":
        return draw.choice(
            [{"max_pattern_size": 20, "min_count": 2}, {"max_pattern_size": 10**6, "min_count": 2}, None]
        )
    if name in {"query", "documents", "text_1", "text_2", "queries", "items", "data_1", "data_2"}:
        media = {"content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}
        return draw.choice(
            ["q", ["a", "b"], [{"content": [{"type": "text", "text": "x"}]}], media, [media], ["d"] * 2049, None]
        )
    if name in REFUSED or name in {"vllm_xargs", "kv_transfer_params", "metadata"}:
        return draw.choice([None, {}, {"a": 1}, "x", [1], "{{ 1 }}"])
    if (
        name in {"echo", "stream", "use_beam_search", "ignore_eos", "logprobs", "store", "background"}
        or "return" in name
    ):
        return draw.choice([*FLAGS, 1, 5, 20])
    if any(part in name for part in ("temperature", "top_p", "min_p", "penalty")):
        return draw.choice(SHARES)
    if any(
        part in name for part in ("user", "suffix", "instruction", "salt", "id", "format", "effort", "tier", "side")
    ):
        return draw.choice(TEXTS)
    return draw.choice([*COUNTS, *FLAGS])


BASE: dict[BodyKind, dict[str, Any]] = {
    BodyKind.CHAT: {"messages": MESSAGES[0]},
    BodyKind.COMPLETION: {"prompt": "Once"},
    BodyKind.EMBEDDING: {"input": "text"},
    BodyKind.RESPONSES: {"input": "Say hello."},
    BodyKind.RERANK: {"query": "q", "documents": ["a", "b"]},
    BodyKind.SCORE: {"text_1": "q", "text_2": ["a", "b"]},
    BodyKind.TOKENIZE: {"prompt": "text"},
    BodyKind.DETOKENIZE: {"tokens": [1, 2, 3]},
}


def classes() -> dict[BodyKind, TypeAdapter[Any]]:
    """vLLM's own classes."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

    return {
        BodyKind.CHAT: TypeAdapter(ChatCompletionRequest),
        BodyKind.COMPLETION: TypeAdapter(CompletionRequest),
        BodyKind.RESPONSES: TypeAdapter(ResponsesRequest),
        BodyKind.EMBEDDING: TypeAdapter(EmbeddingRequest),
        BodyKind.RERANK: TypeAdapter(RerankRequest),
        BodyKind.SCORE: TypeAdapter(ScoreRequest),
        BodyKind.TOKENIZE: TypeAdapter(TokenizeRequest),
        BodyKind.DETOKENIZE: TypeAdapter(DetokenizeRequest),
    }


def fields(adapter: TypeAdapter[Any]) -> list[str]:
    """Names that vLLM's classes of a route know, by their JSON schema."""
    schema = adapter.json_schema()
    kinds = [schema, *schema.get("$defs", {}).values()]
    roots = [kind for kind in kinds if "model" in kind.get("properties", {})]
    return sorted({name for kind in roots for name in kind["properties"]} - {"model"})


def bodies(kind: BodyKind, names: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """For ever; the same for the same seed."""
    draw = random.Random(f"{kind}/{seed}")
    extra = [*REFUSED, "use_beam_search", "best_of", "guided_json", "guided_regex", "guided_grammar", "prompt_logprobs"]
    # What decides together is drawn together often enough.
    close = [n for n in ("echo", "logprobs", "top_logprobs", "n", "max_tokens", "prompt_logprobs") if n in names]
    while True:
        chosen = set(draw.sample(names, min(len(names), draw.choice([0, 1, 2, 3, 5, 8]))))
        if draw.random() < 0.15:
            chosen.add(draw.choice(extra))
        if draw.random() < 0.2:
            chosen.update(draw.sample(close, min(len(close), 3)))
        body = {"model": MODEL} | BASE[kind] | {name: _value(draw, name) for name in sorted(chosen)}
        yield body


def accepted(kind: BodyKind, body: bytes, limits: LimitsConfig) -> RequestFacts | None:
    """What the gateway makes of a body; None where it refuses."""
    known = Vocabularies()
    known.learn(MODEL, [TOKEN_IDS])
    try:
        facts = read(kind, body, limits)
        known.check(MODEL, facts)
    except BadRequest:
        return None
    return facts


def parsed(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """vLLM's request of a body; None where its classes refuse it, which the engine answers with 400."""
    from vllm.exceptions import VLLMValidationError

    try:
        return adapter.validate_python(json.loads(body))
    except (ValidationError, VLLMValidationError, ValueError):
        return None


def judge(kind: BodyKind, facts: RequestFacts, request: Any, limits: LimitsConfig) -> list[str]:
    """What an accepted body would have the engine compute that it should not; empty: nothing."""
    found: list[str] = []

    def must(holds: bool, what: str) -> None:
        if not holds:
            found.append(what)

    for name in REFUSED:
        # vLLM gives requests ids by itself where a body has none, and has its template read an `instruction`.
        own = name == "request_id" or (
            name == "chat_template_kwargs" and getattr(request, "instruction", None) is not None
        )
        must(bool(own) or not getattr(request, name, None), name)
    must(not getattr(request, "priority", 0), "priority")
    must(not any(f'"{key}"' in json.dumps(_plain(request)) for key in MEDIA), "media")
    if kind in GENERATING:
        _generation(kind, facts, request, limits, must)
    elif kind is BodyKind.EMBEDDING:
        texts = getattr(request, "input", None)
        must(not isinstance(texts, list) or len(texts) <= max(limits.batch_inputs, limits.prompt_tokens), "batch")
    elif kind is BodyKind.DETOKENIZE:
        must(max(request.tokens, default=0) < TOKEN_IDS, "tokens")
    return found


def _plain(request: Any) -> Any:
    shown = [value for name, value in vars(request).items() if name in type(request).model_fields]
    return json.loads(json.dumps(shown, default=lambda value: getattr(value, "__dict__", str(value))))


def _generation(kind: BodyKind, facts: RequestFacts, request: Any, limits: LimitsConfig, must: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    must(not getattr(request, "use_beam_search", False), "beam search")
    own = request.max_output_tokens if kind is BodyKind.RESPONSES else request.max_tokens
    if getattr(request, "max_completion_tokens", None) is not None:
        own = request.max_completion_tokens
    try:
        params = request.to_sampling_params(ROOM if own is None else min(ROOM, own), {})
    except (VLLMValidationError, ValueError, TypeError):
        return  # 400 of the engine's
    must((params.n or 1) == facts.n <= limits.n, "n")
    most = ROOM if facts.max_output_tokens is None else max(1, facts.max_output_tokens)
    must(params.max_tokens is None or params.max_tokens <= most, "max_tokens")
    must(params.min_tokens <= max(most, 0), "min_tokens")
    must(params.logprobs is None or 0 <= params.logprobs <= limits.logprobs, "logprobs")
    must(len(params.logprob_token_ids or ()) <= limits.logprobs, "number of logprob_token_ids")
    if params.prompt_logprobs is not None:
        prompt = getattr(request, "prompt", None)
        tokens = sum(map(len, prompt)) if isinstance(prompt, list) and prompt and isinstance(prompt[0], list) else 1
        must(facts.prompt_logprobs, "prompt_logprobs unseen")
        must(0 <= params.prompt_logprobs <= limits.logprobs, "prompt_logprobs")
        must(tokens * (params.prompt_logprobs + 1) * facts.n <= limits.prompt_logprobs, "product of prompt_logprobs")
    ids = [*(params.stop_token_ids or ()), *(params.allowed_token_ids or ()), *(params.logprob_token_ids or ())]
    ids += [*(params.logit_bias or ()), *_prompt_ids(getattr(request, "prompt", None))]
    must(all(0 <= i < TOKEN_IDS for i in ids), "token ids")
    must(max(map(len, (params.stop or [], params.bad_words or []))) <= limits.stop_sequences, "stop")
    must(not params.extra_args, "extra args")
    must(getattr(params, "trace_decode_token_ids", None) is None, "trace")
    must(math.isfinite(params.temperature) and params.temperature <= 2, "temperature")
    detection = params.repetition_detection
    must(detection is None or detection.max_pattern_size <= 256, "repetition detection")
    prompt = getattr(request, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        must(len(prompt) <= limits.batch_prompts, "prompts")
    if params.structured_outputs is not None:
        must(_states(params.structured_outputs) <= facts.schema_states + 1 <= limits.schema_states + 1, "schema")


def _prompt_ids(prompt: Any) -> list[int]:
    if not isinstance(prompt, list):
        return []
    return [i for part in prompt for i in (part if isinstance(part, list) else [part]) if isinstance(i, int)]


def _states(outputs: Any) -> int:
    cost = SchemaCost()
    for text in (outputs.json, outputs.structural_tag):
        if isinstance(text, str):
            cost.schema(json.loads(text))
        elif text is not None:
            cost.schema(text)
    for text in (outputs.regex, outputs.whitespace_pattern):
        if text is not None:
            cost.pattern(text)
    if outputs.grammar is not None:
        cost.grammar(outputs.grammar)
    cost.choices(outputs.choice or [])
    return cost.states
