"""Measures an engine: prompts alone on it, then batches of answers under way together."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.client import RequestResult, StreamClient
from loadtest.errors import LoadtestError
from loadtest.profiles.model import DecodePoint, PrefillPoint
from loadtest.request import Target, chat_message
from loadtest.workloads.text import filler

_NS = 1e9
# Gaps that a step's time is the median of, at least.
_LEAST_GAPS = 3


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """What is measured."""

    prompt_tokens: tuple[int, ...] = (64, 128, 256, 512, 1024, 1536)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 512)
    # Of each prompt; the median counts.
    repeats: int = 3
    output_tokens: int = 24
    timeout_s: float = 600.0


async def measure(
    target: Target, model: str, settings: ProfileSettings, *, salt: str, progress: Callable[[str], None]
) -> tuple[list[PrefillPoint], list[DecodePoint]]:
    """All points. No prompt begins like another, so nothing comes from a prefix cache. Raises LoadtestError."""
    numbers = itertools.count()

    def message(prompt_tokens: int, output_tokens: int) -> bytes:
        prompt = filler(prompt_tokens, seed=f"{salt}/{next(numbers)}")
        return chat_message(target, model=model, prompt=prompt, output_tokens=output_tokens)

    progress("a first request, which is not counted")
    await _together(target, [message(settings.prompt_tokens[0], 2)], settings)
    prefill = []
    for tokens in settings.prompt_tokens:
        progress(f"prefill of about {tokens} tokens")
        alone = [(await _together(target, [message(tokens, 1)], settings))[0] for _ in range(settings.repeats)]
        ttft_s = statistics.median(result.ttft_s or 0.0 for result in alone)
        prefill.append(PrefillPoint(prompt_tokens=alone[0].prompt_tokens or tokens, ttft_s=ttft_s))
    decode = []
    for context, batch in itertools.product(settings.contexts, settings.batches):
        progress(f"decode, {batch} at once with about {context} tokens of context")
        results = await _together(target, [message(context, settings.output_tokens) for _ in range(batch)], settings)
        own = results[0].prompt_tokens or context
        decode.append(
            DecodePoint(batch=batch, context_tokens=own + settings.output_tokens // 2, step_s=_step_s(results))
        )
    return prefill, decode


async def _together(target: Target, messages: Sequence[bytes], settings: ProfileSettings) -> list[RequestResult]:
    clients = [StreamClient(target.host, target.port) for _ in messages]
    try:
        results = await asyncio.gather(
            *(
                client.request(message, timeout_s=settings.timeout_s)
                for client, message in zip(clients, messages, strict=True)
            )
        )
    finally:
        await asyncio.gather(*(client.close() for client in clients))
    for result in results:
        if result.failure is not None:
            raise LoadtestError(f"a request failed: {result.failure.detail}")
        if result.ttft_s is None:
            raise LoadtestError("an answer without content; the engine must honour ignore_eos and max_tokens")
    return results


def _step_s(results: Sequence[RequestResult]) -> float:
    """The median gap between tokens while all were under way: no prefill, no shrinking batch."""
    begin = max(result.content_ns[0] for result in results)
    end = min(result.content_ns[-1] for result in results)
    gaps = [
        (later - earlier) / _NS
        for result in results
        for earlier, later in itertools.pairwise(result.content_ns)
        if begin <= earlier and later <= end
    ]
    if len(gaps) < _LEAST_GAPS:
        raise LoadtestError(f"{len(results)} answers were hardly under way together; ask for more --output-tokens")
    # Two tokens in one packet are a gap of nothing and one of two steps: the mean of the two is right, the median too.
    return statistics.median(gaps)
