"""The few numbers behind the points: least squares, held at zero or above."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loadtest.profiles.model import DecodePoint, Fit, PrefillPoint


def fit(prefill: Sequence[PrefillPoint], decode: Sequence[DecodePoint]) -> Fit:
    """The numbers that fit best; one that the points cannot tell, or that would be negative, is 0.

    Raises ValueError where the time to first token does not grow with the prompt: there is no rate then.
    """
    rows = [(1.0, p.prompt_tokens / 1000, (p.prompt_tokens / 1000) ** 2) for p in prefill]
    ttfts_ms = [p.ttft_s * 1e3 for p in prefill]
    # Three numbers want more than three points, and a rate there must be: else attention is left out.
    overhead, linear, attention = least_squares(rows, ttfts_ms) if len(rows) > len(rows[0]) else (0.0, 0.0, 0.0)
    if linear <= 0:
        overhead, linear = least_squares([row[:2] for row in rows], ttfts_ms)
        attention = 0.0
    if linear <= 0:
        raise ValueError("longer prompts did not take longer; measure longer ones")
    batches = [(1.0, p.batch, p.batch * p.context_tokens / 1000) for p in decode]
    steps_ms = [p.step_s * 1e3 for p in decode]
    base, sequence, context = least_squares(batches, steps_ms)
    return Fit(
        prefill_tokens_per_s=1e6 / linear,
        prefill_overhead_ms=overhead,
        prefill_ms_per_1k_tokens_squared=attention,
        prefill_error=_error([overhead + linear * t + attention * s for _, t, s in rows], ttfts_ms),
        decode_ms=base,
        decode_ms_per_sequence=sequence,
        decode_ms_per_1k_context_tokens=context,
        decode_error=_error([base + sequence * b + context * c for _, b, c in batches], steps_ms),
    )


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Factors, none below 0, whose sums over each row come closest to the values, relative to these.

    Relative, because the slow points would else decide alone. A factor that comes out negative is held at 0 and
    the others are found again: exact for the two or three factors that are asked for here.
    """
    table = np.asarray(rows, dtype=float) / np.asarray(values, dtype=float)[:, None]
    free = list(range(table.shape[1]))
    factors = [0.0] * table.shape[1]
    while free:
        found = np.linalg.lstsq(table[:, free], np.ones(len(table)), rcond=None)[0]
        worst = int(np.argmin(found))
        if found[worst] >= 0:
            for index, value in zip(free, found, strict=True):
                factors[index] = float(value)
            break
        del free[worst]
    return factors


def _error(fitted: Sequence[float], measured: Sequence[float]) -> float:
    mean = math.fsum(measured) / len(measured)
    square = math.fsum((a - b) ** 2 for a, b in zip(fitted, measured, strict=True)) / len(measured)
    return math.sqrt(square) / mean
