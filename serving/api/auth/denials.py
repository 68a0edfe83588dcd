"""What the operator is told of those who were not let in: a count by reason, and log lines within a bound.

A line costs time and disk, and whoever is refused decides how often; the count is exact whatever they do.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from serving.api.auth.identity import NotAdmin, NotInScope, Refused

LINES_PER_S = 5.0
BURST = 20.0

Denial = Refused | NotInScope | NotAdmin
DENIALS = (Refused, NotInScope, NotAdmin)

log = structlog.get_logger("galerne.auth")


class Denials:
    """Counts and tells; one per gateway."""

    def __init__(self, count: Callable[[str, str], None], clock: Callable[[], float]) -> None:
        """`count`: by tenant ("" where it is not known) and reason."""
        self._count = count
        self._clock = clock
        self._lines = BURST
        self._at_s = clock()
        self._untold = 0

    def note(self, denial: Denial, request_id: str) -> None:
        """One request was refused."""
        self._count(denial.tenant_id, denial.reason)
        now_s = self._clock()
        self._lines = min(BURST, self._lines + (now_s - self._at_s) * LINES_PER_S)
        self._at_s = now_s
        if self._lines < 1:
            self._untold += 1
            return
        self._lines -= 1
        log.info(
            "refused",
            reason=denial.reason,
            tenant=denial.tenant_id or None,
            key=denial.key_id or None,
            request_id=request_id,
            untold=self._untold,
        )
        self._untold = 0
