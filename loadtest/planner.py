"""Drafts made into requests: timed, thinned, capped, written, merged; and a count of what was changed on the way."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loadtest import arrivals
from loadtest.errors import LoadtestError
from loadtest.pacing import Arrivals, Trace
from loadtest.plan import PlannedRequest
from loadtest.workloads import Draft, Setting, Workload

# A trace that ends within this share of the run's end is as long as the run: its last gap is just a gap.
_ENDS_EARLY_SHARE = 0.1


@dataclass(slots=True)
class Tally:
    """What a stream has planned so far."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prompts_capped: int = 0
    outputs_capped: int = 0
    last_at_s: float | None = None
    # The source had no more requests.
    exhausted: bool = False


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One stream, ready to be planned."""

    label: str
    tenant: str
    model: str
    workload: Workload
    pacing: Arrivals
    setting: Setting
    tally: Tally = field(default_factory=Tally)


class Plan(Iterator[PlannedRequest]):
    """Requests of all streams, ascending in time; consumed once. Memory is that of one request a stream."""

    def __init__(self, streams: Sequence[StreamPlan], *, until_s: float) -> None:
        self._streams = tuple(streams)
        self._until_s = until_s
        self._merged = heapq.merge(*(_requests(stream, until_s) for stream in streams), key=lambda one: one.at_s)

    def __next__(self) -> PlannedRequest:
        return next(self._merged)

    @property
    def tallies(self) -> dict[str, Tally]:
        """Counts by stream, of what has been iterated so far and at most one request more."""
        return {stream.label: stream.tally for stream in self._streams}

    def notes(self) -> tuple[str, ...]:
        """What a user has to know about the planned requests, in sentences; complete once all are iterated."""
        return tuple(note for stream in self._streams for note in _notes(stream, self._until_s))


def _notes(stream: StreamPlan, until_s: float) -> Iterator[str]:
    tally, workload = stream.tally, stream.workload
    if tally.prompts_capped:
        yield (
            f"{stream.label}: {tally.prompts_capped} of {tally.requests} prompts were cut "
            f"to max_prompt_tokens ({workload.max_prompt_tokens})"
        )
    if tally.outputs_capped:
        yield (
            f"{stream.label}: {tally.outputs_capped} of {tally.requests} outputs were cut "
            f"to max_output_tokens ({workload.max_output_tokens})"
        )
    if not tally.requests:
        yield f"{stream.label}: sends nothing in this run; check its rate, from_s and share"
    elif tally.exhausted and tally.last_at_s is not None and tally.last_at_s < until_s * (1 - _ENDS_EARLY_SHARE):
        yield f"{stream.label}: its source ends at {tally.last_at_s:.0f} s of {until_s:.0f} s"


def _requests(stream: StreamPlan, until_s: float) -> Iterator[PlannedRequest]:
    tally, workload = stream.tally, stream.workload
    for at_s, draft in _timed(stream, until_s):
        prompt_tokens = min(draft.prompt_tokens, workload.max_prompt_tokens or draft.prompt_tokens)
        output_tokens = min(draft.output_tokens, workload.max_output_tokens or draft.output_tokens)
        tally.requests += 1
        tally.prompt_tokens += prompt_tokens
        tally.output_tokens += output_tokens
        tally.prompts_capped += prompt_tokens < draft.prompt_tokens
        tally.outputs_capped += output_tokens < draft.output_tokens
        tally.last_at_s = at_s
        tenant = draft.tenant or stream.tenant
        yield PlannedRequest(
            at_s=at_s,
            tenant=f"{tenant}/{draft.client}" if draft.client else tenant,
            model=draft.model or stream.model,
            prompt=draft.write(prompt_tokens),
            output_tokens=output_tokens,
            session=draft.session,
        )


def _timed(stream: StreamPlan, until_s: float) -> Iterator[tuple[float, Draft]]:
    pacing, rng = stream.pacing, stream.setting.rng("arrivals")
    if isinstance(pacing, Trace):
        replayed = arrivals.trace(
            _counted_out(stream), time_s=_time_s, from_s=pacing.from_s, speed=pacing.speed, until_s=until_s
        )
        # Drawn for every request, so that a larger share holds all of a smaller one.
        return ((at_s, draft) for at_s, draft in replayed if rng.random() < pacing.share)
    return zip(arrivals.until(pacing.times(rng), until_s), _again_and_again(stream), strict=False)


def _time_s(draft: Draft) -> float:
    if draft.at_s is None:
        raise LoadtestError("a request without a time in a trace; use other arrivals than trace")
    return draft.at_s


def _counted_out(stream: StreamPlan) -> Iterator[Draft]:
    yield from stream.workload.drafts(stream.setting)
    stream.tally.exhausted = True


def _again_and_again(stream: StreamPlan) -> Iterator[Draft]:
    # Times that are not the source's may need more requests than it has.
    while True:
        empty = True
        for draft in stream.workload.drafts(stream.setting):
            empty = False
            yield draft
        if empty:
            raise LoadtestError(f"{stream.label}: its workload holds no request")
