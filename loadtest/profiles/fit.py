"""The few numbers behind the points: least squares, held at zero or above."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadtest.profiles.model import DecodePoint, Fit, PrefillPoint

# Below it a pivot is rounding: the points do not tell this number apart from the others.
_SINGULAR = 1e-12


def fit(prefill: Sequence[PrefillPoint], decode: Sequence[DecodePoint]) -> Fit:
    """The numbers that fit best; one that the points cannot tell, or that would be negative, is 0.

    Raises ValueError where the time to first token does not grow with the prompt: there is no rate then.
    """
    overhead_s, per_token_s = least_squares([(1.0, p.prompt_tokens) for p in prefill], [p.ttft_s for p in prefill])
    if per_token_s <= 0:
        raise ValueError("longer prompts did not take longer; measure longer ones")
    rows = [(1.0, p.batch, p.batch * p.context_tokens / 1000) for p in decode]
    steps_ms = [p.step_s * 1e3 for p in decode]
    base, sequence, context = least_squares(rows, steps_ms)
    return Fit(
        prefill_tokens_per_s=1 / per_token_s,
        prefill_overhead_s=overhead_s,
        prefill_error=_error(
            [overhead_s + p.prompt_tokens * per_token_s for p in prefill], [p.ttft_s for p in prefill]
        ),
        decode_ms=base,
        decode_ms_per_sequence=sequence,
        decode_ms_per_1k_context_tokens=context,
        decode_error=_error([base + sequence * b + context * c for _, b, c in rows], steps_ms),
    )


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Factors, none below 0, whose sums over each row come closest to the values, relative to these.

    Relative, because the slow points would else decide alone. A factor that comes out negative is held at 0 and
    the others are found again: exact for the two or three factors that are asked for here.
    """
    free = list(range(len(rows[0])))
    while free:
        found = _solved([[row[i] / value for i in free] for row, value in zip(rows, values, strict=True)])
        worst = min(range(len(free)), key=lambda index: found[index])
        if found[worst] >= 0:
            break
        del free[worst]
    held = dict(zip(free, found, strict=True)) if free else {}
    return [held.get(index, 0.0) for index in range(len(rows[0]))]


def _solved(rows: Sequence[Sequence[float]]) -> list[float]:
    """The factors whose sums over each row are closest to 1: normal equations, Gauss with pivots."""
    size = len(rows[0])
    table = [[math.fsum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
    for i in range(size):
        table[i].append(math.fsum(row[i] for row in rows))
    scale = max(abs(value) for line in table for value in line)
    left = list(range(size))
    for i in range(size):
        pivot = max(left, key=lambda line: abs(table[line][i]))
        if abs(table[pivot][i]) <= _SINGULAR * scale:
            continue
        left.remove(pivot)
        table[pivot] = [value / table[pivot][i] for value in table[pivot]]
        for line in range(size):
            if line != pivot:
                factor = table[line][i]
                table[line] = [a - factor * b for a, b in zip(table[line], table[pivot], strict=True)]
    solved = [0.0] * size
    for line in range(size):
        if line not in left:
            solved[next(i for i in range(size) if abs(table[line][i] - 1) < _SINGULAR * 1e3)] = table[line][-1]
    return solved


def _error(fitted: Sequence[float], measured: Sequence[float]) -> float:
    mean = math.fsum(measured) / len(measured)
    square = math.fsum((a - b) ** 2 for a, b in zip(fitted, measured, strict=True)) / len(measured)
    return math.sqrt(square) / mean
