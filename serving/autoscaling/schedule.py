"""Floors by the time of day: a known morning rush is served from its first minute on."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

from serving.config import DAYS, ScheduledFloor

_HOUR_MINUTES: Final = 60


def floor_at(schedule: Iterable[ScheduledFloor], at_s: float, zone: tzinfo) -> int:
    """The highest floor that holds at a moment (seconds since the epoch); 0 where none does."""
    moment = datetime.fromtimestamp(at_s, UTC).astimezone(zone)
    minute = moment.hour * _HOUR_MINUTES + moment.minute
    today = DAYS[moment.weekday()]
    yesterday = DAYS[(moment - timedelta(days=1)).weekday()]
    floors = [0]
    for entry in schedule:
        if entry.from_ <= entry.to:
            holds = today in entry.days and entry.from_ <= minute < entry.to
        else:
            # Over midnight: the day named is the one on which it begins.
            holds = (today in entry.days and minute >= entry.from_) or (yesterday in entry.days and minute < entry.to)
        if holds:
            floors.append(entry.min)
    return max(floors)
