"""What the gateway decodes of a request body, one struct per kind; the names are the wire's.

Only the fields that decide are here; the parser skips all others, and the engine gets the body as it came.
So every type here must be as strict as the engine's or stricter: a value that both accept means the same to
both. Ranges that no operator would change stand in the types; the configurable ones are checked in
`bounds`.

Fields and types follow vLLM 0.29's request models (`vllm/entrypoints/openai/*/protocol.py`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Raw, Struct

ABSENT = Raw(b"")

# Token ids and counts travel to the engine core as machine integers; no vocabulary reaches 2**31.
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1

TokenId = Annotated[int, Meta(ge=0, le=MAX_INT32)]
Count = Annotated[int, Meta(ge=0, le=MAX_INT32)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
# At least 0; vLLM refuses 0 itself. 10 is far past the point where a model only stutters.
RepetitionPenalty = Annotated[float, Meta(ge=0, le=10)]
LengthPenalty = Annotated[float, Meta(ge=-10, le=10)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_INT32)]
Seed = Annotated[int, Meta(ge=-MAX_INT64 - 1, le=MAX_INT64)]
Truncation = Annotated[int, Meta(ge=-1, le=MAX_INT32)]
Dimensions = Annotated[int, Meta(ge=1, le=65536)]
Budget = Annotated[int, Meta(ge=-1, le=MAX_INT32)]
# vLLM compares every pattern length up to it at every token.
PatternSize = Annotated[int, Meta(ge=0, le=256)]
StreamInterval = Annotated[int, Meta(ge=1, le=MAX_INT32)]
Role = Annotated[str, Meta(max_length=64)]


class Wire(Struct, kw_only=True, gc=False):
    """Base: keyword fields, unknown ones skipped. Without cycles, so the collector need not see it."""


class Refused(Wire):
    """Fields no kind accepts; `bounds.REFUSED` gives the reason for each."""

    prompt_embeds: Raw = ABSENT
    chat_template: Raw = ABSENT
    chat_template_kwargs: Raw = ABSENT
    mm_processor_kwargs: Raw = ABSENT
    media_io_kwargs: Raw = ABSENT
    multi_modal_data: Raw = ABSENT
    kv_transfer_params: Raw = ABSENT
    ec_transfer_params: Raw = ABSENT
    vllm_xargs: Raw = ABSENT
    logits_processors: Raw = ABSENT
    request_id: Raw = ABSENT


class Common(Refused):
    """What every kind has."""

    model: str | None = None
    priority: int | None = None
    truncate_prompt_tokens: Truncation | None = None


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RepetitionDetection(Wire):
    max_pattern_size: PatternSize = 0
    min_pattern_size: PatternSize = 0
    min_count: Count = 0


class StructuredOutputs(Wire):
    """What may constrain an answer; `json` and `structural_tag` may be JSON inside a JSON string."""

    json: Raw = ABSENT
    structural_tag: str | None = None
    regex: str | None = None
    whitespace_pattern: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class Generation(Common):
    """Sampling and output of chat, completion and responses."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    min_tokens: int | None = None
    thinking_token_budget: Budget | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    length_penalty: LengthPenalty | None = None
    repetition_detection: RepetitionDetection | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    allowed_token_ids: list[TokenId] | None = None
    logprob_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    logit_bias: Raw = ABSENT
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    stream_interval: StreamInterval | None = None
    routed_experts_prompt_start: Count | None = None
    response_format: Raw = ABSENT
    structured_outputs: Raw = ABSENT
    guided_json: Raw = ABSENT
    guided_regex: Raw = ABSENT
    guided_choice: Raw = ABSENT
    guided_grammar: Raw = ABSENT
    tool_choice: Raw = ABSENT


class Part(Wire):
    """One part of a message's content. The engine looks at a media key even beside `"type": "text"`, so
    each is refused by name."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    uuid: Raw = ABSENT
    image_url: Raw = ABSENT
    image_pil: Raw = ABSENT
    image_embeds: Raw = ABSENT
    input_image: Raw = ABSENT
    audio_url: Raw = ABSENT
    audio_embeds: Raw = ABSENT
    input_audio: Raw = ABSENT
    video_url: Raw = ABSENT
    video_embeds: Raw = ABSENT
    prompt_embeds: Raw = ABSENT
    file: Raw = ABSENT
    input_file: Raw = ABSENT
    file_id: Raw = ABSENT
    file_url: Raw = ABSENT
    file_data: Raw = ABSENT


Content = str | list[str | Part] | None


class Function(Wire):
    arguments: str | None = None


class ToolCall(Wire):
    function: Function | None = None


class Message(Wire):
    role: Role | None = None
    content: Content = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    # An earlier spoken answer of the model, by id: media, and state.
    audio: Raw = ABSENT


class Chat(Generation):
    messages: list[Message] | None = None
    logprobs: bool | None = None
    tools: list[Raw] | None = None
    documents: list[dict[str, str]] | None = None


class Completion(Generation):
    prompt: Raw = ABSENT
    logprobs: int | None = None
    suffix: str | None = None


class Item(Wire):
    """One item of a responses request's input."""

    type: str | None = None
    role: Role | None = None
    content: Content = None
    output: Content = None
    arguments: str | None = None


class Responses(Generation):
    input: str | list[Item] | None = None
    instructions: str | None = None
    tools: list[Raw] | None = None
    max_tool_calls: Count | None = None
    text: Raw = ABSENT
    background: bool | None = None
    store: bool | None = None
    previous_response_id: Raw = ABSENT
    previous_input_messages: Raw = ABSENT
    conversation: Raw = ABSENT
    prompt: Raw = ABSENT


class Embedding(Common):
    input: Raw = ABSENT
    messages: list[Message] | None = None
    dimensions: Dimensions | None = None


class ScoreObject(Wire):
    """The engine's form for media; text alone fits a string, but its list of text parts is harmless."""

    content: list[str | Part] | None = None


ScoreInput = str | list[str | ScoreObject] | ScoreObject


class Rerank(Common):
    query: str | ScoreObject | None = None
    documents: ScoreInput | None = None
    top_n: Count | None = None
    instruction: str | None = None
    max_tokens_per_query: Count | None = None
    max_tokens_per_doc: Count | None = None


class Score(Common):
    text_1: ScoreInput | None = None
    text_2: ScoreInput | None = None
    data_1: ScoreInput | None = None
    data_2: ScoreInput | None = None
    queries: ScoreInput | None = None
    documents: ScoreInput | None = None
    items: ScoreInput | None = None
    instruction: str | None = None
    max_tokens_per_query: Count | None = None
    max_tokens_per_doc: Count | None = None


class Tokenize(Common):
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Raw] | None = None
    tool_choice: Raw = ABSENT


class Detokenize(Common):
    tokens: list[TokenId] | None = None


class ToolHead(Wire):
    type: str | None = None
    function: Raw = ABSENT
    parameters: Raw = ABSENT


AnyBody = Chat | Completion | Responses | Embedding | Rerank | Score | Tokenize | Detokenize
