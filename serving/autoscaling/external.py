"""What something else wants of a model's replicas: one number from Prometheus, and how old it is.

Number and age come from one answer, and are believed as every signal is: a number that is missing, stands twice, is
negative or not finite is none, and one without an age neither; trouble in asking makes it older.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from serving.autoscaling.signals import REFRESH_S, Fetch, SignalReader, only_one, rows
from serving.autoscaling.snapshot import Signal
from serving.config import ExternalConfig

FIELD: Final = "external"
# The label by which the parts of the answer are told apart, and its values. Nobody else's labels matter.
PART: Final = "galerne_part"
NUMBER, SAMPLED = "number", "sampled"


def query(external: ExternalConfig) -> str:
    """One query for both."""
    parts = ((NUMBER, external.query), (SAMPLED, external.sampled_query))
    # A comment at an expression's end must not reach beyond it.
    return " or ".join(f'label_replace((\n{asked}\n), "{PART}", "{part}", "", "")' for part, asked in parts)


def parse(body: bytes) -> dict[str, dict[str, Signal]]:
    """The number with its age at evaluation, below the model ""; ValueError where the answer cannot be believed."""
    found: dict[str, list[float]] = {}
    asked_at_s: list[float] = []
    for row in rows(body):
        try:
            part = row["metric"][PART]
            at_s, value = map(float, row["value"])
        except (KeyError, TypeError, ValueError):
            continue
        found.setdefault(part, []).append(value)
        asked_at_s.append(at_s)
    number, sampled = (only_one(found.get(part, ())) for part in (NUMBER, SAMPLED))
    if number is None or sampled is None or not math.isfinite(number):
        return {}
    return {"": {FIELD: Signal(number, max(asked_at_s) - sampled)}}


class ExternalReader:
    """The number of one model; asking never waits and never raises."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        external: ExternalConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        fetch: Fetch | None = None,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self.reader = SignalReader(
            url, timeout_s, clock, fetch=fetch, refresh_s=refresh_s, query=query(external), parser=parse
        )

    def signals(self) -> Mapping[str, Signal]:
        """By field of Snapshot, with its age as of now; `NO_SIGNAL` where it is not known."""
        return {FIELD: self.reader.answered("").get(FIELD, Signal())}
