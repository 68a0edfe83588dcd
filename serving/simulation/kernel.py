"""The simulated cluster's event loop, compiled: replicas that batch continuously, a gateway that picks one of two.

A replica is simulated pass by pass only where prompts are computed, as vLLM does it: a pass gives every running answer
one token and computes up to a budget of prompt tokens, first come first served, long prompts in chunks. Between such
passes nothing but decoding happens, every answer advances by one token a step, and the time of n steps has a closed
form: the next event is the earliest end of an answer, however many steps away. So a request costs three events whatever
its length: it comes, its prompt is computed, its answer ends.

Left out: preemption. A request is admitted when the KV cache has room for its whole prompt and answer, as if lengths
were known; that admits later than vLLM, which admits by the prompt and evicts the youngest when it runs out.

State is arrays only, so that it can be handed back and forth between decisions. Times are seconds from the trace's
start. Every function here is compiled by numba; this module is imported by the simulator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np

# Columns of the replicas' table of numbers.
CLOCK, MARK, CONTEXT, RESERVED, ASKED, READY_AT, PARTIAL_LEFT, PARTIAL_DONE = range(8)
NUMBERS: Final = 8
# Columns of the replicas' table of counts. STEPS: of the decode stretch under way. NEW: prompts that this pass ends.
STATUS, BATCH, PHASE, HEAD, TAIL, QUEUED, IN_FLIGHT, PARTIAL, STEPS, NEW, PLACE = range(11)
COUNTS: Final = 11
FREE, STARTING, READY, DRAINING = 0, 1, 2, 3
IDLE, DECODING, PASSING = 0, 1, 2
# What is counted, as the metrics of a gateway and its engines count it.
ARRIVED, ENDED, PROMPTS, OUTPUTS, FIRSTS, LATE, SLOW, REJECTED, BILLED, HELD_NOW = range(10)
COUNTERS: Final = 10
# Of the world: next arrival, replicas that are ready, first and last request held, the random state, events waiting.
NEXT, READY_N, HELD_HEAD, HELD_TAIL, RANDOM, EVENTS = range(6)
WORLD: Final = 6
# The engine's speeds.
RATE, OVERHEAD, ATTENTION, STEP, PER_SEQUENCE, PER_CONTEXT, SLOTS, KV, CHUNK, TTFT_SLO, ITL_SLO, TTFT_OWN = range(12)
SPEEDS: Final = 12

NOBODY: Final = -1
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    """Compiled at its first call, and kept on disk."""
    return cast(_Function, numba.njit(cache=True)(function))


@_jit
def _sift_up(i: int, order: Any, due: Any, counts: Any) -> None:
    slot = order[i]
    while i > 0:
        parent = (i - 1) >> 1
        if due[order[parent]] <= due[slot]:
            break
        order[i] = order[parent]
        counts[order[i], PLACE] = i
        i = parent
    order[i] = slot
    counts[slot, PLACE] = i


@_jit
def _sift_down(i: int, n: int, order: Any, due: Any, counts: Any) -> None:
    slot = order[i]
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and due[order[child + 1]] < due[order[child]]:
            child += 1
        if due[slot] <= due[order[child]]:
            break
        order[i] = order[child]
        counts[order[i], PLACE] = i
        i = child
    order[i] = slot
    counts[slot, PLACE] = i


@_jit
def _schedule(slot: int, at_s: float, order: Any, due: Any, counts: Any) -> None:
    """Sets a replica's next event; all replicas are always in the heap, idle ones at infinity."""
    before = due[slot]
    due[slot] = at_s
    if at_s < before:
        _sift_up(counts[slot, PLACE], order, due, counts)
    else:
        _sift_down(counts[slot, PLACE], len(order), order, due, counts)


@_jit
def _push(ends: Any, who: Any, n: int, at: float, request: int) -> None:
    i = n
    while i > 0:
        parent = (i - 1) >> 1
        if ends[parent] <= at:
            break
        ends[i], who[i] = ends[parent], who[parent]
        i = parent
    ends[i], who[i] = at, request


@_jit
def _pop(ends: Any, who: Any, n: int) -> None:
    """Removes the first of n; the caller has read it."""
    n -= 1
    at, request = ends[n], who[n]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and ends[child + 1] < ends[child]:
            child += 1
        if at <= ends[child]:
            break
        ends[i], who[i] = ends[child], who[child]
        i = child
    ends[i], who[i] = at, request


