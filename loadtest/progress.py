"""A run while it is under way, on a terminal: a bar and the counts; in a log, a line now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from loadtest.records import Outcome
from loadtest.sender import Tally

LOG_EVERY_S = 10.0
# Output tokens a second are shown over about this long.
_RATE_S = 3.0


@contextmanager
def shown(console: Console, name: str, length_s: float) -> Iterator[Callable[[Tally, float], None]]:
    """Give the function that a run tells its progress to; `length_s` is how long requests are sent."""
    rate = _Rate()
    if not console.is_terminal:
        last_s = -LOG_EVERY_S

        def log(tally: Tally, now_s: float) -> None:
            nonlocal last_s
            rate.add(now_s, tally.tokens)
            if now_s - last_s >= LOG_EVERY_S:
                last_s = now_s
                console.print(
                    f"{name}: {max(0.0, now_s):.0f} of {length_s:.0f} s, {_line(tally, rate)}",
                    markup=False,
                    soft_wrap=True,
                )

        yield log
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=length_s, line="starting the workers")

        def draw(tally: Tally, now_s: float) -> None:
            rate.add(now_s, tally.tokens)
            bar.update(task, completed=min(max(0.0, now_s), length_s), line=_line(tally, rate))

        yield draw


class _Rate:
    """Tokens a second over the last seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def add(self, now_s: float, tokens: int) -> None:
        self._seen.append((now_s, tokens))
        while len(self._seen) > 2 and self._seen[1][0] < now_s - _RATE_S:  # noqa: PLR2004  # a rate is of two points
            del self._seen[0]

    def value(self) -> float:
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def _line(tally: Tally, rate: _Rate) -> str:
    ttft_s = tally.ttft_p50_s()
    counts = tally.outcomes
    bad = [f"{counts[name]} {name}" for name in (Outcome.REJECTED, Outcome.FAILED, Outcome.UNSENT) if counts[name]]
    return ", ".join(
        [
            f"{tally.sent} sent",
            f"{tally.in_flight} in flight",
            f"{counts[Outcome.COMPLETED]} completed",
            *bad,
            f"{rate.value():.0f} tok/s",
            "no first token yet" if ttft_s is None else f"TTFT p50 {ttft_s * 1e3:.0f} ms",
        ]
    )
