"""The tokens of one request, as the engine counted them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Where nobody has counted: text makes a token of about so many bytes, and a token id counts as so many.
BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens` are those of the prompt that the engine's prefix cache gave."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
