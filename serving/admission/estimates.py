"""How many tokens a request will take, before the engine has counted them. Pure; one for each model.

A prompt is its bytes over a running mean of bytes a token, an answer at most what the request allows and, within that,
a running mean of real answers: a client that always writes max_tokens: 32768 is not taken at its word. Both means
follow what the engine counted and forget slowly, so a new kind of traffic is believed after some hundred requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.admission.bounds import RequestFacts
from serving.metering.usage import BYTES_PER_TOKEN, Usage

# Until it has: a chat's answer.
OUTPUT_TOKENS = 256.0
# What one more request changes of each mean.
PROMPT_FORGETS = 0.01
OUTPUT_FORGETS = 0.02
# Bounds on what is believed of either mean, whatever an engine reports.
LEAST_BYTES, MOST_BYTES = 0.25, 16.0
# An answer that is not a stream and whose usage is not known: what its JSON is besides the text.
ENVELOPE_BYTES = 512


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request is expected to take: tokens read and written, and sequences that run beside each other."""

    input_tokens: float
    output_tokens: float
    sequences: int


FREE = Cost(0.0, 0.0, 0)


class TokenEstimates:
    """The running means of one model."""

    def __init__(self, *, generates: bool = True) -> None:
        """`generates`: whether the model writes at all."""
        self._generates = generates
        self.bytes_per_token = float(BYTES_PER_TOKEN)
        self.output_tokens = OUTPUT_TOKENS

    def cost(self, facts: RequestFacts | None, body_bytes: int) -> Cost:
        """What to expect of a request; `body_bytes` stands for the prompt where there are no facts."""
        if facts is None:
            return Cost(body_bytes / self.bytes_per_token, self.output_tokens if self._generates else 0.0, 1)
        output = self.output_tokens if self._generates else 0.0
        if facts.max_output_tokens is not None:
            output = min(output, facts.max_output_tokens)
        return Cost(facts.prompt_bytes / self.bytes_per_token, output * facts.n, facts.n)

    def written(self, sent_bytes: int) -> float:
        """Output tokens of a whole answer of so many bytes, where nobody has counted them."""
        return max(0, sent_bytes - ENVELOPE_BYTES) / self.bytes_per_token if self._generates else 0.0

    def learn(self, facts: RequestFacts, usage: Usage) -> None:
        """Take what the engine counted of a request that was completed."""
        if usage.prompt_tokens and facts.prompt_bytes:
            seen = min(MOST_BYTES, max(LEAST_BYTES, facts.prompt_bytes / usage.prompt_tokens))
            self.bytes_per_token += PROMPT_FORGETS * (seen - self.bytes_per_token)
        if self._generates:
            self.output_tokens += OUTPUT_FORGETS * (usage.completion_tokens / facts.n - self.output_tokens)
