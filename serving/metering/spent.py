"""What tenants have spent, as the ledger knows it: for budgets that their store has forgotten."""

from __future__ import annotations

import asyncio
import hashlib
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from serving.metering.asking import LedgerQuestions
from serving.metering.ledger import Ledger
from serving.metering.questions import NoAnswer, Question
from serving.metering.settings import SQLITE
from serving.metering.spill import Spill

# A month of a tenant's requests is summed: a second for a million rows. Nobody waits at a screen.
WITHIN_S: Final = 30.0
SHARED: Final = "shared"
NAME_CHARS: Final = 16


class LedgerBooks:
    """One gateway's way to ask its ledger about budgets."""

    def __init__(self, ledger: Ledger, questions: LedgerQuestions) -> None:
        self._ledger = ledger
        self._questions = questions
        settings = ledger.settings
        where = f"{platform.node()} {settings.url}"
        # Gateways of one machine share a file, those of all machines a server.
        self.name = SHARED if settings.is_shared else hashlib.sha256(where.encode()).hexdigest()[:NAME_CHARS]

    @property
    def lag_s(self) -> float:
        """So long after a request's end its row is in the database, where nothing is behind."""
        return self._ledger.lag_s

    async def spent(self, tenant: str, ended_before_s: float) -> dict[str, int]:
        """Tokens billed for requests that had ended by then, by day of that moment's month (UTC); raises NoAnswer."""
        if not await asyncio.to_thread(self._ever_written, ended_before_s):
            return {}
        at = datetime.fromtimestamp(ended_before_s, UTC)
        month = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        question = Question(
            tenant=tenant,
            since_s=int(month.timestamp()),
            until_s=int(ended_before_s) + 1,
            by=("day",),
            ended_before_s=ended_before_s,
            within_s=WITHIN_S,
        )
        sums = await self._questions.ask(question)
        return {str(group.day): group.prompt_tokens + group.completion_tokens for group in sums}

    def _ever_written(self, ended_before_s: float) -> bool:
        """Whether there is a ledger; NoAnswer while rows of this machine that had ended by then are not in it."""
        settings, last_s = self._ledger.settings, ended_before_s + self._ledger.flush_s
        if any(batch.written_s <= last_s for batch in Spill(settings.spill_dir).batches()):
            raise NoAnswer("away", "rows of before wait for the database")
        # A file comes with its first writer: without one nothing was ever billed.
        return settings.is_shared or Path(settings.url.removeprefix(SQLITE)).exists()