@_jit
def _steps_s(n: float, batch: float, context: float, speed: Any) -> Any:
    """Seconds of n decode steps of a batch whose contexts hold so many tokens now; each step adds one to each."""
    read = n * context + batch * n * (n - 1) / 2
    return n * (speed[STEP] + speed[PER_SEQUENCE] * batch) + speed[PER_CONTEXT] * read


@_jit
def _steps_in(elapsed_s: float, batch: float, context: float, speed: Any) -> Any:
    """The inverse: steps, not whole, that fit into a time."""
    linear = speed[STEP] + speed[PER_SEQUENCE] * batch + speed[PER_CONTEXT] * (context - batch / 2)
    square = speed[PER_CONTEXT] * batch / 2
    if square <= 0:
        return elapsed_s / linear
    return 2 * elapsed_s / (linear + np.sqrt(linear * linear + 4 * square * elapsed_s))


@_jit
def _begin(slot: int, now: float, s: Any) -> None:  # noqa: PLR0915  # a call costs as much as the work it would hold
    """Begins a pass with prompts, a stretch of decoding, or nothing."""
    numbers, counts, speed, order, due = s.numbers, s.counts, s.speed, s.order, s.due
    batch = counts[slot, BATCH]
    budget = speed[CHUNK] - batch
    work_s = 0.0
    new = 0
    while budget >= 1:
        request = counts[slot, PARTIAL]
        if request == NOBODY:
            request = counts[slot, HEAD]
            if request == NOBODY or batch + new >= speed[SLOTS]:
                break
            needed = s.prompt[request] + s.output[request]
            if numbers[slot, RESERVED] + needed > speed[KV] and batch + new > 0:
                break
            numbers[slot, RESERVED] += needed
            counts[slot, HEAD] = s.following[request]
            if counts[slot, HEAD] == NOBODY:
                counts[slot, TAIL] = NOBODY
            counts[slot, QUEUED] -= 1
            counts[slot, PARTIAL] = request
            numbers[slot, PARTIAL_LEFT] = s.prompt[request]
            numbers[slot, PARTIAL_DONE] = 0.0
        chunk = min(numbers[slot, PARTIAL_LEFT], budget)
        done = numbers[slot, PARTIAL_DONE]
        work_s += chunk / speed[RATE] + speed[ATTENTION] * ((done + chunk) ** 2 - done**2)
        budget -= chunk
        numbers[slot, PARTIAL_LEFT] -= chunk
        numbers[slot, PARTIAL_DONE] += chunk
        if numbers[slot, PARTIAL_LEFT] > 0:
            break
        s.fresh[slot, new] = request
        new += 1
        counts[slot, PARTIAL] = NOBODY
    numbers[slot, MARK] = now
    if work_s > 0:
        counts[slot, PHASE] = PASSING
        counts[slot, NEW] = new
        fixed = max(speed[STEP], speed[OVERHEAD])
        took = fixed + speed[PER_SEQUENCE] * batch + speed[PER_CONTEXT] * numbers[slot, CONTEXT] + work_s
        _schedule(slot, now + took, order, due, counts)
    elif batch > 0:
        counts[slot, PHASE] = DECODING
        steps = s.ends[slot, 0] - numbers[slot, CLOCK]
        counts[slot, STEPS] = int(steps)
        _schedule(slot, now + _steps_s(steps, batch, numbers[slot, CONTEXT], speed), order, due, counts)
    else:
        counts[slot, PHASE] = IDLE
        _schedule(slot, np.inf, order, due, counts)
        if counts[slot, STATUS] == DRAINING:
            _gone(slot, now, s)


@_jit
def _gone(slot: int, now: float, s: Any) -> None:
    s.counters[BILLED] += now - s.numbers[slot, ASKED]
    s.counts[slot, STATUS] = FREE
    _schedule(slot, np.inf, s.order, s.due, s.counts)


