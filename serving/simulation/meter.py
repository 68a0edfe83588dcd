"""What a monitoring system would know of the simulated cluster: as late, as coarse and as smoothed as the live one.

Scrapes come every 5 s; the rules over them are evaluated once more before a decision is made, so a decision sees the
scrape before the newest. Rates and shares look back 30 s and means of tokens two minutes, as `serving.metrics.rules`
does it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from serving.autoscaling.snapshot import NO_SIGNAL, Signal, Snapshot
from serving.simulation import kernel
from serving.simulation.cluster import Cluster
from serving.simulation.engine import Floats

SCRAPE_S: Final = 5.0
# Scrapes between the one that a decision sees and now.
LATE: Final = 1
RATE_WINDOW_S: Final = 30.0
MEAN_WINDOW_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Scrape:
    """One moment's metrics."""

    at_s: float
    counters: Floats
    running: float
    waiting: float
    held: float
    kv_use: float
    in_flight: float


class Meter:
    """Keeps the scrapes that windows need."""

    def __init__(self, *, starts_at_s: float = 0.0, start_guess_s: float = 45.0) -> None:
        self._scrapes: deque[Scrape] = deque(maxlen=int(MEAN_WINDOW_S / SCRAPE_S) + LATE + 2)
        self._means: tuple[float, float] | None = None
        # The policy knows a date, not a trace's second; any Monday will do.
        self._epoch_s = 345600.0 + starts_at_s
        self._start_s = start_guess_s

    def scrape(self, cluster: Cluster) -> Scrape:
        """Reads the cluster's metrics now."""
        taken = Scrape(cluster.now_s, cluster.counters(), *cluster.gauges())
        self._scrapes.append(taken)
        return taken

    def before(self, seconds: float, *, late: int = LATE) -> tuple[Scrape, Scrape]:
        """The scrape that is seen now and the one so long before it (or the first)."""
        seen = self._scrapes[max(len(self._scrapes) - 1 - late, 0)]
        steps = round(seconds / SCRAPE_S)
        first = self._scrapes[max(len(self._scrapes) - 1 - late - steps, 0)]
        return seen, first

    def snapshot(self, cluster: Cluster) -> Snapshot:
        """As the live reader of signals would hand it to the policy."""
        seen, first = self.before(RATE_WINDOW_S)
        passed_s = seen.at_s - first.at_s
        grown = seen.counters - first.counters
        age_s = cluster.now_s - seen.at_s
        starting = cluster.starting_s()
        if cluster.has_started:
            self._start_s = cluster.start_delay_s

        def share(part: int, of: int) -> Signal:
            return Signal(float(grown[part] / grown[of]), age_s) if grown[of] > 0 else NO_SIGNAL

        means = self._mean_tokens(age_s)
        return Snapshot(
            at_s=self._epoch_s + cluster.now_s,
            ready=cluster.ready,
            target=cluster.target,
            starting_s=starting,
            start_s=self._start_s,
            arrivals_rps=Signal(float(grown[kernel.ARRIVED]) / passed_s, age_s) if passed_s > 0 else NO_SIGNAL,
            prompt_tokens=means[0],
            output_tokens=means[1],
            held=Signal(seen.held, age_s),
            running=Signal(seen.running, age_s),
            waiting=Signal(seen.waiting, age_s),
            kv_use=Signal(seen.kv_use, age_s),
            ttft_missed=share(kernel.LATE, kernel.FIRSTS),
            itl_missed=share(kernel.SLOW, kernel.ENDED),
        )

    def _mean_tokens(self, age_s: float) -> tuple[Signal, Signal]:
        seen, first = self.before(MEAN_WINDOW_S)
        grown = seen.counters - first.counters
        if grown[kernel.ENDED] > 0:
            ended = float(grown[kernel.ENDED])
            self._means = float(grown[kernel.PROMPTS]) / ended, float(grown[kernel.OUTPUTS]) / ended
        if self._means is None:
            return NO_SIGNAL, NO_SIGNAL
        return Signal(self._means[0], age_s), Signal(self._means[1], age_s)
