"""Quotas counted in this process: sliding windows of a minute, requests at once, budgets of days and months.

A window is 61 buckets of a second, the present one included, so a request counts for 60 to 61 seconds: in no 60
seconds is more let through than the limit, and less than 2% of it is lost to the rounding. A reservation is one step
without an await: however many come at once, the limit is exact.

Tokens are reserved by estimate and settled by use. What was reserved too much goes back into the second it was taken
from; what was used beyond is charged to the second in which that is known. So the only slack is what running requests
use beyond their estimates, and it is paid back within the minute. Budgets are of calendar days and months in UTC.

Memory: 122 numbers, two budgets and the running requests of each tenant with a quota.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol

import structlog

from serving.config import Limit, QuotaConfig
from serving.errors import ConfigError

log = structlog.get_logger("galerne.quotas")

WINDOW_S = 61
# A budget's file is written at most so often: so much use a crash may forget.
SAVE_EVERY_S = 2.0
# Who is over `concurrent` tries again after so long; nobody knows when a request ends.
CONCURRENT_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for: `lease` names it among all requests there ever were, `tokens` is what is reserved.

    `beside_tokens` is charged beside what its row says, where that says anything (serving.admission.estimates.Cost).
    `remembered`: what was last seen used of the present day and month, for a store that has forgotten it.
    """

    tenant: str
    quota: QuotaConfig
    lease: str
    tokens: int
    beside_tokens: int = 0
    remembered: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may go, and where its tenant stands with it.

    `refused`: the limit that stands in the way. `wait_s`: until it could fit; None: it never will, it is larger than
    the limit. `second`: the bucket it was counted in, 0: not known. `day`, `month`: which budgets. Of limits that are
    not set the numbers are 0. `since`: when the store began to count budgets, "": not known; `known`: whether it has
    been told what was used before.
    """

    refused: Limit | None
    wait_s: float | None
    requests_used: int
    requests_reset_s: float
    tokens_used: int
    tokens_reset_s: float
    concurrent: int
    day_used: int
    month_used: int
    second: int
    day: str
    month: str
    since: str = ""
    known: bool = True

    @classmethod
    def uncounted(cls, now_s: float) -> Verdict:
        """Of a request that goes without being counted; budgets are charged for it later."""
        return cls(None, 0.0, 0, 0.0, 0, 0.0, 0, 0, 0, 0, *periods(now_s))

    @property
    def used(self) -> dict[Limit, int]:
        """Of each limit, how much is used."""
        return {
            "requests": self.requests_used,
            "tokens": self.tokens_used,
            "concurrent": self.concurrent,
            "day": self.day_used,
            "month": self.month_used,
        }


@dataclass(frozen=True, slots=True)
class QuotaStanding:
    """Of each limit that is set, how much is used, requests under way by their estimates.

    `resets_s`: until nothing of that counts any more; None: when running requests end.
    """

    used: Mapping[Limit, int]
    resets_s: Mapping[Limit, float | None]

    @classmethod
    def of(cls, quota: QuotaConfig, verdict: Verdict, now_s: float) -> QuotaStanding:
        """As a verdict of this moment (seconds since the epoch) has it."""
        return cls(
            {limit: verdict.used[limit] for limit, most in quota.by_limit.items() if most is not None},
            {
                "requests": verdict.requests_reset_s,
                "tokens": verdict.tokens_reset_s,
                "concurrent": None,
                "day": until_next(now_s, "day"),
                "month": until_next(now_s, "month"),
            },
        )


class QuotaStore(Protocol):
    """Where quotas are counted."""

    async def reserve(self, demand: Demand) -> Verdict:
        """Count a request if every limit has room for it, else count nothing.

        StoreDown where the store is away; BudgetsLost where it has a budget of which it does not know what is used.
        """

    async def release(self, demand: Demand) -> None:
        """A request has ended, and what it used is not known yet; StoreDown where the store is away."""

    async def settle(self, demand: Demand, verdict: Verdict, used_tokens: int, *, ended_s: float, refund: bool) -> None:
        """What a request used is known; `refund`: it is to count as none. StoreDown where the store is away.

        `ended_s` (seconds since 1970): of one that ended before the store began to count budgets the ledger tells it.
        """

    async def look(self, tenant: str, quota: QuotaConfig, remembered: Mapping[str, int]) -> QuotaStanding:
        """Where a tenant stands, nothing counted; raises as `reserve` does."""

    async def begin(self, tenant: str) -> Lost | None:
        """Begin to count a tenant's budgets; None where it is known what was used before. Raises StoreDown."""

    async def fill(self, tenant: str, lost: Lost, spent: Mapping[str, int]) -> None:
        """Take what was used before, by day and month; once, whoever tells it. Raises StoreDown."""