@_jit
def _ended(slot: int, now: float, s: Any) -> None:
    """Takes the answers off the batch that end at the present clock."""
    numbers, counts = s.numbers, s.counts
    n = counts[slot, BATCH]
    while n > 0 and s.ends[slot, 0] <= numbers[slot, CLOCK] + 0.5:
        request = s.who[slot, 0]
        _pop(s.ends[slot], s.who[slot], n)
        n -= 1
        numbers[slot, CONTEXT] -= s.prompt[request] + s.output[request]
        _finished(slot, request, now, s)
    counts[slot, BATCH] = n


@_jit
def _finished(slot: int, request: int, now: float, s: Any) -> None:
    s.numbers[slot, RESERVED] -= s.prompt[request] + s.output[request]
    s.counts[slot, IN_FLIGHT] -= 1
    s.last_s[request] = now
    s.counters[ENDED] += 1
    if s.output[request] > 1 and now - s.first_s[request] > s.speed[ITL_SLO] * (s.output[request] - 1):
        s.counters[SLOW] += 1
    s.counters[PROMPTS] += s.prompt[request]
    s.counters[OUTPUTS] += s.output[request]


@_jit
def _event(slot: int, now: float, s: Any) -> None:
    """What a replica was due to do."""
    numbers, counts, speed, counters = s.numbers, s.counts, s.speed, s.counters
    if counts[slot, STATUS] == STARTING:
        counts[slot, STATUS] = READY
        s.ready[s.world[READY_N]] = slot
        s.world[READY_N] += 1
        _schedule(slot, np.inf, s.order, s.due, counts)
        while s.world[HELD_HEAD] != NOBODY:
            request = s.world[HELD_HEAD]
            s.world[HELD_HEAD] = s.following[request]
            counters[HELD_NOW] -= 1
            _route(request, now, s)
        s.world[HELD_TAIL] = NOBODY
        return
    batch = counts[slot, BATCH]
    if counts[slot, PHASE] == DECODING:
        steps = counts[slot, STEPS]
        numbers[slot, CLOCK] += steps
        numbers[slot, CONTEXT] += steps * batch
        _ended(slot, now, s)
    else:
        numbers[slot, CLOCK] += 1
        numbers[slot, CONTEXT] += batch
        _ended(slot, now, s)
        for i in range(counts[slot, NEW]):
            request = s.fresh[slot, i]
            s.first_s[request] = now
            counters[FIRSTS] += 1
            if now - s.at_s[request] > speed[TTFT_SLO] + speed[TTFT_OWN] * s.own_s[request]:
                counters[LATE] += 1
            if s.output[request] <= 1:
                _finished(slot, request, now, s)
            else:
                _push(
                    s.ends[slot],
                    s.who[slot],
                    counts[slot, BATCH],
                    numbers[slot, CLOCK] + s.output[request] - 1,
                    request,
                )
                counts[slot, BATCH] += 1
                numbers[slot, CONTEXT] += s.prompt[request] + 1
    _begin(slot, now, s)


@_jit
def _below(n: int, world: Any) -> int:
    """A random number below n (xorshift, 32 bits of state kept in the world)."""
    x = world[RANDOM]
    x ^= (x << 13) & 0xFFFFFFFF
    x ^= x >> 17
    x ^= (x << 5) & 0xFFFFFFFF
    world[RANDOM] = x
    return int((x * n) >> 32)


@_jit
def _route(request: int, now: float, s: Any) -> None:
    """To the less loaded of two random replicas: the gateway's routing policy `power-of-two`."""
    counts, numbers = s.counts, s.numbers
    n = s.world[READY_N]
    first = _below(n, s.world)
    slot = s.ready[first]
    if n > 1:
        second = _below(n - 1, s.world)
        if second >= first:
            second += 1
        if counts[s.ready[second], IN_FLIGHT] < counts[slot, IN_FLIGHT]:
            slot = s.ready[second]
    s.following[request] = NOBODY
    if counts[slot, HEAD] == NOBODY:
        counts[slot, HEAD] = request
    else:
        s.following[counts[slot, TAIL]] = request
    counts[slot, TAIL] = request
    counts[slot, QUEUED] += 1
    counts[slot, IN_FLIGHT] += 1
    if counts[slot, PHASE] == IDLE:
        _begin(slot, now, s)
    elif counts[slot, PHASE] == DECODING and counts[slot, QUEUED] == 1 and counts[slot, BATCH] < s.speed[SLOTS]:
        # The step under way ends first; then a pass begins that computes the prompt.
        batch, context = counts[slot, BATCH], numbers[slot, CONTEXT]
        needed = s.prompt[request] + s.output[request]
        steps = int(np.ceil(_steps_in(now - numbers[slot, MARK], batch, context, s.speed)))
        if max(steps, 1) < counts[slot, STEPS] and numbers[slot, RESERVED] + needed <= s.speed[KV]:
            counts[slot, STEPS] = max(steps, 1)
            at_s = numbers[slot, MARK] + _steps_s(max(steps, 1), batch, context, s.speed)
            _schedule(slot, max(at_s, now), s.order, s.due, counts)


