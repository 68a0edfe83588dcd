"""Moments as people write them, for the command line and the gateway alike."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Final

MOMENTS: Final = "a day (2026-11-01) or a moment (2026-11-01T12:00:00+01:00); UTC where it has no zone"
_DAY_LENGTH: Final = len("2026-11-01")


def moment(text: str) -> datetime:
    """The moment, with its zone; a day is its beginning. Raises ValueError."""
    if len(text) == _DAY_LENGTH:
        day = date.fromisoformat(text)
        return datetime(day.year, day.month, day.day, tzinfo=UTC)
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
