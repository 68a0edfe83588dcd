"""How many replicas there are to be: a pure function of a snapshot and of what it remembers itself.

It counts work, not requests in flight: the rates of prompt and output tokens against what one replica can take within
the model's targets. That leads where queues lag: a queue grows only once it is too late. On top come what demand may
become while a replica starts, what waits already, a floor by the clock, and headroom for what varies, times a caution
that grows while more users miss their targets than may and shrinks while fewer do, so that it is what this workload
needs and no more (the idea of adaptive conformal inference, Gibbs and Candès 2021: a threshold that moves with its own
errors keeps its error rate whatever the data do).

What it promises, whatever it is given: a target within the configured bounds; values that are missing, stale or not
numbers change nothing; no step beyond the rate limits; a reason for every decision. The same function runs live and in
the simulator and cannot tell which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final

from serving.autoscaling.capacity import Capacity
from serving.autoscaling.demand import WATCHED_S, Mix, Queued, Work, under_strain, work
from serving.autoscaling.forecast import UNKNOWN, Moves, Profile, Sample, by_time_of_day, kept, learned
from serving.autoscaling.learning import Learned, work_per_s
from serving.autoscaling.schedule import floor_at
from serving.autoscaling.settings import Settings
from serving.autoscaling.snapshot import Decision, Signal, Snapshot

REASONS: Final = (
    "steady",  # nothing to change
    "stale",  # signals are not believed: held
    "wake",  # something is held and nothing runs
    "idle",  # nobody asked for idle_s
    "demand",  # the work that comes
    "forecast",  # the work that came at this time of earlier days
    "queue",  # the work that waits
    "slo",  # targets are missed
    "cooldown",  # less would do, but not for long enough yet
    "rate",  # as far as a step may go
    "schedule",  # the floor of this time of day
    "external",  # something else decides
    "minimum",
    "maximum",
)

# No count or rate is beyond it; keeps every product finite.
MOST: Final = 1e9
# Of a step up within STEP_S: twice or so many more, as Kubernetes' own autoscaler. Of a step down: a tenth or one.
STEP_S: Final = 15.0
UP_FACTOR: Final = 2.0
UP_LEAST: Final = 4
DOWN_FACTOR: Final = 0.9
# Less must do for as long before replicas go: a start, since that is what it costs to have one back, and an answer,
# since for so long one that goes is still paid for (the break-even of renting against buying); within these.
DOWN_LEAST_S: Final = 30.0
DOWN_MOST_S: Final = 600.0
# At first only answers that were short have ended, so that nothing goes before so many answers' time was seen.
FIRST_ANSWERS: Final = 10.0
# Demand must be this much of a replica below a lower count, so that noise around a whole number moves nothing.
HYSTERESIS: Final = 0.1
# Waiting requests are to be worked off within an answer's time, at least this; so many a replica are an engine's
# normal breathing.
DRAIN_S: Final = 10.0
BREATHING: Final = 1.0
# How much of demand's past is kept.
HISTORY_S: Final = 600.0
SAMPLES: Final = 360
# A rate is the mean of its window and a scrape or two old: it tells of so long ago.
SIGNAL_LAG_S: Final = 20.0
# Headroom is caution x sqrt(NOISE^2 x demand + what demand came out above what was said, squared): what varies by
# itself grows as the root of what there is.
NOISE: Final = 0.3
# Caution moves with its own errors: it aims a little below the share that may miss. Misses beyond MISSED_CLIP at once
# count as so many: an outage is no reason for a fleet. CAUTION_GAIN is its move at a share of 1 within CAUTION_PER_S.
MISSED_AIM: Final = 0.7
MISSED_CLIP: Final = 0.2
CAUTION_GAIN: Final = 0.6
CAUTION_PER_S: Final = 30.0
CAUTION_START: Final = 1.5
CAUTION_LEAST: Final = -0.5
CAUTION_MOST: Final = 8.0
# Promised is a share of requests, not of time: a moment counts by its rate over the usual, up to so many times. The
# usual is learned over a day.
WEIGHT_MOST: Final = 3.0
USUAL_S: Final = 86400.0
# Without a known capacity: the use of KV blocks that is full, that to which fewer replicas may bring it, and a step up.
KV_FULL: Final = 0.9
KV_ROOM: Final = 0.6
UNKNOWN_STEP: Final = 0.25


@dataclass(frozen=True, slots=True)
class Memory:
    """What the policy keeps between two decisions: bounded and picklable; worth little after a gap."""

    # The last snapshot that was believed, and the last at which somebody asked for something.
    believed_at_s: float | None = None
    asked_at_s: float | None = None
    mix: Mix = field(default_factory=Mix)
    queued: tuple[Queued, ...] = ()
    # Demand, and what was wanted, in replicas; targets that were given.
    demand: tuple[Sample, ...] = ()
    wanted: tuple[Sample, ...] = ()
    targets: tuple[Sample, ...] = ()
    # Demand by time of day.
    profile: Profile = UNKNOWN
    moves: Moves = field(default_factory=Moves)
    # The error term: how many times what varies is kept as headroom.
    caution: float = CAUTION_START
    usual_rps: float = 0.0
    learned: Learned = field(default_factory=Learned)


def decide(snapshot: Snapshot, memory: Memory, settings: Settings) -> tuple[Decision, Memory]:
    """The target for now and what to remember."""
    return _Case(snapshot, memory, settings).decide()


@dataclass(frozen=True, slots=True)
class _Terms:
    """What was reckoned, in replicas."""

    demand: float
    ahead: float = 0.0
    forecast: float = 0.0
    headroom: float = 0.0
    queue: float = 0.0
    # How long a request is on a replica.
    answer_s: float = 0.0

    @property
    def expected(self) -> float:
        return max(self.demand + self.ahead, self.forecast)

    @property
    def wanted(self) -> float:
        return max(self.expected + self.headroom, 0.0) + self.queue

    def listed(self) -> tuple[tuple[str, float], ...]:
        return (
            ("demand", self.demand),
            ("growth", self.ahead),
            ("forecast", self.forecast),
            ("queue", self.queue),
            ("feedback", self.headroom),
            ("wanted", self.wanted),
        )


@dataclass(slots=True)
class _Case:
    snapshot: Snapshot
    memory: Memory
    settings: Settings

    def decide(self) -> tuple[Decision, Memory]:
        snapshot, settings = self.snapshot, self.settings
        held = self._value(snapshot.held)
        if held and snapshot.target == 0 and settings.maximum > 0:
            said = f"{held:g} requests are held and nothing runs"
            return self._said(max(1, self._least()), "wake", said), replace(self.memory, asked_at_s=snapshot.at_s)
        if missing := self._missing():
            bounded = min(max(snapshot.target, settings.minimum), settings.maximum)
            return self._said(bounded, "stale", f"no fresh {', '.join(missing)}: held"), self.memory
        self._remember()
        if settings.external_stale_s is not None:
            return self._followed(), self.memory
        terms = self._terms()
        now = snapshot.at_s
        window_s = min(max(DOWN_LEAST_S, snapshot.start_s + terms.answer_s), DOWN_MOST_S)
        wanted = kept(self.memory.wanted, (now, terms.wanted), window_s=window_s, most=SAMPLES)
        self.memory = replace(self.memory, wanted=wanted)
        target, reason = self._stepped(terms, window_s)
        target, reason = self._bounded(target, reason, terms.wanted)
        given = kept(self.memory.targets, (now, float(target)), window_s=STEP_S, most=SAMPLES)
        said = (
            f"{self._value(snapshot.arrivals_rps):.3g} requests/s are {terms.demand:.2f} replicas, growth while one "
            f"starts adds {terms.ahead:.2f}, forecast {terms.forecast:.2f}, headroom {terms.headroom:.2f} (caution "
            f"{self.memory.caution:.2f}), waiting adds {terms.queue:.2f}: {terms.wanted:.2f} wanted"
        )
        return self._said(target, reason, said, terms.listed()), replace(self.memory, targets=given)

    def _missing(self) -> list[str]:
        """Names of signals without which there is no decision."""
        snapshot, settings = self.snapshot, self.settings
        if settings.external_stale_s is not None:
            missing = [] if snapshot.external.usable(settings.external_stale_s) else ["external"]
            # The last replica goes when nobody asks, which is Galerne's to know.
            known = settings.minimum or self._value(snapshot.arrivals_rps) is not None
            return missing if known else [*missing, "arrivals_rps"]
        needed = ("arrivals_rps", "running", "waiting") if snapshot.ready else ("arrivals_rps",)
        return [name for name in needed if self._value(getattr(snapshot, name)) is None]

    def _followed(self) -> Decision:
        """What something else wants, within the bounds; the last replica goes as it does otherwise."""
        value = min(max(self.snapshot.external.value or 0.0, 0.0), MOST)
        target, reason = self._bounded(math.ceil(value - 1e-9), "external", value)
        return self._said(target, reason, f"the external query says {value:g}", (("wanted", value),))

    def _value(self, signal: Signal) -> float | None:
        return min(max(signal.value or 0.0, 0.0), MOST) if signal.usable(self.settings.stale_after_s) else None

    def _said(self, target: int, reason: str, said: str, terms: tuple[tuple[str, float], ...] = ()) -> Decision:
        return Decision(target, reason, f"{said}; target {self.snapshot.target} to {target}", terms)

    def _remember(self) -> None:
        memory, snapshot = self.memory, self.snapshot
        now = snapshot.at_s
        if memory.believed_at_s is None or not 0 <= now - memory.believed_at_s <= 2 * self.settings.stale_after_s:
            # Across a gap nothing is a trend, and nothing was low "all the time".
            memory = replace(memory, demand=(), wanted=(), targets=(), queued=(), moves=replace(memory.moves, said=()))
            memory = replace(memory, asked_at_s=now, mix=replace(memory.mix, arrivals_rps=None))
        signs = (snapshot.arrivals_rps, snapshot.running, snapshot.waiting, snapshot.held)
        asked = any((self._value(sign) or 0.0) > 0 for sign in signs)
        prompt, output = self._value(snapshot.prompt_tokens), self._value(snapshot.output_tokens)
        mix = replace(
            memory.mix,
            prompt_tokens=memory.mix.prompt_tokens if prompt is None else prompt,
            output_tokens=memory.mix.output_tokens if output is None else output,
        )
        self.memory = replace(memory, believed_at_s=now, asked_at_s=now if asked else memory.asked_at_s, mix=mix)

    def _terms(self) -> _Terms:
        snapshot, settings, memory = self.snapshot, self.settings, self.memory
        now = snapshot.at_s
        arrivals = self._value(snapshot.arrivals_rps) or 0.0
        queue = (self._value(snapshot.waiting) or 0.0) + (self._value(snapshot.held) or 0.0)
        mix = memory.mix
        if mix.prompt_tokens is None or mix.output_tokens is None:
            # Nothing has ended yet: all that is known is that something came.
            return _Terms(float(arrivals > 0 or queue > 0), queue=self._pressed(queue))
        if settings.capacity is None:
            learned_work = work_per_s(arrivals, max(mix.prompt_tokens, 1.0), mix.output_tokens)
            return _Terms(self._unmeasured(learned_work, queue))
        passed_s = now - memory.wanted[-1][0] if memory.wanted else 0.0
        ahead_s = snapshot.start_s + SIGNAL_LAG_S
        found, mix = self._work(settings.capacity, mix, arrivals, ahead_s, passed_s)
        queued = tuple(one for one in memory.queued if now - WATCHED_S <= one[0] < now)[-(SAMPLES - 1) :]
        queued = (*queued, (now, queue, snapshot.ready))
        found = under_strain(found, queued, arrivals_rps=arrivals, breathing=BREATHING)
        profile = learned(memory.profile, memory.demand, now)
        history = kept(memory.demand, (now, found.demand), window_s=HISTORY_S, most=SAMPLES)
        moves, expected = memory.moves.seen(history, ahead_s)
        seen_s = max(now - memory.moves.since_s, passed_s) if memory.moves.since_s is not None else passed_s
        fades = min(passed_s / min(seen_s, USUAL_S), 1.0) if seen_s > 0 else 1.0
        usual = memory.usual_rps + fades * (arrivals - memory.usual_rps)
        caution = self._caution(passed_s, min(arrivals / usual, WEIGHT_MOST) if usual > 0 else 1.0)
        self.memory = replace(self.memory, profile=profile, demand=history, moves=moves, caution=caution, mix=mix)
        self.memory = replace(self.memory, queued=queued, usual_rps=usual)
        return _Terms(
            found.demand,
            expected - found.demand,
            by_time_of_day(profile, now, ahead_s, found.demand) if settings.forecast else 0.0,
            _headroom(caution, found.demand, moves.missed(found.demand)),
            self._drain(arrivals, queue, found),
            found.answer_s,
        )

    def _work(self, capacity: Capacity, mix: Mix, arrivals: float, ahead_s: float, passed_s: float) -> tuple[Work, Mix]:
        snapshot = self.snapshot
        kv, running = self._value(snapshot.kv_use), self._value(snapshot.running) or 0.0
        in_use = None if kv is None or not math.isfinite(capacity.kv_tokens) else min(kv, 1.0) * snapshot.ready
        in_cache = None if in_use is None else in_use * capacity.kv_tokens
        mix = mix.seen(running=running, in_cache=in_cache, passed_s=passed_s)
        return work(capacity, mix, arrivals_rps=arrivals, kv_in_use=in_use, ahead_s=ahead_s, passed_s=passed_s)

    def _pressed(self, queue: float) -> float:
        """More by a quarter while requests wait and what was asked for has come."""
        ready = self.snapshot.ready
        if queue <= BREATHING * max(ready, 1) or self.snapshot.starting_s or ready < self.snapshot.target:
            return 0.0
        return max(1.0, UNKNOWN_STEP * ready)

    def _unmeasured(self, work: float, queue: float) -> float:
        """Demand in replicas where nobody measured one: by what they did so far, and by the signs of strain."""
        snapshot, ready = self.snapshot, self.snapshot.ready
        if not work and not queue and not self._value(snapshot.running):
            return 0.0
        if not ready:
            return float(snapshot.target)
        kv = self._value(snapshot.kv_use)
        calm = queue <= BREATHING * ready and (kv or 0.0) <= KV_FULL
        content = calm and self._missed() <= 2 * self.settings.may_miss
        passed_s = snapshot.at_s - self.memory.wanted[-1][0] if self.memory.wanted else 0.0
        self.memory = replace(
            self.memory, learned=self.memory.learned.seen(work / ready, content=content, passed_s=max(passed_s, 0.0))
        )
        if not content:
            warming = bool(snapshot.starting_s) or ready < snapshot.target
            return float(snapshot.target) if warming else ready + max(1.0, UNKNOWN_STEP * ready)
        possible = self.memory.learned.possible
        if kv is not None:
            # An empty cache says that a replica could do more than it ever had to.
            possible *= min(max(KV_ROOM / max(kv, KV_ROOM / 2), 1.0), 2.0)
        return work / possible if possible > 0 else float(ready)

    def _drain(self, arrivals: float, queue: float, found: Work) -> float:
        """Replicas that work off what will still wait once they have started."""
        snapshot, rate = self.snapshot, found.rate_rps
        spare = max(rate * snapshot.ready - arrivals, 0.0)
        left = queue - BREATHING * snapshot.ready - spare * snapshot.start_s
        for since_s in snapshot.starting_s:
            left -= rate * max(since_s, 0.0)
        return max(left, 0.0) / (rate * max(DRAIN_S, found.answer_s))

    def _missed(self) -> float:
        """Share of requests beyond a target; 0 where nobody tells."""
        ttft, itl = self._value(self.snapshot.ttft_missed), self._value(self.snapshot.itl_missed)
        return max(ttft or 0.0, itl or 0.0)

    def _caution(self, passed_s: float, weight: float) -> float:
        caution = self.memory.caution
        signals = (self.snapshot.ttft_missed, self.snapshot.itl_missed)
        if not self.memory.wanted or all(self._value(signal) is None for signal in signals):
            return caution
        over = min(self._missed(), MISSED_CLIP) - MISSED_AIM * self.settings.may_miss
        moved = caution + CAUTION_GAIN * weight * over * min(max(passed_s, 0.0), CAUTION_PER_S) / CAUTION_PER_S
        return min(max(moved, CAUTION_LEAST), CAUTION_MOST)

    def _stepped(self, terms: _Terms, window_s: float) -> tuple[int, str]:
        """The target within the rate limits, before the bounds."""
        current, now = self.snapshot.target, self.snapshot.at_s
        recent = [value for at, value in self.memory.targets if now - at <= STEP_S]
        up = math.ceil(terms.wanted - 1e-9)
        if up > current:
            base = min([*recent, float(current)])
            limit = max(int(base * UP_FACTOR), int(base) + UP_LEAST, current)
            return (up, self._cause(terms)) if up <= limit else (limit, "rate")
        wanted = self.memory.wanted
        enough = max(math.ceil(max(value for _, value in wanted) + HYSTERESIS - 1e-9), 0)
        if up == current or enough >= current:
            return current, "steady" if up == current else "cooldown"
        # While users miss their targets nothing goes, whatever the reckoning says.
        if wanted[0][0] > now - window_s + STEP_S or self._missed() > self.settings.may_miss or self._is_new(terms):
            return current, "cooldown"
        base = max([*recent, float(current)])
        limit = max(int(min(base * DOWN_FACTOR, base - 1)), 0)
        if limit >= current:
            return current, "rate"
        return max(enough, limit), "demand" if enough >= limit else "rate"

    def _is_new(self, terms: _Terms) -> bool:
        since_s = self.memory.moves.since_s
        first_s = min(FIRST_ANSWERS * terms.answer_s, DOWN_MOST_S)
        return since_s is not None and self.snapshot.at_s - since_s < first_s

    def _cause(self, terms: _Terms) -> str:
        """Which of the terms made the difference to the present target."""
        current = self.snapshot.target
        grown = terms.demand + terms.ahead
        if math.ceil(grown - 1e-9) > current:
            return "demand"
        if math.ceil(terms.expected - 1e-9) > current:
            return "forecast"
        return "slo" if math.ceil(terms.wanted - terms.queue - 1e-9) > current else "queue"

    def _least(self) -> int:
        """The floor of now, within the maximum."""
        scheduled = floor_at(self.settings.schedule, self.snapshot.at_s, self.settings.zone)
        return min(max(self.settings.minimum, scheduled), self.settings.maximum)

    def _bounded(self, target: int, reason: str, wanted: float) -> tuple[int, str]:
        current, settings = self.snapshot.target, self.settings
        least = self._least()
        if least == 0:
            asked_at_s = self.memory.asked_at_s
            quiet_s = self.snapshot.at_s - asked_at_s if asked_at_s is not None else 0.0
            if quiet_s >= settings.idle_s and wanted < HYSTERESIS:
                return 0, "idle" if current else "steady"
            least = min(1, current)
        if target < least:
            return least, "steady" if current == least else ("schedule" if least > settings.minimum else "minimum")
        if target > settings.maximum:
            return settings.maximum, "maximum"
        return target, reason


def _headroom(caution: float, demand: float, missed: float) -> float:
    """Replicas beyond what is expected; below 0 where less than a replica's reckoned capacity is used up by noise."""
    varies = NOISE * math.sqrt(demand)
    return caution * (math.hypot(varies, missed) if caution > 0 else varies)
