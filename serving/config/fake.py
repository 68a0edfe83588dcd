"""The simulated engine: its latency model, its sizes and the faults it plays."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.config.base import Frozen, PositiveInt


class FakeFaults(Frozen):
    """Faults the fake engine plays, each drawn per request from its seed."""

    # Chance that a request is answered 500.
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Chance that a request is accepted and never answered.
    hang_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    # The connection is cut after so many bytes of the response body.
    cut_after_bytes: PositiveInt | None = None
    # The whole process exits after so many bytes of response bodies.
    die_after_bytes: PositiveInt | None = None
    # Seconds before /health answers 200.
    slow_start_s: Annotated[float, Field(ge=0)] = 0.0


class FakeEngineConfig(Frozen):
    """Latency model and sizes of the fake engine; the defaults are a 7B model on a mid-size GPU, rounded."""

    prefill_tokens_per_s: Annotated[float, Field(gt=0)] = 20000.0
    # Prompt tokens of one pass at most, longer prompts go in chunks (vLLM's max_num_batched_tokens).
    prefill_chunk_tokens: PositiveInt = 2048
    # One decode step for a batch of one, and what each further sequence adds, milliseconds.
    decode_ms: Annotated[float, Field(ge=0)] = 8.0
    decode_ms_per_sequence: Annotated[float, Field(ge=0)] = 0.02
    # Sequences in one batch (vLLM's max_num_seqs).
    batch_slots: PositiveInt = 256
    kv_blocks: PositiveInt = 8192
    block_tokens: PositiveInt = 16
    max_model_len: PositiveInt = 131072
    # Token ids of the vocabulary: 0 and up, fewer than this. Texts have ids all over the default's range.
    token_ids: Annotated[int, Field(ge=1, le=2**31)] = 2**31
    embedding_dimensions: PositiveInt = 384
    # Lengths of answers that end by themselves, tokens: log-normal, as those of chats, by the median and the standard
    # deviation of the logarithm (0: all are as long). Drawn from the prompt, so the same prompt has the
    # same answer. `max_tokens` cuts it off; with `ignore_eos` an answer is as long as `max_tokens`.
    answer_tokens: PositiveInt = 160
    answer_spread: Annotated[float, Field(ge=0, le=3)] = 0.8
    seed: int = 0
    faults: FakeFaults = FakeFaults()
