"""What every workload makes, and what it is given: requests that are still to be written and timed.

A draft knows how long its prompt is, but not its words: a trace is cut, thinned and capped before any text is
made, so a request that is never sent costs nothing.
"""

from __future__ import annotations

import math
import os
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from loadtest.errors import LoadtestError
from loadtest.strict import Strict
from loadtest.workloads.text import DEFAULT_TOKENS_PER_WORD, filler

SHARED_VARIABLE = "GALERNE_SHARED"
_REPOSITORY = Path(__file__).resolve().parents[2]

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Draft:
    """One request without its final time and text."""

    # Its time in the source, seconds after the source's first; None where the source has no times.
    at_s: float | None
    prompt_tokens: int
    output_tokens: int
    # The prompt, cut to this many tokens (at most `prompt_tokens`).
    write: Callable[[int], str] = field(repr=False)
    # None: the stream's.
    tenant: str | None = None
    model: str | None = None
    # A part of the stream's tenant, shown as TENANT/CLIENT; uses the tenant's key.
    client: str | None = None
    session: str | None = None


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the public traces lie: $GALERNE_SHARED/data, by default ../shared/data beside the repository."""
    shared = environ.get(SHARED_VARIABLE)
    return (Path(shared) if shared else _REPOSITORY.parent / "shared") / "data"


@dataclass(frozen=True, slots=True)
class Setting:
    """All that a workload's requests depend on besides its own fields."""

    # Every draw of a stream hangs on it; streams have different ones.
    seed: str
    # Changes every filler and nothing else, so that a second run finds no prompt in the engine's prefix cache.
    salt: str = ""
    tokens_per_word: float = DEFAULT_TOKENS_PER_WORD
    data: Path = field(default_factory=data_folder)
    # What a user's own paths are relative to: the scenario's folder.
    base: Path = Path()
    # Names a source may give to its requests; None allows any.
    tenants: frozenset[str] | None = None
    # The source's own times are used, so every draft must have one; only this part of them is.
    needs_times: bool = False
    from_s: float = 0.0
    until_s: float = math.inf

    def rng(self, purpose: str) -> random.Random:
        """A source of randomness for one purpose: draws for another do not disturb it."""
        return random.Random(f"{self.seed}/{purpose}")

    def text(self, name: str, tokens: int) -> str:
        """Filler of about `tokens` tokens, fixed by its name, the stream's seed and the salt."""
        return self.common_text(f"{self.seed}/{name}", tokens)

    def common_text(self, name: str, tokens: int) -> str:
        """The same, but equal in all streams."""
        return filler(tokens, seed=f"{self.salt}/{name}", tokens_per_word=self.tokens_per_word)

    def file(self, name: str) -> Path:
        """A data set's file; raises LoadtestError that says where it was looked for."""
        path = self.data / name
        if not path.is_file():
            raise LoadtestError(
                f"{path}: there is no such file; set {SHARED_VARIABLE} to the folder whose data/ holds {name}"
            )
        return path


class Workload(Strict):
    """What requests ask for; `drafts` makes them, ascending where they have times."""

    # Whether its drafts may have times of their own (`arrivals: {kind: trace}`).
    timed: ClassVar[bool] = False

    # Longer prompts and outputs are cut to these, and the plan tells how many were.
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None

    @abstractmethod
    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """All requests of the source once, lazily. Raises LoadtestError, at the latest while iterating."""
