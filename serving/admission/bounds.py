"""The early, cheap refusal of bad input, before an engine is touched.

Promises: what passes is inside every bound of `LimitsConfig`; what does not is a BadRequest whose sentence
names the field and the limit; nothing else is ever raised, whatever the bytes; one parse, and nothing is
written anew for the engine, which gets the client's own bytes (and the tenant's cache salt behind them).

The engine parses those bytes again (Python's json, then pydantic), so the two views must not differ in what
is bounded here. They do not: keys are unescaped and compared exactly by both; of a repeated key both keep
the last value; numbers, strings and booleans are accepted here only in their own JSON type, which pydantic
takes as they are; and everything that json takes and msgspec refuses (NaN, a byte order mark, UTF-16, lone
surrogates) is refused. A field this module does not know is relayed: the engine ignores it or answers for
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from serving.admission import constraints, content, json_shape, shapes
from serving.admission.complaints import above, decode, is_given, missing, too_long, too_many, unsupported
from serving.admission.content import Prompts
from serving.config import LimitsConfig
from serving.errors import BadRequest
from serving.metering.usage import BYTES_PER_TOKEN


class BodyKind(StrEnum):
    """The shape of a route's body."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RESPONSES = "responses"
    RERANK = "rerank"
    SCORE = "score"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What the gateway decides by.

    `include_usage`: the client asked for the usage event of a stream. `prompt_bytes`: UTF-8 bytes of all
    text the prompt is made of, tools included; a token id counts as four. `max_output_tokens`: for each of
    `n` answers; None where the model's context is the only bound. `prompts`: how many the body holds, of which each
    has its answers. `token_ids`: how many the prompts hold. `token_id_uses`: of each field that names token
    ids the greatest. `left_out`: number and type of tools that the engine does not get. `unreadable`: tool calls have
    arguments that no engine reads.
    `schema_states`: what is compiled before anything is computed (serving.admission.schema_cost).
    `prompt_logprobs`: whether the engine computes log probabilities of the prompt's tokens too.
    """

    model: str
    stream: bool
    include_usage: bool
    prompt_bytes: int
    max_output_tokens: int | None
    n: int
    prompts: int = 1
    token_ids: int = 0
    token_id_uses: tuple[tuple[str, int], ...] = ()
    left_out: tuple[tuple[int, str], ...] = ()
    unreadable: bool = False
    schema_states: int = 0
    prompt_logprobs: bool = False

    @property
    def sequences(self) -> int:
        """What an engine computes beside each other for it: an answer of each prompt at a time."""
        return self.prompts * self.n


_DECODERS: Final[dict[BodyKind, msgspec.json.Decoder[shapes.AnyBody]]] = {
    BodyKind.CHAT: msgspec.json.Decoder(shapes.Chat),
    BodyKind.COMPLETION: msgspec.json.Decoder(shapes.Completion),
    BodyKind.EMBEDDING: msgspec.json.Decoder(shapes.Embedding),
    BodyKind.RESPONSES: msgspec.json.Decoder(shapes.Responses),
    BodyKind.RERANK: msgspec.json.Decoder(shapes.Rerank),
    BodyKind.SCORE: msgspec.json.Decoder(shapes.Score),
    BodyKind.TOKENIZE: msgspec.json.Decoder(shapes.Tokenize),
    BodyKind.DETOKENIZE: msgspec.json.Decoder(shapes.Detokenize),
}
# Where prompts may be token ids, and the field that holds them.
_PROMPT_FIELDS: Final[dict[BodyKind, str]] = {
    BodyKind.COMPLETION: "prompt",
    BodyKind.EMBEDDING: "input",
    BodyKind.DETOKENIZE: "tokens",
}
_logit_bias = msgspec.json.Decoder(dict[str, shapes.Bias])
_TOKEN_ID: Final = re.compile(r"[0-9]{1,10}")

# vLLM's own default for /v1/completions.
COMPLETION_OUTPUT_TOKENS = 16
# One entry of logit_bias, generously spaced: refuses a long one before it is parsed.
_BIAS_ENTRY_BYTES = 64
MAX_MODEL_BYTES = 256

_TEMPLATE = "the model's own chat template is used"
_TEXT_ONLY = "this cluster serves text only"
_INTERNAL = "it is internal to the cluster"
_STATELESS = "responses are not stored; send the whole conversation in 'input'"
REFUSED: Final[dict[str, str]] = {
    "prompt_embeds": "prompts are text or token ids",
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "mm_processor_kwargs": _TEXT_ONLY,
    "media_io_kwargs": _TEXT_ONLY,
    "multi_modal_data": _TEXT_ONLY,
    "kv_transfer_params": _INTERNAL,
    "ec_transfer_params": _INTERNAL,
    "vllm_xargs": _INTERNAL,
    "logits_processors": "requests carry no code",
    # A client's id could collide with another tenant's inside the engine.
    "request_id": "the cluster gives every request its id",
}
_RESPONSES_REFUSED: Final[dict[str, str]] = {
    "previous_response_id": _STATELESS,
    "previous_input_messages": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "prompt templates are not stored here",
}
_SCORE_PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


def read(kind: BodyKind, body: bytes, limits: LimitsConfig, only_model: str | None = None) -> RequestFacts:
    """Check one request body against every bound; raises BadRequest with `param` and `code`.

    `only_model` is meant where the body names none.
    """
    token_ids = limits.prompt_tokens if kind in _PROMPT_FIELDS else 0
    json_shape.check(body, limits.json_depth, content.MAX_VALUES + token_ids)
    if not body.isascii():
        _check_utf8(body)
    found = decode(_DECODERS[kind], body)
    model = _common(found, only_model)
    uses = _generation(found, limits) if isinstance(found, shapes.Generation) else []
    stream = isinstance(found, shapes.Generation) and bool(found.stream)
    options = found.stream_options if isinstance(found, shapes.Generation) else None
    prompts = _PROMPTS[type(found)](found, limits)
    if prompts.highest_id >= 0:
        uses.append((_PROMPT_FIELDS[kind], prompts.highest_id))
    return RequestFacts(
        model=model,
        stream=stream,
        include_usage=stream and options is not None and bool(options.include_usage),
        prompt_bytes=prompts.size_bytes,
        max_output_tokens=_max_output_tokens(found),
        n=(found.n or 1) if isinstance(found, shapes.Generation) else 1,
        # A null among texts or an empty list is refused by the engine.
        prompts=max(1, prompts.number),
        token_ids=prompts.token_ids,
        token_id_uses=tuple(uses),
        left_out=prompts.left_out,
        unreadable=prompts.unreadable,
        schema_states=constraints.states(found, limits) if isinstance(found, shapes.Generation) else 0,
        prompt_logprobs=_prompt_logprobs(found, prompts, limits),
    )


def _check_utf8(body: bytes) -> None:
    # The parser checks only the strings it builds; the engine decodes the whole body.
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request body is not valid UTF-8 (byte {error.start}).", code="invalid_json") from None


def _common(found: shapes.AnyBody, only_model: str | None) -> str:
    for name, reason in REFUSED.items():
        if is_given(getattr(found, name)):
            raise unsupported(name, reason)
    model = found.model or only_model
    if not model:
        raise missing("model")
    if (size := content.utf8_bytes(model)) > MAX_MODEL_BYTES:
        raise too_long("model", MAX_MODEL_BYTES, size)
    if found.priority:
        raise unsupported("priority", "the cluster orders requests itself; leave it out or send 0")
    return model


def _chat(found: shapes.Chat, limits: LimitsConfig) -> Prompts:
    documents = found.documents or []
    if len(documents) > limits.batch_prompts:
        raise too_many("documents", limits.batch_prompts, len(documents))
    turns = content.messages(found.messages, limits)
    tools = content.tools(found.tools, found.tool_choice, content.FUNCTIONS, limits)
    return Prompts(
        turns.size_bytes
        + tools.size_bytes
        + sum(content.utf8_bytes(text) for document in documents for text in document.values()),
        left_out=tools.left_out,
        unreadable=turns.unreadable,
    )


def _completion(found: shapes.Completion, limits: LimitsConfig) -> Prompts:
    prompts = content.prompt(found.prompt, "prompt", limits.batch_prompts, limits)
    return prompts._replace(size_bytes=prompts.size_bytes + content.utf8_bytes(found.suffix))


def _embedding(found: shapes.Embedding, limits: LimitsConfig) -> Prompts:
    if found.messages is None:
        return content.prompt(found.input, "input", limits.batch_inputs, limits)
    if is_given(found.input):
        raise unsupported("messages", "send either 'input' or 'messages'")
    turns = content.messages(found.messages, limits)
    return Prompts(turns.size_bytes, unreadable=turns.unreadable)


def _rerank(found: shapes.Rerank, limits: LimitsConfig) -> Prompts:
    if found.query is None:
        raise missing("query")
    if found.documents is None:
        raise missing("documents")
    return _scored(found.instruction, {"query": found.query, "documents": found.documents}, limits)


def _tokenize(found: shapes.Tokenize, limits: LimitsConfig) -> Prompts:
    tools = content.tools(found.tools, found.tool_choice, content.FUNCTIONS, limits)
    if found.messages is not None:
        turns = content.messages(found.messages, limits)
    elif found.prompt is None:
        raise missing("prompt")
    else:
        turns = content.Turns(content.utf8_bytes(found.prompt))
    return Prompts(tools.size_bytes + turns.size_bytes, left_out=tools.left_out, unreadable=turns.unreadable)


def _detokenize(found: shapes.Detokenize, limits: LimitsConfig) -> Prompts:
    if found.tokens is None:
        raise missing("tokens")
    if len(found.tokens) > limits.prompt_tokens:
        raise too_many("tokens", limits.prompt_tokens, len(found.tokens), "tokens")
    return Prompts(len(found.tokens) * BYTES_PER_TOKEN, highest_id=max(found.tokens, default=-1))


def _responses(found: shapes.Responses, limits: LimitsConfig) -> Prompts:
    for name, reason in _RESPONSES_REFUSED.items():
        if is_given(getattr(found, name)):
            raise unsupported(name, reason)
    for name in ("background", "store"):
        if getattr(found, name):
            raise unsupported(name, "responses are not stored; leave it out or send false")
    turns = content.responses_input(found.input, limits)
    tools = content.tools(found.tools, found.tool_choice, content.FUNCTIONS_AND_NAMESPACES, limits)
    return Prompts(
        turns.size_bytes + content.utf8_bytes(found.instructions) + tools.size_bytes,
        left_out=tools.left_out,
        unreadable=turns.unreadable,
    )


def _score(found: shapes.Score, limits: LimitsConfig) -> Prompts:
    pairs = [p for p in _SCORE_PAIRS if all(getattr(found, side) is not None for side in p)]
    if not pairs:
        raise missing("text_1") if found.text_1 is None else missing("text_2")
    sides = {side for pair in pairs for side in pair}
    return _scored(found.instruction, {side: getattr(found, side) for side in sorted(sides)}, limits)


def _scored(instruction: str | None, sides: Mapping[str, shapes.ScoreInput], limits: LimitsConfig) -> Prompts:
    """Texts that are held against each other: an engine reads each of them, or each pair, as a prompt."""
    found = [content.score_input(texts, side, limits) for side, texts in sides.items()]
    return Prompts(
        content.utf8_bytes(instruction) + sum(one.size_bytes for one in found), sum(one.number for one in found)
    )


_PROMPTS: Final[dict[type[shapes.AnyBody], Callable[[Any, LimitsConfig], Prompts]]] = {
    shapes.Chat: _chat,
    shapes.Completion: _completion,
    shapes.Responses: _responses,
    shapes.Embedding: _embedding,
    shapes.Rerank: _rerank,
    shapes.Score: _score,
    shapes.Tokenize: _tokenize,
    shapes.Detokenize: _detokenize,
}


def _max_output_tokens(found: shapes.AnyBody) -> int | None:
    match found:
        case shapes.Chat():
            # The engine prefers the newer name, a zero under it included.
            return found.max_tokens if found.max_completion_tokens is None else found.max_completion_tokens
        case shapes.Completion():
            return COMPLETION_OUTPUT_TOKENS if found.max_tokens is None else found.max_tokens
        case shapes.Responses():
            return found.max_output_tokens
        case _:
            return 0


def _generation(found: shapes.Generation, limits: LimitsConfig) -> list[tuple[str, int]]:
    """Check what all generation has in common; returns the greatest token id of each field that names some."""
    if found.use_beam_search:
        # The engine computes every beam's prompt and tokens anew and counts them as one answer.
        raise unsupported("use_beam_search", "answers are sampled here; leave it out or send false")
    # Without a limit the model's own room is the bound, and its engine knows it.
    output_tokens = shapes.MAX_INT32 if limits.output_tokens is None else limits.output_tokens
    for name, least, most in (
        ("n", 1, limits.n),
        ("best_of", 1, limits.best_of),
        ("max_tokens", 0, output_tokens),
        ("max_completion_tokens", 0, output_tokens),
        ("max_output_tokens", 0, output_tokens),
        ("min_tokens", 0, output_tokens),
        ("thinking_token_budget", -1, output_tokens),
        ("top_logprobs", 0, limits.logprobs),
        ("prompt_logprobs", 0, limits.logprobs),
    ):
        _within(name, getattr(found, name), least, most)
    if isinstance(found, shapes.Completion):
        _within("logprobs", found.logprobs, 0, limits.logprobs)
    _strings("stop", [found.stop] if isinstance(found.stop, str) else found.stop, limits)
    _strings("bad_words", found.bad_words, limits)
    return _token_ids(found, limits)


def _token_ids(found: shapes.Generation, limits: LimitsConfig) -> list[tuple[str, int]]:
    """The fields beside the prompt that name token ids: their number, and the greatest id of each."""
    uses: list[tuple[str, int]] = []
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        entries = getattr(found, name)
        if not entries:
            continue
        # Of each of these the engine tells the log probability at every token.
        most = limits.logprobs if name == "logprob_token_ids" else limits.logit_bias_entries
        if len(entries) > most:
            raise too_many(name, most, len(entries), "entries")
        uses.append((name, max(entries)))
    if is_given(found.logit_bias):
        most_bytes = _BIAS_ENTRY_BYTES * limits.logit_bias_entries
        if (size := len(bytes(found.logit_bias))) > most_bytes:
            raise too_long("logit_bias", most_bytes, size)
        biases = decode(_logit_bias, found.logit_bias, "logit_bias")
        if len(biases) > limits.logit_bias_entries:
            raise too_many("logit_bias", limits.logit_bias_entries, len(biases), "entries")
        if biases:
            uses.append(("logit_bias", max(map(_token_id, biases))))
    return uses


def _token_id(key: str) -> int:
    """A key of logit_bias. The engine takes whatever Python's int() takes; here it is written as JSON writes it."""
    if not _TOKEN_ID.fullmatch(key):
        raise BadRequest(
            "Invalid 'logit_bias': expected token ids as keys, each a whole number of at least 0.",
            code="invalid_value",
            param="logit_bias",
        )
    return int(key)