class BudgetsLost(Exception):
    """The store does not know what was used of a budget before it began, and nor does whoever asks."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A tenant's budgets of which nobody has told the store what was used before `since_s` (seconds since 1970).

    `since`: the same, as the store calls it; `age_s`: so long ago. `mine`: whoever asks is to find out.
    """

    since: str
    since_s: float
    age_s: float
    mine: bool


class StoreDown(Exception):
    """The store of quotas does not answer. `asked`: it may have done what it was asked, and nobody heard so."""

    def __init__(self, *, asked: bool = False) -> None:
        super().__init__()
        self.asked = asked


class Window:
    """Sixty seconds of counts."""

    __slots__ = ("_rows", "total")

    def __init__(self) -> None:
        # [second, count], oldest first.
        self._rows: deque[list[int]] = deque()
        self.total = 0

    def advance(self, second: int) -> None:
        """Forget what is older than a minute."""
        while self._rows and self._rows[0][0] <= second - WINDOW_S:
            self.total -= self._rows.popleft()[1]

    def add(self, second: int, count: int) -> None:
        """Count in the present second."""
        if self._rows and self._rows[-1][0] >= second:
            self._rows[-1][1] += count
        else:
            self._rows.append([second, count])
        self.total += count

    def give_back(self, second: int, count: int) -> None:
        """Take a count out of the second it was counted in, if that is remembered."""
        for row in reversed(self._rows):
            if row[0] == second:
                row[1] -= count
                self.total -= count
                return

    def wait_s(self, now_s: float, count: int, limit: int) -> float | None:
        """Until there is room; None: there never is."""
        left = self.total
        for second, counted in self._rows:
            left -= counted
            if left + count <= limit:
                return second + WINDOW_S - now_s
        return None

    def reset_s(self, now_s: float) -> float:
        """Until nothing of the present counts is left."""
        return self._rows[-1][0] + WINDOW_S - now_s if self._rows else 0.0


@dataclass(slots=True)
class _Tenant:
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    leases: set[str] = field(default_factory=set)
    # By calendar day or month, the present one and the one before: what was counted here, and what was before.
    budgets: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    # Whether the ledger has told what was before.
    known: bool = False

    def spent(self, period: str) -> int:
        """Tokens of a day or month."""
        return self.before.get(period, 0) + self.budgets.get(period, 0)


