"""Who decides about the number of simulated replicas: our policy, and others at the defaults they document.

Each is asked after every scrape, acts at its own period, and sees what a live one would. Bounds are the same for all.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, Protocol

from serving.autoscaling.policy import Memory, decide
from serving.autoscaling.settings import Settings
from serving.autoscaling.snapshot import Decision
from serving.simulation.cluster import Cluster
from serving.simulation.meter import SCRAPE_S, Meter

_EPSILON: Final = 1e-6


class Scaler(Protocol):
    """Decides on the number of replicas."""

    def target(self, cluster: Cluster, meter: Meter) -> int:
        """Replicas that there are to be from now on, within the bounds that the scaler was made with."""
        ...


class Ours:
    """The live policy itself: `serving.autoscaling.policy.decide` on snapshots."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._memory = Memory()
        self.decisions: list[tuple[float, Decision]] = []

    def target(self, cluster: Cluster, meter: Meter) -> int:
        """Its decision, which is kept when it changes something."""
        decision, self._memory = decide(meter.snapshot(cluster), self._memory, self._settings)
        if decision.target != cluster.target:
            self.decisions.append((cluster.now_s, decision))
        return decision.target


class RayDefault:
    """Ray Serve's own policy at its defaults.

    docs.ray.io, Serve, "Advanced autoscaling": the mean of ongoing requests over look_back_period_s 30 s against
    target_ongoing_requests 2 a replica; a wish must last upscale_delay_s 30 s or downscale_delay_s 600 s without a
    break. Held against Ray's own functions by tests/unit/test_simulation_scalers.py.
    """

    TARGET_ONGOING: Final = 2.0
    LOOK_BACK_S: Final = 30.0
    UP_DELAY_S: Final = 30.0
    DOWN_DELAY_S: Final = 600.0

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._direction = 0
        self._since_s: float | None = None
        self._ongoing: deque[float] = deque(maxlen=round(self.LOOK_BACK_S / SCRAPE_S))

    def target(self, cluster: Cluster, meter: Meter) -> int:
        """After the delay, what the ongoing requests need."""
        # Ray counts what its handles and replicas push, not what Prometheus scrapes: nothing is late.
        seen, _ = meter.before(0.0, late=0)
        self._ongoing.append(seen.in_flight + seen.held)
        ongoing = sum(self._ongoing) / len(self._ongoing)
        wanted = desired_by_ray(ongoing, cluster.target, self.TARGET_ONGOING, self._least, self._most)
        return self.delayed(wanted, cluster.target, cluster.now_s)

    def delayed(self, wanted: int, current: int, now_s: float) -> int:
        """The wish once it lasted long enough, until then the present number."""
        direction = (wanted > current) - (wanted < current)
        if direction == 0:
            self._direction, self._since_s = 0, None
            return current
        if direction != self._direction or self._since_s is None:
            self._direction, self._since_s = direction, now_s
        delay_s = self.UP_DELAY_S if direction > 0 else self.DOWN_DELAY_S
        if now_s - self._since_s + _EPSILON < delay_s:
            return current
        self._direction, self._since_s = 0, None
        return wanted


def desired_by_ray(ongoing: float, current: int, target_ongoing: float, least: int, most: int) -> int:
    """Ray's formula with its factors at 1: ongoing requests over the target of each, rounded up, within bounds."""
    if current == 0:
        return max(1, least) if ongoing > 0 else least
    return min(max(math.ceil(ongoing / target_ongoing), least), most)


class Hpa:
    """Kubernetes' horizontal autoscaler on waiting requests, at its defaults.

    kubernetes.io, "Horizontal Pod Autoscaling": every 15 s, ceil(sum / average value), none within a tolerance of
    10 %; up by at most 100 % or four pods in 15 s; down to the highest recommendation of the last 300 s. Metric and
    value: vllm:num_requests_waiting with 5 a replica (vLLM production-stack, "Autoscaling with KEDA").
    """

    SYNC_S: Final = 15.0
    TOLERANCE: Final = 0.1
    STABLE_S: Final = 300.0
    AVERAGE: Final = 5.0
    MOST_PODS: Final = 4

    def __init__(self, least: int, most: int, *, poll_s: float = SYNC_S) -> None:
        self._least, self._most = least, most
        self._poll_s = poll_s
        self._polled: tuple[float, float] | None = None
        self._synced_s = -math.inf
        self._recommended: deque[tuple[float, int]] = deque()

    def target(self, cluster: Cluster, meter: Meter) -> int:
        """The number after this sync."""
        now = cluster.now_s
        if self._polled is None or now - self._polled[0] + _EPSILON >= self._poll_s:
            seen, _ = meter.before(0.0)
            self._polled = (now, seen.waiting)
        if now - self._synced_s + _EPSILON < self.SYNC_S:
            return cluster.target
        self._synced_s = now
        current = cluster.target
        ratio = self._polled[1] / (self.AVERAGE * max(current, 1))
        wanted = current if abs(ratio - 1) <= self.TOLERANCE else math.ceil(self._polled[1] / self.AVERAGE)
        wanted = min(max(wanted, self._least), self._most)
        self._recommended.append((now, wanted))
        while self._recommended[0][0] < now - self.STABLE_S:
            self._recommended.popleft()
        if wanted > current:
            return min(wanted, max(2 * current, current + self.MOST_PODS))
        return min(current, max(wish for _, wish in self._recommended))


class Keda(Hpa):
    """KEDA at its defaults in front of the same autoscaler.

    keda.sh, "ScaledObject specification": pollingInterval 30 s; cooldownPeriod 300 s concerns the way to zero only, so
    from one replica on the horizontal autoscaler behind it decides, on the value polled last.
    """

    POLL_S: Final = 30.0

    def __init__(self, least: int, most: int) -> None:
        super().__init__(least, most, poll_s=self.POLL_S)