def _prompt_logprobs(found: shapes.AnyBody, prompts: Prompts, limits: LimitsConfig) -> bool:
    """Whether the engine computes log probabilities of the prompt, which costs it a row over the whole vocabulary and
    an object for each alternative at every token; raises BadRequest where they are too many.

    `echo` asks for them too: in a chat always, in a completion with `logprobs`, be it 0.
    """
    if not isinstance(found, shapes.Chat | shapes.Completion):
        return False
    alternatives, param = found.prompt_logprobs, "prompt_logprobs"
    if alternatives is None and found.echo:
        alternatives = (found.top_logprobs or 0) if isinstance(found, shapes.Chat) else found.logprobs
        param = "top_logprobs" if isinstance(found, shapes.Chat) else "logprobs"
    if alternatives is None:
        return False
    # No tokenizer makes more than a token of a byte. An engine of its own answers each of `n`.
    tokens = prompts.token_ids or prompts.size_bytes
    entries = tokens * (alternatives + 1) * (found.n or 1)
    if entries > limits.prompt_logprobs:
        raise BadRequest(
            f"Invalid '{param}': log probabilities of the prompt are asked for, {entries} of them (tokens, or bytes of "
            f"text, times alternatives and one more, times n), where {limits.prompt_logprobs} are allowed. "
            "Send less, or fewer alternatives.",
            code="integer_above_max_value",
            param=param,
        )
    return True


def _within(name: str, value: int | None, least: int, most: int) -> None:
    if value is None:
        return
    if value > most:
        raise above(name, most, value)
    if value < least:
        raise BadRequest(
            f"Invalid '{name}': expected a value of at least {least}, but got {value}.",
            code="integer_below_min_value",
            param=name,
        )


def _strings(name: str, values: list[str] | None, limits: LimitsConfig) -> None:
    if values is None:
        return
    if len(values) > limits.stop_sequences:
        raise too_many(name, limits.stop_sequences, len(values), "strings")
    for i, value in enumerate(values):
        if (size := content.utf8_bytes(value)) > limits.stop_bytes:
            raise too_long(f"{name}[{i}]", limits.stop_bytes, size)