class MemoryStore:
    """Counts in this process; `file` keeps the budgets across restarts, and what it lost of them the ledger knows."""

    def __init__(self, wall_s: Callable[[], float], file: Path | None = None, *, ledger: bool = False) -> None:
        """`wall_s`: seconds since the epoch. `ledger`: there is one, and it will be asked."""
        self._wall_s = wall_s
        self._file = file
        self._saved_s = 0.0
        self._dirty = False
        self._tenants: dict[str, _Tenant] = {}
        self._began_s = wall_s()
        self._ledger = ledger
        kept = None if file is None else _read(file)
        # Nothing is known of what was used before this process.
        self._lost = ledger and kept is None
        for tenant, budgets in (kept or {}).items():
            self._tenants[tenant] = _Tenant(before=budgets)

    async def reserve(self, demand: Demand) -> Verdict:
        """Count a request if every limit has room for it, else count nothing."""
        now_s, quota = self._wall_s(), demand.quota
        second = int(now_s)
        day, month = periods(now_s)
        counted = self._tenants.setdefault(demand.tenant, _Tenant())
        if self._lost and not counted.known and quota.has_budget:
            raise BudgetsLost
        counted.requests.advance(second)
        counted.tokens.advance(second)
        refused, wait_s = self._judge(counted, demand, now_s, day, month)
        if refused is None:
            if quota.requests_per_minute is not None:
                counted.requests.add(second, 1)
            if quota.tokens_per_minute is not None:
                counted.tokens.add(second, demand.tokens)
            if quota.concurrent_requests is not None:
                counted.leases.add(demand.lease)
            self._spend(counted, quota, day, month, demand.tokens)
        return _verdict(counted, quota, now_s, refused, wait_s)

    async def look(self, tenant: str, quota: QuotaConfig, remembered: Mapping[str, int]) -> QuotaStanding:  # noqa: ARG002
        """Where a tenant stands, nothing counted."""
        now_s = self._wall_s()
        counted = self._tenants.get(tenant) or _Tenant()
        if self._lost and not counted.known and quota.has_budget:
            raise BudgetsLost
        counted.requests.advance(int(now_s))
        counted.tokens.advance(int(now_s))
        return QuotaStanding.of(quota, _verdict(counted, quota, now_s, None, 0.0), now_s)

    async def release(self, demand: Demand) -> None:
        """A request has ended, and what it used is not known yet."""
        counted = self._tenants.get(demand.tenant)
        if counted is not None:
            counted.leases.discard(demand.lease)

    async def settle(
        self,
        demand: Demand,
        verdict: Verdict,
        used_tokens: int,
        *,
        ended_s: float,  # noqa: ARG002 - all that it settles it has counted
        refund: bool,
    ) -> None:
        """What a request used is known."""
        self.charge(demand, verdict, used_tokens, refund=refund)

    async def begin(self, tenant: str) -> Lost | None:
        """What was used before this process is not known until the ledger has told it, where there is one."""
        if not self._ledger or self._tenants.setdefault(tenant, _Tenant()).known:
            return None
        return Lost("", self._began_s, math.inf, mine=True)

    async def fill(self, tenant: str, lost: Lost, spent: Mapping[str, int]) -> None:  # noqa: ARG002 - there is one
        """Take what was used before: of file and ledger each may have forgotten some of it."""
        counted = self._tenants.setdefault(tenant, _Tenant())
        for period, tokens in spent.items():
            counted.before[period] = max(tokens, counted.before.get(period, 0))
        counted.known = True
        self._dirty = True

    def remember(self, tenant: str, spent: Mapping[str, int]) -> None:
        """Count on from what another store had counted."""
        self._tenants.setdefault(tenant, _Tenant()).before = dict(spent)

    def forget_budgets(self) -> None:
        """Another store has been told what was counted here."""
        for counted in self._tenants.values():
            counted.budgets.clear()

    def owe(self, demand: Demand, verdict: Verdict, tokens: int) -> None:
        """Charge budgets for a request that was let through uncounted."""
        counted = self._tenants.setdefault(demand.tenant, _Tenant())
        self._spend(counted, demand.quota, verdict.day, verdict.month, tokens)

    def charge(self, demand: Demand, verdict: Verdict, used_tokens: int, *, refund: bool) -> None:
        """The same in one step."""
        counted = self._tenants.get(demand.tenant)
        if counted is None:
            return
        counted.leases.discard(demand.lease)
        if refund:
            counted.requests.give_back(verdict.second, 1)
        beyond = used_tokens - demand.tokens
        if demand.quota.tokens_per_minute is not None:
            if beyond > 0:
                counted.tokens.add(int(self._wall_s()), beyond)
            elif beyond:
                counted.tokens.give_back(verdict.second, -beyond)
        self._spend(counted, demand.quota, verdict.day, verdict.month, beyond)

    def budgets(self, tenant: str) -> dict[str, int]:
        """A tenant's tokens by calendar day and month."""
        counted = self._tenants.get(tenant)
        return {} if counted is None else {p: counted.spent(p) for p in sorted({*counted.before, *counted.budgets})}

    def save(self) -> None:
        """Write the budgets where they have changed. A disk in trouble stops no request; it is logged."""
        if self._file is None or not self._dirty:
            return
        self._saved_s, self._dirty = self._wall_s(), False
        try:
            _replace(self._file, {t: found for t in self._tenants if (found := self.budgets(t))})
        except OSError as error:
            log.warning("budgets are not written: a restart forgets them", reason=error.strerror)

    def _judge(
        self, counted: _Tenant, demand: Demand, now_s: float, day: str, month: str
    ) -> tuple[Limit | None, float | None]:
        quota, tokens = demand.quota, demand.tokens
        if quota.tokens_per_month is not None and counted.spent(month) + tokens > quota.tokens_per_month:
            return "month", until_next(now_s, "month")
        if quota.tokens_per_day is not None and counted.spent(day) + tokens > quota.tokens_per_day:
            return "day", until_next(now_s, "day")
        if quota.concurrent_requests is not None and len(counted.leases) >= quota.concurrent_requests:
            return "concurrent", CONCURRENT_WAIT_S
        limit = quota.requests_per_minute
        if limit is not None and counted.requests.total + 1 > limit:
            return "requests", counted.requests.wait_s(now_s, 1, limit)
        limit = quota.tokens_per_minute
        if limit is not None and counted.tokens.total + tokens > limit:
            return "tokens", counted.tokens.wait_s(now_s, tokens, limit)
        return None, 0.0

    def _spend(self, counted: _Tenant, quota: QuotaConfig, day: str, month: str, tokens: int) -> None:
        if not quota.has_budget:
            return
        # Both, whichever is limited: the other may be from the next reload on.
        for period in (day, month):
            counted.budgets[period] = counted.budgets.get(period, 0) + tokens
        for length in (len(day), len(month)):
            # Of those before the last two nobody asks again.
            for old in sorted(p for p in {*counted.budgets, *counted.before} if len(p) == length)[:-2]:
                counted.budgets.pop(old, None)
                counted.before.pop(old, None)
        self._dirty = True
        if self._wall_s() - self._saved_s >= SAVE_EVERY_S:
            self.save()


