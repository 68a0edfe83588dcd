"""How many replicas of a model run: what one can do, what it promises, when its number changes."""

from __future__ import annotations

import re
from datetime import UTC, tzinfo
from typing import Annotated, Any, Final, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from serving.config.base import Frozen, PositiveInt, Seconds

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MINUTES_A_DAY = 24 * 60
# One metric with label matchers, of which Prometheus knows when each sample was taken.
_SELECTOR: Final = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([^{}"]|"([^"\\]|\\.)*")*\})?')
_PromQL = Annotated[str, Field(min_length=1, max_length=4096)]


def _minutes(value: Any) -> Any:
    """A time of day as minutes. YAML reads an unquoted 18:30 as the number 1110, which is the same."""
    if isinstance(value, str):
        hours, colon, minutes = value.partition(":")
        if not (colon and hours.isdecimal() and minutes.isdecimal() and len(minutes) == 2 and int(minutes) < 60):  # noqa: PLR2004  # HH:MM
            raise ValueError("must be a time of day such as 18:30")
        return int(hours) * 60 + int(minutes)
    return value


MinuteOfDay = Annotated[int, BeforeValidator(_minutes), Field(ge=0, le=_MINUTES_A_DAY)]


def zone(name: str) -> tzinfo:
    """A time zone by its name; UTC needs no database of them. Raises ZoneInfoNotFoundError, ValueError, OSError."""
    return UTC if name == "UTC" else ZoneInfo(name)


class ScheduledFloor(Frozen):
    """At these times of these days at least so many replicas run; `to` before `from` is the next day's."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    days: Annotated[tuple[Day, ...], Field(min_length=1)] = DAYS
    # HH:MM in autoscaling.timezone; 24:00 is the day's end.
    from_: Annotated[MinuteOfDay, Field(alias="from")]
    to: MinuteOfDay
    min: PositiveInt


class ExternalConfig(Frozen):
    """A number of replicas that something else decides (KEDA, a HorizontalPodAutoscaler), as Prometheus knows it."""

    # PromQL whose one element is the number; a fraction counts as the next whole one.
    query: _PromQL
    # PromQL whose one element is when the oldest sample behind it was taken, seconds since the epoch. Left out:
    # `timestamp(query)`, which says so of one metric alone; of anything computed it would say "now".
    sampled: _PromQL | None = None
    # A number from older samples is not believed: the scale is held. Above the interval at which they are scraped.
    stale_after_s: Seconds = 90.0

    @model_validator(mode="after")
    def _age_is_known(self) -> Self:
        if self.sampled is None and not _SELECTOR.fullmatch(self.query.strip()):
            raise ValueError(
                "`sampled` is needed, because `query` is more than one metric with its labels: for example "
                "min(timestamp(METRIC)) of the metrics in it"
            )
        return self

    @property
    def sampled_query(self) -> str:
        """PromQL of the moment that the number is from."""
        return f"timestamp({self.query})" if self.sampled is None else self.sampled


class AutoscalingConfig(Frozen):
    """How a model's replicas follow its load; absent, `replicas.min` of them run."""

    # What one replica can do; absent: the fake engine's own figures, or (real engines) what is learned while it runs.
    capacity: CapacityConfig | None = None
    decision_interval_s: Seconds = 5.0
    # Who decides instead of Galerne's own policy; bounds, schedule and `idle_s` hold all the same.
    external: ExternalConfig | None = None
    # A start is taken to last so long until one was measured.
    start_s: Seconds = 45.0
    # Signals older than this are not believed: the scale is held.
    stale_after_s: Seconds = 30.0
    # With `replicas.min: 0`: the last replica goes after so long without a request.
    idle_s: Seconds = 600.0
    # Share of requests that are to keep the targets of `slo`: headroom grows until they do, and shrinks where more do.
    attainment: Annotated[float, Field(ge=0.5, lt=1)] = 0.99
    # Whether demand at this time of earlier days starts replicas ahead of it.
    forecast: bool = True
    # Floors by time of day, beyond `replicas.min` and never beyond `replicas.max`.
    schedule: tuple[ScheduledFloor, ...] = ()
    # IANA name of the zone that the schedule is written in.
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            zone(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("no time zone of this name; allowed: IANA names such as Europe/Paris") from None
        return value


class CapacityConfig(Frozen):
    """What one replica can do, as `python -m loadtest profile` measures it; with k for a thousand tokens:

    ttft = overhead + tokens / prefill rate + attention × k²
    step = base + per sequence × batch + per context × batch × k
    """

    prefill_tokens_per_s: Annotated[float, Field(gt=0)]
    prefill_overhead_ms: Annotated[float, Field(ge=0)] = 0.0
    prefill_ms_per_1k_tokens_squared: Annotated[float, Field(ge=0)] = 0.0
    decode_ms: Annotated[float, Field(ge=0)]
    decode_ms_per_sequence: Annotated[float, Field(ge=0)] = 0.0
    decode_ms_per_1k_context_tokens: Annotated[float, Field(ge=0)] = 0.0
    # Sequences in one batch (vLLM's max_num_seqs).
    max_sequences: PositiveInt = 256
    # Tokens that the KV cache holds; absent: never the limit.
    kv_tokens: PositiveInt | None = None
