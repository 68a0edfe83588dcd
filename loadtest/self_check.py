"""Whether the client itself was the bottleneck: then a run says nothing of its target and is INVALID."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.records import Outcome, Record
from loadtest.stats import quantiles

# A client may be late by this, or by this share of the median time to first token, whichever is more.
LATE_LIMIT_S = 0.005
LATE_LIMIT_SHARE = 0.05
# One core is all that an event loop can use.
BUSY_CORE_SHARE = 0.90
# A peak in few samples does not spoil a run; more than this share of them does.
BUSY_SAMPLES_SHARE = 0.05

_P50 = 0.50
_P99 = 0.99


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker process over about a second."""

    worker: int
    # End of the sample, seconds after the run's start.
    at_s: float
    # CPU time of the process as a share of one core.
    cpu_share: float
    # How late the event loop ran at each tick of an even grid, seconds; a stall counts for every tick it covers.
    lags_s: tuple[float, ...]


def self_check(records: Iterable[Record], samples: Iterable[WorkerSample], *, waited: int = 0) -> tuple[str, ...]:
    """Why the run is invalid, a sentence each; empty for a valid run.

    Looks at what was measured only: warm-up requests and the samples before the first measured request are left
    out. `waited` is how many requests found all connections taken.
    """
    measured = [record for record in records if not record.warm_up and record.outcome is not Outcome.UNSENT]
    if not measured:
        return ("no request was sent after the warm-up: there is nothing to judge",)
    ttft_s = [ttft for record in measured if (ttft := record.ttft_s) is not None]
    limit_s = max(LATE_LIMIT_S, LATE_LIMIT_SHARE * quantiles(ttft_s, _P50)[0] if ttft_s else 0.0)
    begin_s = min(record.scheduled_s for record in measured)
    counted = [sample for sample in samples if sample.at_s >= begin_s]
    reasons = []
    (late_s,) = quantiles(map(_late_s, measured), _P99)
    if late_s > limit_s:
        reasons.append(
            f"the client sent requests late: p99 {_ms(late_s)} after their time, more than {_ms(limit_s)}; "
            "use more --workers, more --max-connections, or a faster client machine"
        )
    if waited:
        reasons.append(
            f"client saturation: {waited} requests found all connections taken and had to wait; raise --max-connections"
        )
    for worker in sorted({sample.worker for sample in counted}):
        reasons += _worker_reasons(worker, [sample for sample in counted if sample.worker == worker], limit_s)
    return tuple(reasons)


def _late_s(record: Record) -> float:
    if record.late_s is not None:
        return record.late_s
    # Never sent, and ended all the same: late by all of its time.
    return (record.end_s or record.scheduled_s) - record.scheduled_s


def _worker_reasons(worker: int, samples: Sequence[WorkerSample], limit_s: float) -> list[str]:
    reasons = []
    busy = [sample.cpu_share for sample in samples if sample.cpu_share > BUSY_CORE_SHARE]
    if len(busy) > BUSY_SAMPLES_SHARE * len(samples):
        reasons.append(
            f"worker {worker} used more than {BUSY_CORE_SHARE:.0%} of its core in {len(busy)} of {len(samples)} "
            f"samples (at most {max(busy):.0%}); use more --workers"
        )
    lags_s = [lag for sample in samples for lag in sample.lags_s]
    if lags_s and (lag_s := quantiles(lags_s, _P99)[0]) > limit_s:
        reasons.append(
            f"the event loop of worker {worker} lagged: p99 {_ms(lag_s)}, more than {_ms(limit_s)}; "
            "its processor was taken by others, or the load is more than one worker can follow"
        )
    return reasons


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
