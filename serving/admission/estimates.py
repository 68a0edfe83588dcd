"""How many tokens a request will take, before the engine has counted them. Pure; one for each model.

A prompt takes what a request takes without any text (a chat template, a default system prompt) and its text's bytes
over what a token has of them: the straight line through what the engine counted of prompts, each weighed by the square
of its length, because errors of long ones are what costs. An answer takes at most what the request allows and, within
that, a running mean of real answers: a client that always writes max_tokens: 32768 is not taken at its word. All of it
is forgotten slowly, so a new kind of traffic is believed after some ten requests.

Promise: what is expected of a tenant's requests follows that tenant's requests alone. What others send, in whatever
language and however long, moves none of it; before a tenant has sent anything it is what every tenant begins with.
Memory: nine numbers for each tenant of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from serving.admission.bounds import RequestFacts
from serving.metering.usage import BYTES_PER_TOKEN, Usage

# Until a tenant has answers of its own: a chat's.
OUTPUT_TOKENS = 256.0
# What one more request changes of each mean; of the first ones each changes more.
PROMPT_FORGETS = 0.01
OUTPUT_FORGETS = 0.02
FIRST_OUTPUTS = 5
# What is believed of prompts before any is counted, as much as if so many of no text and of so many bytes had been.
BELIEVED, BELIEVED_BYTES = 1.0, 1024.0
_BELIEVED: Final = (
    2 * BELIEVED,
    BELIEVED * BELIEVED_BYTES,
    BELIEVED * BELIEVED_BYTES**2,
    BELIEVED * BELIEVED_BYTES / BYTES_PER_TOKEN,
    BELIEVED * BELIEVED_BYTES**2 / BYTES_PER_TOKEN,
)
# Bounds on what is believed, whatever an engine reports: no tokenizer makes more than a token of a byte.
LEAST_BYTES, MOST_BYTES = 1.0, 16.0
MOST_WITHOUT_TEXT = 4096.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request is expected to take: tokens read and written, and sequences that run beside each other.

    `stated_tokens`: what the request says itself, whatever is expected: the ids of its prompt, its text at the fewest
    tokens that it can be, and max_tokens for each answer where it names them. `beside_tokens`: what else the engine
    computes for it, as if so many tokens more were read: a schema it compiles, log probabilities of the prompt. They
    are part of `input_tokens` and `stated_tokens`.
    """

    input_tokens: float
    output_tokens: float
    sequences: int
    stated_tokens: int = 0
    beside_tokens: int = 0


FREE = Cost(0.0, 0.0, 0)


class _Prompts:
    """Tokens of a tenant's prompts as a straight line over their bytes: least squares on decayed sums.

    What was believed at first is never forgotten: it alone says what a text would take of a tenant that sends none.
    """

    __slots__ = ("_sums", "per_byte", "without_text")

    def __init__(self) -> None:
        # Of products: count and count, count and bytes, bytes and bytes, count and tokens, bytes and tokens.
        self._sums: tuple[float, ...] = _BELIEVED
        self.without_text = 0.0
        self.per_byte = 1 / BYTES_PER_TOKEN

    def tokens(self, prompts: int, text_bytes: float) -> float:
        return self.without_text * prompts + self.per_byte * text_bytes

    def learn(self, prompts: int, text_bytes: int, tokens: int) -> None:
        seen = (prompts * prompts, prompts * text_bytes, text_bytes**2, prompts * tokens, text_bytes * tokens)
        nn, nb, bb, nt, bt = self._sums = tuple(
            before + new - PROMPT_FORGETS * (before - believed)
            for before, new, believed in zip(self._sums, seen, _BELIEVED, strict=True)
        )
        # What was believed keeps the divisor above nothing.
        self.per_byte = _within((nn * bt - nb * nt) / (nn * bb - nb * nb))
        self.without_text = (nt - self.per_byte * nb) / nn
        if self.without_text < 0:
            # Less than nothing is nothing, and the line goes through it.
            self.per_byte = _within(bt / bb)
        self.without_text = min(MOST_WITHOUT_TEXT, max(0.0, self.without_text))


def _within(tokens_per_byte: float) -> float:
    return min(1 / LEAST_BYTES, max(1 / MOST_BYTES, tokens_per_byte))


class _Tenant:
    """What one tenant's requests have been."""

    __slots__ = ("answers", "output_tokens", "prompts")

    def __init__(self) -> None:
        self.prompts = _Prompts()
        self.answers = 0
        self.output_tokens = OUTPUT_TOKENS


class TokenEstimates:
    """What is expected of one model's requests."""

    def __init__(self, *, generates: bool = True) -> None:
        """`generates`: whether the model writes at all."""
        self._generates = generates
        self._tenants: dict[str, _Tenant] = {}
        # Of an answer, whoever asked: how long a sequence runs on these engines.
        self.output_tokens = OUTPUT_TOKENS

    def cost(self, tenant: str, facts: RequestFacts | None, body_bytes: int) -> Cost:
        """What to expect of a tenant's request; `body_bytes` stands for the prompt where there are no facts."""
        known = self._tenants.get(tenant) or _UNKNOWN
        output = known.output_tokens if self._generates else 0.0
        if facts is None:
            return Cost(known.prompts.tokens(1, body_bytes), output, 1)
        ids, sequences, most = facts.token_ids, facts.sequences, facts.max_output_tokens
        text_bytes = facts.prompt_bytes - BYTES_PER_TOKEN * ids
        stated = ids + math.floor(text_bytes / MOST_BYTES)
        if most is not None and self._generates:
            output = min(output, most)
            stated += most * sequences
        # Ids are the whole prompt: no template comes before them.
        read = ids + known.prompts.tokens(0 if ids else facts.prompts, text_bytes)
        # A wide state takes about as long to compile as a token takes to compute; a prompt token with log probabilities
        # as a token that is written, for the head over the vocabulary is computed for it.
        beside = facts.schema_states + (math.ceil(read) * facts.n if facts.prompt_logprobs else 0)
        known_beside = (
            facts.schema_states + (ids + math.floor(text_bytes / MOST_BYTES)) * facts.n * facts.prompt_logprobs
        )
        return Cost(read + beside, output * sequences, sequences, stated + known_beside, beside)

    def learn(self, tenant: str, facts: RequestFacts, usage: Usage) -> None:
        """Take what the engine counted of a request that was completed."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Tenant()
        if usage.prompt_tokens and facts.prompt_bytes and not facts.token_ids:
            known.prompts.learn(facts.prompts, facts.prompt_bytes, usage.prompt_tokens)
        if self._generates:
            seen = usage.completion_tokens / facts.sequences
            known.answers += 1
            part = max(OUTPUT_FORGETS, 1 / (known.answers + FIRST_OUTPUTS))
            known.output_tokens += part * (seen - known.output_tokens)
            self.output_tokens += OUTPUT_FORGETS * (seen - self.output_tokens)

    def keep(self, tenants: Container[str]) -> None:
        """Forget whoever is not among these."""
        for tenant in [known for known in self._tenants if known not in tenants]:
            del self._tenants[tenant]


_UNKNOWN = _Tenant()
