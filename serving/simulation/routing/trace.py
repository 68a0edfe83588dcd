"""Prompts by the names of their blocks: recorded traces in Mooncake's form, and generated ones of known shapes.

Mooncake's published traces name every 512-token block of a prompt by a hash of it and all before it, so two prompts
share exactly what their lists begin with. The generated shapes need no file: conversations that grow, many prompts
behind few prefixes (assistants with long instructions), and prompts that share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from random import Random
from typing import Final

from loadtest.errors import LoadtestError
from loadtest.workloads.draft import SHARED_VARIABLE, data_folder
from loadtest.workloads.mooncake import RECORDED_BLOCK_TOKENS, _parsed

_RECORDED: Final = ("mooncake_conversation", "mooncake_toolagent")
_SEED: Final = 20250227


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a trace; `session` is the conversation that it continues or begins."""

    at_s: float
    tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: int


@dataclass(frozen=True, slots=True)
class PromptTrace:
    """Requests in the order of their coming, seconds from the first."""

    name: str
    prompts: tuple[Prompt, ...]
    block_tokens: int = RECORDED_BLOCK_TOKENS

    @property
    def duration_s(self) -> float:
        """From the first to the last."""
        return self.prompts[-1].at_s


def find(name: str, rate_scale: float = 1.0, *, spread: bool = False) -> PromptTrace:
    """The named trace, played so many times as fast. Raises LoadtestError that says what is wrong or known.

    `spread`: requests that came at one time, as it was recorded, come evenly until the next.
    """
    if not (rate_scale > 0 and math.isfinite(rate_scale)):
        raise LoadtestError(f"a rate scale of {rate_scale:g}; it must be above 0")
    if name in _GENERATED:
        rows = _GENERATED[name](Random(_SEED))  # noqa: S311  # a trace, no secret
    else:
        path = data_folder() / f"{name}.jsonl" if name in _RECORDED else Path(name)
        if not path.is_file():
            known = ", ".join((*_RECORDED, *_GENERATED))
            hint = f"; set {SHARED_VARIABLE} to the folder whose data/ holds it" if name in _RECORDED else ""
            raise LoadtestError(f"{path}: there is no such file{hint}; known traces: {known}, or a Mooncake JSONL")
        name, rows = path.stem, _recorded(path)
    if not rows:
        raise LoadtestError(f"{name}: holds no request")
    rows.sort(key=lambda row: row[0])
    if spread:
        rows = _spread(rows)
    sessions = _Sessions()
    begin_s = rows[0][0]
    return PromptTrace(
        name,
        tuple(
            Prompt((at_s - begin_s) / rate_scale, tokens, output, blocks, sessions.of(blocks))
            for at_s, tokens, output, blocks in rows
        ),
    )


Row = tuple[float, int, int, tuple[int, ...]]


def _recorded(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    at_s, tokens, output, blocks = _parsed(line, path, number)
                    if not (math.isfinite(at_s) and tokens > 0):
                        raise LoadtestError(f"{path}:{number}: not a line of this trace")
                    rows.append((at_s, tokens, max(1, output), blocks[: -(-tokens // RECORDED_BLOCK_TOKENS)]))
    except (OSError, UnicodeDecodeError) as error:
        raise LoadtestError(f"{path}: cannot be read: {error}") from error
    return rows


def _spread(rows: list[Row]) -> list[Row]:
    times = sorted({row[0] for row in rows})
    ends = dict(pairwise(times))
    found: list[Row] = []
    for at_s, group in groupby(rows, key=lambda row: row[0]):
        together = list(group)
        # The last ones have no next time to come before.
        step_s = (ends.get(at_s, at_s) - at_s) / len(together)
        found += [(at_s + i * step_s, *row[1:]) for i, row in enumerate(together)]
    return found


class _Sessions:
    """Tells conversations apart, which the traces do not: a prompt belongs to whom its last known block belongs.

    A prompt that shares its first block alone begins a new one: that block is the same in all of Mooncake's requests.
    """

    def __init__(self) -> None:
        self._owner: dict[int, int] = {}
        self._sessions = 0

    def of(self, blocks: tuple[int, ...]) -> int:
        owner = self._owner
        known = 0
        for name in blocks:
            if name not in owner:
                break
            known += 1
        if known > 1:
            session = owner[blocks[known - 1]]
        else:
            session = self._sessions
            self._sessions += 1
        for name in blocks[known:]:
            owner[name] = session
        return session


def _generated_row(at_s: float, blocks: tuple[int, ...], tail_tokens: int, output: int) -> Row:
    return at_s, (len(blocks) - 1) * RECORDED_BLOCK_TOKENS + tail_tokens, output, blocks


def _conversations(rng: Random) -> list[Row]:
    """600 people, 10 turns each, 30 s between turns, prompts that grow by 1 to 4 blocks a turn."""
    rows, block = [], 0
    for _ in range(600):
        at_s = rng.uniform(0, 1500)
        history: list[int] = []
        for _ in range(10):
            grown = rng.randint(1, 4)
            history += range(block, block + grown)
            block += grown
            rows.append(_generated_row(at_s, tuple(history), RECORDED_BLOCK_TOKENS, rng.randint(50, 400)))
            at_s += rng.expovariate(1 / 30)
    return rows


def _shared_prefixes(rng: Random) -> list[Row]:
    """8,000 questions behind 50 prefixes of 8 blocks, the first of which most ask (Zipf); 25 requests a second."""
    weights = [1 / (i + 1) for i in range(50)]
    rows, at_s, block = [], 0.0, 50 * 8
    for _ in range(8000):
        at_s += rng.expovariate(25)
        prefix = rng.choices(range(50), weights)[0]
        rows.append(
            _generated_row(
                at_s, (*range(prefix * 8, prefix * 8 + 8), block), rng.randint(64, 512), rng.randint(20, 200)
            )
        )
        block += 1
    return rows


def _nothing_shared(rng: Random) -> list[Row]:
    """8,000 prompts of 1 to 16 blocks that have nothing in common; 12 requests a second."""
    rows, at_s, block = [], 0.0, 0
    for _ in range(8000):
        at_s += rng.expovariate(12)
        size = rng.randint(1, 16)
        rows.append(_generated_row(at_s, tuple(range(block, block + size)), rng.randint(1, 512), rng.randint(20, 300)))
        block += size
    return rows


_GENERATED: Final[dict[str, Callable[[Random], list[Row]]]] = {
    "conversations": _conversations,
    "shared-prefixes": _shared_prefixes,
    "nothing-shared": _nothing_shared,
}