@_jit
def _arrive(request: int, most_held: int, s: Any) -> None:
    s.counters[ARRIVED] += 1
    if s.world[READY_N] > 0:
        _route(request, s.at_s[request], s)
    elif s.counters[HELD_NOW] >= most_held:
        s.counters[REJECTED] += 1
    else:
        s.following[request] = NOBODY
        if s.world[HELD_HEAD] == NOBODY:
            s.world[HELD_HEAD] = request
        else:
            s.following[s.world[HELD_TAIL]] = request
        s.world[HELD_TAIL] = request
        s.counters[HELD_NOW] += 1


@_jit
def advance(until_s: float, most_held: int, s: Any) -> None:
    """Everything that happens before `until_s`."""
    n = len(s.at_s)
    while True:
        slot = s.order[0]
        request = s.world[NEXT]
        due_s = s.due[slot]
        if request < n and s.at_s[request] <= due_s:
            if s.at_s[request] >= until_s:
                return
            s.world[NEXT] += 1
            _arrive(request, most_held, s)
        else:
            if due_s >= until_s:
                return
            _event(slot, due_s, s)


@_jit
def ask(number: int, now: float, delay_s: float, s: Any) -> None:
    """Starts replicas, billed from now on."""
    for slot in range(len(s.counts)):
        if number <= 0:
            return
        if s.counts[slot, STATUS] == FREE:
            number -= 1
            s.counts[slot, STATUS] = STARTING
            s.counts[slot, PHASE] = IDLE
            s.numbers[slot, ASKED] = now
            s.numbers[slot, READY_AT] = now + delay_s
            _schedule(slot, now + delay_s, s.order, s.due, s.counts)


@_jit
def release(number: int, now: float, s: Any) -> None:
    """Stops replicas: those that start still, the youngest first, then the least busy, which end their streams."""
    while number > 0:
        number -= 1
        youngest = -1
        for slot in range(len(s.counts)):
            if s.counts[slot, STATUS] == STARTING and (
                youngest < 0 or s.numbers[slot, ASKED] >= s.numbers[youngest, ASKED]
            ):
                youngest = slot
        if youngest >= 0:
            _gone(youngest, now, s)
            continue
        n = s.world[READY_N]
        if n == 0:
            return
        least = 0
        for i in range(1, n):
            if s.counts[s.ready[i], IN_FLIGHT] < s.counts[s.ready[least], IN_FLIGHT]:
                least = i
        slot = s.ready[least]
        s.ready[least] = s.ready[n - 1]
        s.world[READY_N] = n - 1
        s.counts[slot, STATUS] = DRAINING
        if s.counts[slot, PHASE] == IDLE:
            _gone(slot, now, s)


@_jit
def follow(
    levels: Any, step_s: float, end_s: float, delay_s: float, most_held: int, most_missed: float, series: Any, s: Any
) -> bool:
    """A schedule made beforehand: so many replicas from each step on; false: given up, since more than may have missed.

    The present number is that of the world before; `series` takes target and what was ready after each step.
    """
    current = series[0, 0]
    for step in range(len(levels)):
        advance(step * step_s, most_held, s)
        if levels[step] > current:
            ask(levels[step] - current, step * step_s, delay_s, s)
        elif levels[step] < current:
            release(current - levels[step], step * step_s, s)
        current = levels[step]
        series[step, 0] = current
        series[step, 1] = s.world[READY_N]
        # A request may be late and slow: what missed is at least the greater of both.
        if max(s.counters[LATE], s.counters[SLOW]) + s.counters[REJECTED] > most_missed:
            return False
    advance(end_s, most_held, s)
    return True
