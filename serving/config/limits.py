"""How large a single request may be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.config.base import Frozen, PositiveInt


class LimitsConfig(Frozen):
    """Bounds on a single request, checked before any engine is touched."""

    body_bytes: PositiveInt = 4 * 1024 * 1024
    header_bytes: Annotated[int, Field(ge=1024, le=15 * 1024)] = 8 * 1024
    header_count: PositiveInt = 64
    json_depth: PositiveInt = 64
    n: PositiveInt = 8
    best_of: PositiveInt = 8
    # None: as much as the model has room for behind the prompt. Coding agents ask for the most they know of, and a
    # number here would refuse them all or none.
    output_tokens: PositiveInt | None = None
    logprobs: Annotated[int, Field(ge=0)] = 20
    stop_sequences: PositiveInt = 16
    stop_bytes: PositiveInt = 256
    logit_bias_entries: PositiveInt = 1024
    batch_prompts: PositiveInt = 64
    # Embedding inputs, rerank documents, score pairs: far cheaper than a generation. OpenAI's own bound.
    batch_inputs: PositiveInt = 2048
    prompt_tokens: PositiveInt = 131072
    messages: PositiveInt = 2048
    tools: PositiveInt = 128
    schema_bytes: PositiveInt = 64 * 1024
    # What all schemas, patterns and grammars of one request may cost the engine to compile: wide states, of which each
    # takes about 10 ms of one core with a vocabulary of 50,000: two strings of any `maxLength` (256 each), and 64 more.
    schema_states: PositiveInt = 576
    # Log probabilities of a prompt: tokens times alternatives (and the token itself) times n. Each takes some 500 bytes
    # of the engine's front while the answer is written.
    prompt_logprobs: PositiveInt = 256 * 1024


class TenantLimitsConfig(Frozen):
    """A tenant's own bounds: each narrows the one of `limits`; absent: that one."""

    body_bytes: PositiveInt | None = None
    json_depth: PositiveInt | None = None
    n: PositiveInt | None = None
    best_of: PositiveInt | None = None
    # Also what a request gets that names none itself.
    output_tokens: PositiveInt | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: PositiveInt | None = None
    stop_bytes: PositiveInt | None = None
    logit_bias_entries: PositiveInt | None = None
    batch_prompts: PositiveInt | None = None
    batch_inputs: PositiveInt | None = None
    prompt_tokens: PositiveInt | None = None
    messages: PositiveInt | None = None
    tools: PositiveInt | None = None
    schema_bytes: PositiveInt | None = None
    schema_states: PositiveInt | None = None
    prompt_logprobs: PositiveInt | None = None

    def given(self) -> dict[str, int]:
        """The bounds that are the tenant's own."""
        return self.model_dump(exclude_none=True)

    def within(self, limits: LimitsConfig) -> LimitsConfig:
        """The bounds that hold for its requests."""
        own = self.given()
        common = {name: getattr(limits, name) for name in own}
        return limits.model_copy(
            update={name: value if common[name] is None else min(value, common[name]) for name, value in own.items()}
        )
