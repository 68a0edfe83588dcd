"""Kimi's conversation trace as Mooncake published it (FAST '25, Apache-2.0): times, lengths and shared prefixes.

The trace names every 512-token block of a prompt by a hash of it and all before it. Each hash becomes one fixed
block of filler here, so two prompts begin with the same text exactly as far as their recorded prefixes agreed:
what a prefix cache could have found in production, it can find in the replay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from loadtest.errors import LoadtestError
from loadtest.workloads.draft import Count, Draft, Setting, Workload

RECORDED_BLOCK_TOKENS = 512
# Blocks are asked for again soon or never; about 3 kB each.
_BLOCKS_HELD = 4096


class MooncakeWorkload(Workload):
    """One draft a line; `file` may name another trace of the same form in the data folder.

    `block_tokens` writes every block, and so every prompt, smaller than recorded (12,000 tokens on average):
    prefixes stay shared in the same proportion where a cap would cut off all that differs.
    """

    timed: ClassVar[bool] = True

    kind: Literal["mooncake"]
    file: str = "mooncake_conversation.jsonl"
    block_tokens: Count = RECORDED_BLOCK_TOKENS

    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """The trace from its first line on. Raises LoadtestError with file and line for a line that is none."""

        @lru_cache(maxsize=_BLOCKS_HELD)
        def block(name: int) -> str:
            return setting.common_text(f"mooncake/{name}", self.block_tokens)

        def write(hashes: Sequence[int], tokens: int) -> str:
            whole, rest = divmod(tokens, self.block_tokens)
            parts = [block(name) for name in hashes[:whole]]
            if rest:
                # The beginning of its block: of the same hash, a longer part begins with a shorter one.
                parts.append(setting.common_text(f"mooncake/{hashes[whole]}", rest))
            return " ".join(parts)

        path = setting.file(self.file)
        latest_s = 0.0
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                at_s, recorded_tokens, output_tokens, hashes = _parsed(line, path, number)
                if at_s < latest_s:
                    raise LoadtestError(f"{path}:{number}: earlier than the line before it; sort the file")
                latest_s = at_s
                tokens = max(1, round(recorded_tokens * self.block_tokens / RECORDED_BLOCK_TOKENS))
                yield Draft(
                    at_s=at_s,
                    prompt_tokens=tokens,
                    output_tokens=max(1, output_tokens),
                    write=partial(write, hashes),
                )


def _parsed(line: str, path: Path, number: int) -> tuple[float, int, int, tuple[int, ...]]:
    try:
        value: dict[str, Any] = json.loads(line)
        at_s = float(value["timestamp"]) / 1000
        input_tokens, output_tokens = int(value["input_length"]), int(value["output_length"])
        hashes = tuple(int(name) for name in value["hash_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoadtestError(f"{path}:{number}: not a line of this trace: {error!r}") from error
    needed = max(1, -(-input_tokens // RECORDED_BLOCK_TOKENS))
    if len(hashes) < needed:
        raise LoadtestError(f"{path}:{number}: {len(hashes)} hash_ids for {input_tokens} tokens; {needed} needed")
    return at_s, input_tokens, output_tokens, hashes
