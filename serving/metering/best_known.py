"""What a request used where its answer did not say.

Exact where nothing was computed: it never reached an engine, the engine refused it, or its route computes nothing. Else
a guess that is marked as one: four bytes of text make a token of the prompt, an event a token of the answer. Of an
answer in one piece nothing is seen while it is written: it is taken to be as long as was expected. The engine itself is
asked afterwards (serving.api.billing); the guess stays only where it cannot tell.
"""

from __future__ import annotations

import math
from typing import Any, Final, Protocol

from serving.metering.answers import FREE_PATHS, NOTHING
from serving.metering.usage import BYTES_PER_TOKEN, Usage

REFUSED: Final = range(400, 500)


class Ended(Protocol):
    """What is known of a request that has ended."""

    @property
    def path(self) -> str: ...
    @property
    def facts(self) -> Any: ...
    @property
    def stream(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def engine_request_id(self) -> str: ...
    @property
    def first_byte_s(self) -> float | None: ...
    @property
    def later_events(self) -> int: ...
    @property
    def expected_output_tokens(self) -> float: ...


def most_lost(ended: Ended, counted_prompt_tokens: int, *, exact: bool) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer that another attempt at the request cost its engine at most; None: nobody can say.

    `counted_prompt_tokens` of the attempt that was answered, `exact` if its engine said so: the prompt is the same.
    """
    facts = ended.facts
    prompt = counted_prompt_tokens if exact and counted_prompt_tokens else None
    if facts is None or facts.max_output_tokens is None:
        return prompt, None
    return prompt, facts.max_output_tokens * facts.sequences


def best_known(ended: Ended) -> tuple[Usage, bool]:
    """Usage, and whether it is exact."""
    if ended.path in FREE_PATHS or not ended.engine_request_id:
        return NOTHING, True
    if ended.first_byte_s is not None and ended.status in REFUSED:
        return NOTHING, True
    prompt_bytes = 0 if ended.facts is None else int(ended.facts.prompt_bytes)
    written = ended.expected_output_tokens
    if ended.stream:
        written = ended.later_events if ended.first_byte_s is not None else 0
    return Usage(-(-prompt_bytes // BYTES_PER_TOKEN), math.ceil(written)), False