def _verdict(
    counted: _Tenant, quota: QuotaConfig, now_s: float, refused: Limit | None, wait_s: float | None
) -> Verdict:
    day, month = periods(now_s)
    return Verdict(
        refused,
        wait_s,
        counted.requests.total,
        counted.requests.reset_s(now_s),
        counted.tokens.total,
        counted.tokens.reset_s(now_s),
        len(counted.leases),
        0 if quota.tokens_per_day is None else counted.spent(day),
        0 if quota.tokens_per_month is None else counted.spent(month),
        int(now_s),
        day,
        month,
    )


def periods(now_s: float) -> tuple[str, str]:
    """The calendar day and month of a time, UTC: `2027-01-31`, `2027-01`."""
    day = datetime.fromtimestamp(now_s, UTC).date().isoformat()
    return day, month_of(day)


def month_of(day: str) -> str:
    """The month of a day, both as `periods` writes them."""
    return day[:7]


def until_next(now_s: float, period: Literal["day", "month"]) -> float:
    """Seconds until the next day or month begins, UTC."""
    now = datetime.fromtimestamp(now_s, UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        following = midnight + timedelta(days=1)
    else:
        following = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (following - now).total_seconds()


def _read(file: Path) -> dict[str, dict[str, int]] | None:
    try:
        found = json.loads(file.read_text())
        return {str(t): {str(p): int(n) for p, n in budgets.items()} for t, budgets in found.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError):
        # To go on without would give every tenant its whole budget again.
        raise ConfigError((f"{file}: it holds no budgets that can be read; put it right, or remove it",)) from None


def _replace(file: Path, content: object) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(file)
