"""Quotas counted in Redis, for all gateways: one script, one round trip, atomic.

The rules are `quota_store`'s, in Lua beside the data; the clock is Redis' own, so gateways need not agree on the time.
What a request holds of `concurrent_requests` is a lease: gateways renew those of running requests, and what a gateway
that died held is free again after LEASE_S. The mark of a lease outlives it by MARK_S, whether or not that limit is set:
a gateway that has not heard whether a reservation or a settlement was done asks for it once more, or undoes it, and by
the mark nothing is done twice (`arrears`).

A tenant's budgets are one key, so they are there or lost together. Where it is missing (a new Redis, FLUSHALL, an
eviction) it is begun anew, with the moment as `since`; what was used before that moment the ledger knows, and one
gateway adds it, once (`rebuild`). A request is charged on one side of that moment: one that was counted in this key, or
that ended after it, here; any other is in the ledger's sum.

Keys, all of a tenant in one slot of a cluster: `galerne:quota:{tenant}:requests` and `:tokens` (hashes, second to
count), `:leases` (sorted set, until when), `:budgets` (a hash: `since`, days, months, and `from:` a ledger once it is
in them), `:claim:` of a ledger (who asks it). `galerne:quota:store` tells this Redis from one of before. All expire.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from serving.admission.quota_store import (
    CONCURRENT_WAIT_S,
    BudgetsLost,
    Demand,
    Lost,
    QuotaStanding,
    Verdict,
    month_of,
    periods,
    until_next,
)
from serving.admission.redis_link import RedisLink
from serving.config import LIMITS, QuotaConfig

LEASE_S = 60
MARK_S = 3600
BUDGETS_LIFE_S = 62 * 86400
# Whoever asks the ledger has so long; then another gateway does.
CLAIM_LIFE_S = 45
# Days before the present one that requests may still be charged to.
DAYS_KEPT = 3
DAY_S = 86400
STORE_KEY: Final = "galerne:quota:store"

_STANDING: Final = """
-- KEYS: requests, tokens, leases, budgets. ARGV: limits of requests, tokens, concurrent, day, month (0: none), tokens
-- asked for, the day, the month, the ledger's name ('': there is none), what is remembered of day and month (-1:
-- nothing); to reserve also: lease, the lease's life in s, the budgets' life in s, the life of the lease's mark in s,
-- the oldest day and month that are kept
local t = redis.call('TIME')
local now = tonumber(t[1])
local at = now + tonumber(t[2]) / 1e6
local limit = {}
for i = 1, 5 do limit[i] = tonumber(ARGV[i]) end
local asked = tonumber(ARGV[6])

local function window(key, need, most)
  local rows = redis.call('HGETALL', key)
  local live, sum, newest = {}, 0, 0
  for i = 1, #rows, 2 do
    local second, count = tonumber(rows[i]), tonumber(rows[i + 1])
    if second <= now - 61 then
      redis.call('HDEL', key, rows[i])
    else
      live[#live + 1] = {second, count}
      sum = sum + count
      if second > newest then newest = second end
    end
  end
  local wait = 0
  if sum + need > most then
    table.sort(live, function(a, b) return a[1] < b[1] end)
    wait = -1
    local left = sum
    for _, row in ipairs(live) do
      left = left - row[2]
      if left + need <= most then wait = row[1] + 61 - at break end
    end
  end
  local reset = 0
  if newest > 0 then reset = newest + 61 - at end
  return {sum = sum, full = sum + need > most, wait = wait, reset = reset}
end

local none = {sum = 0, full = false, wait = 0, reset = 0}
local requests, tokens = none, none
if limit[1] > 0 then requests = window(KEYS[1], 1, limit[1]) end
if limit[2] > 0 then tokens = window(KEYS[2], asked, limit[2]) end
local running, day, month = 0, 0, 0
if limit[3] > 0 then
  running = redis.call('ZCOUNT', KEYS[3], '(' .. now, '+inf')
end
local budgets, since, known = limit[4] > 0 or limit[5] > 0, '', 1
if budgets then
  local found = redis.call('HMGET', KEYS[4], 'since', ARGV[7], ARGV[8], 'from:' .. ARGV[9])
  since, day, month = found[1] or '', tonumber(found[2] or 0), tonumber(found[3] or 0)
  if ARGV[9] ~= '' and not found[4] then
    local was_day, was_month = tonumber(ARGV[10]), tonumber(ARGV[11])
    known = 0
    if (limit[4] > 0 and was_day < 0) or (limit[5] > 0 and was_month < 0) then known = -1 end
    day, month = day + math.max(0, was_day), month + math.max(0, was_month)
  end
end
local function ms(s) if s < 0 then return -1 end return math.ceil(s * 1000) end
local function answer(refused, wait)
  if limit[4] == 0 then day = 0 end
  if limit[5] == 0 then month = 0 end
  return {
    refused, ms(wait), requests.sum, ms(requests.reset), tokens.sum, ms(tokens.reset), running, day, month, now, known,
    since,
  }
end
"""

_LOOK: Final = (
    _STANDING
    + """
return answer(0, 0)
"""
)

_RESERVE: Final = (
    _STANDING
    + """
if budgets and since == '' then
  since = string.format('%d.%06d', t[1], t[2])
  redis.call('HSET', KEYS[4], 'since', since)
  redis.call('EXPIRE', KEYS[4], ARGV[14])
end
if known < 0 then return answer(0, 0) end
local refused, wait = 0, 0
if limit[5] > 0 and month + asked > limit[5] then refused = 5
elseif limit[4] > 0 and day + asked > limit[4] then refused = 4
elseif limit[3] > 0 and running >= limit[3] then refused = 3
elseif requests.full then refused = 1 wait = requests.wait
elseif tokens.full then refused = 2 wait = tokens.wait
end
if refused == 0 then
  if limit[1] > 0 then
    redis.call('HINCRBY', KEYS[1], now, 1)
    redis.call('EXPIRE', KEYS[1], 62)
    requests.sum = requests.sum + 1
    requests.reset = now + 61 - at
  end
  if limit[2] > 0 then
    redis.call('HINCRBY', KEYS[2], now, asked)
    redis.call('EXPIRE', KEYS[2], 62)
    tokens.sum = tokens.sum + asked
    tokens.reset = now + 61 - at
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[15]))
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[13]), ARGV[12])
  redis.call('EXPIRE', KEYS[3], ARGV[13] + ARGV[15])
  if limit[3] > 0 then running = running + 1 end
  if budgets then
    -- Both, whichever is limited: the other may be from the next reload on.
    local first = redis.call('HEXISTS', KEYS[4], ARGV[7]) == 0
    redis.call('HINCRBY', KEYS[4], ARGV[7], asked)
    redis.call('HINCRBY', KEYS[4], ARGV[8], asked)
    redis.call('EXPIRE', KEYS[4], ARGV[14])
    day, month = day + asked, month + asked
    if first then
      for _, name in ipairs(redis.call('HKEYS', KEYS[4])) do
        if (#name == #ARGV[16] and name < ARGV[16]) or (#name == #ARGV[17] and name < ARGV[17]) then
          redis.call('HDEL', KEYS[4], name)
        end
      end
    end
  end
end
return answer(refused, wait)
"""
)

_SETTLE: Final = """
-- KEYS as above. ARGV: 1 for each limit that is set, else 0; lease, second, tokens beyond the reserved, 1 for a refund,
-- the budgets' life in s, 1 where it may have been done before: then only if the lease's mark is there; the lease's
-- life in s, the day, the month, the budgets' `since` when it was reserved, all its tokens, when it ended, the ledger's
-- name. A second of 0 is not known: the one in which the lease began; nor is a `since` of ''
local t = redis.call('TIME')
local now = t[1]
local second, beyond = ARGV[7], tonumber(ARGV[8])
local till = redis.call('ZSCORE', KEYS[3], ARGV[6])
if till then redis.call('ZREM', KEYS[3], ARGV[6]) elseif ARGV[11] == '1' then return 0 end
if second == '0' and till then second = string.format('%d', tonumber(till) - tonumber(ARGV[12])) end
if ARGV[9] == '1' and redis.call('HEXISTS', KEYS[1], second) == 1 then redis.call('HINCRBY', KEYS[1], second, -1) end
if ARGV[2] == '1' then
  if beyond > 0 then
    redis.call('HINCRBY', KEYS[2], now, beyond)
    redis.call('EXPIRE', KEYS[2], 62)
  elseif beyond < 0 and redis.call('HEXISTS', KEYS[2], second) == 1 then
    redis.call('HINCRBY', KEYS[2], second, beyond)
  end
end
if ARGV[4] == '1' or ARGV[5] == '1' then
  local since = redis.call('HGET', KEYS[4], 'since')
  local charged = 0
  if since and (since == ARGV[15] or (ARGV[15] == '' and till)) then
    charged = beyond
  elseif ARGV[18] == '' or (since and tonumber(ARGV[17]) >= tonumber(since)) then
    -- What it had reserved is gone, and no ledger's sum has it.
    charged = tonumber(ARGV[16])
  end
  if charged ~= 0 then
    redis.call('HSETNX', KEYS[4], 'since', string.format('%d.%06d', t[1], t[2]))
    redis.call('HINCRBY', KEYS[4], ARGV[13], charged)
    redis.call('HINCRBY', KEYS[4], ARGV[14], charged)
    redis.call('EXPIRE', KEYS[4], ARGV[10])
  end
end
return 0
"""

_RELEASE: Final = """
-- KEYS: leases. ARGV: a lease. Its mark stays: what the request used is told later
redis.call('ZADD', KEYS[1], 'XX', redis.call('TIME')[1], ARGV[1])
return 0
"""

_OWE: Final = """
-- KEYS as above. ARGV: the debt's name, its tokens, the budgets' life in s, the life of its mark in s: it is charged
-- once; the day, the month, when its requests had ended, the ledger's name
local t = redis.call('TIME')
if redis.call('ZADD', KEYS[3], 'NX', t[1], ARGV[1]) == 0 then return 0 end
if redis.call('TTL', KEYS[3]) < tonumber(ARGV[4]) then redis.call('EXPIRE', KEYS[3], ARGV[4]) end
local since = redis.call('HGET', KEYS[4], 'since')
if ARGV[8] ~= '' and (not since or tonumber(ARGV[7]) < tonumber(since)) then return 0 end
redis.call('HSETNX', KEYS[4], 'since', string.format('%d.%06d', t[1], t[2]))
redis.call('HINCRBY', KEYS[4], ARGV[5], ARGV[2])
redis.call('HINCRBY', KEYS[4], ARGV[6], ARGV[2])
redis.call('EXPIRE', KEYS[4], ARGV[3])
return 0
"""

_BEGIN: Final = """
-- KEYS: budgets, the claim. ARGV: the ledger's name, who asks, the claim's life in s, the budgets' life in s
local t = redis.call('TIME')
local begun = string.format('%d.%06d', t[1], t[2])
redis.call('HSETNX', KEYS[1], 'since', begun)
redis.call('EXPIRE', KEYS[1], ARGV[4])
local since = redis.call('HGET', KEYS[1], 'since')
if redis.call('HEXISTS', KEYS[1], 'from:' .. ARGV[1]) == 1 then return {since, 1, 0, 0} end
local mine = redis.call('SET', KEYS[2], ARGV[2], 'NX', 'EX', ARGV[3]) or redis.call('GET', KEYS[2]) == ARGV[2]
return {since, 0, mine and 1 or 0, math.floor((tonumber(begun) - tonumber(since)) * 1000)}
"""

_FILL: Final = """
-- KEYS: budgets. ARGV: their `since`, the ledger's name, their life in s, then days and months, each with its tokens
if redis.call('HGET', KEYS[1], 'since') ~= ARGV[1] then return 0 end
if redis.call('HSETNX', KEYS[1], 'from:' .. ARGV[2], 1) == 0 then return 0 end
for i = 4, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""

_RENEW: Final = """
-- KEYS: leases. ARGV: their life in s, the life of their marks in s, then those that run
local till = tonumber(redis.call('TIME')[1]) + tonumber(ARGV[1])
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], 'XX', till, ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1] + ARGV[2])
return 0
"""


class RedisStore:
    """Counts in Redis; raises StoreDown while that does not answer."""

    def __init__(
        self, link: RedisLink, wall_s: Callable[[], float] = time.time, *, ledger: str = "", name: str = ""
    ) -> None:
        """`wall_s` says only which day and month it is. `ledger`: what the ledger is called that will be asked for what
        this store has forgotten, "": there is none; `name`: this gateway's, never used before.
        """
        self._link = link
        self._ledger = ledger
        self._name = name
        self.wall_s = wall_s
        scripts = (_RESERVE, _SETTLE, _RENEW, _LOOK, _OWE, _RELEASE, _BEGIN, _FILL)
        of = [link.redis.register_script(s) for s in scripts]
        self._reserve, self._settle, self._renew, self._look, self._owe, self._release, self._begin, self._fill = of

    async def reserve(self, demand: Demand) -> Verdict:
        """Count a request if every limit has room for it, else count nothing."""
        return await self.reserve_at(self.wall_s(), demand)

    async def reserve_at(self, now_s: float, demand: Demand) -> Verdict:
        """The same, by the budgets of this moment."""
        oldest_day, _ = periods(now_s - DAYS_KEPT * DAY_S)
        args = [*self._standing(now_s, demand.quota, demand.tokens, demand.remembered), demand.lease, LEASE_S]
        args += [BUDGETS_LIFE_S, MARK_S, oldest_day, month_of(oldest_day)]
        keys = _keys(demand.tenant)
        found = await self._link.call(lambda _: self._reserve(keys=keys, args=args))
        verdict, known = _verdict(found, now_s)
        if known < 0:
            raise BudgetsLost
        return verdict

    async def look(self, tenant: str, quota: QuotaConfig, remembered: Mapping[str, int]) -> QuotaStanding:
        """Where a tenant stands, nothing counted."""
        now_s = self.wall_s()
        keys, args = _keys(tenant), self._standing(now_s, quota, 0, remembered)
        found = await self._link.call(lambda _: self._look(keys=keys, args=args))
        verdict, known = _verdict(found, now_s)
        if known < 0:
            raise BudgetsLost
        return QuotaStanding.of(quota, verdict, now_s)

    async def release(self, demand: Demand) -> None:
        """A request has ended, and what it used is not known yet."""
        keys = [_keys(demand.tenant)[2]]
        await self._link.call(lambda _: self._release(keys=keys, args=[demand.lease]))

    async def settle(
        self,
        demand: Demand,
        verdict: Verdict,
        used_tokens: int,
        *,
        ended_s: float,
        refund: bool,
        again: bool = False,
    ) -> None:
        """What a request used is known; `again`: only if it was counted and has not been settled before."""
        flags = [int(limit is not None) for limit in demand.quota.by_limit.values()]
        args = [*flags, demand.lease, verdict.second, used_tokens - demand.tokens, int(refund)]
        args += [BUDGETS_LIFE_S, int(again), LEASE_S, verdict.day, verdict.month, verdict.since]
        args += [used_tokens, ended_s, self._ledger]
        keys = _keys(demand.tenant)
        await self._link.call(lambda _: self._settle(keys=keys, args=args))

    async def owe(self, name: str, tenant: str, day: str, tokens: int, ended_s: float) -> None:
        """Charge the budgets of a day and its month what was used while this store was away; once for each name.

        Of requests that had ended before this store began to count the ledger tells it.
        """
        args = [name, tokens, BUDGETS_LIFE_S, MARK_S, day, month_of(day), ended_s, self._ledger]
        keys = _keys(tenant)
        await self._link.call(lambda _: self._owe(keys=keys, args=args))

    async def renew(self, leases: Iterable[tuple[str, list[str]]]) -> None:
        """Keep what running requests hold: (tenant, its leases)."""
        for tenant, running in leases:
            await self._keep(_keys(tenant)[2], [LEASE_S, MARK_S, *running])

    async def begin(self, tenant: str) -> Lost | None:
        """Begin to count a tenant's budgets; None where it is known what was used before."""
        if not self._ledger:
            return None
        budgets = _keys(tenant)[3]
        keys = [budgets, f"{_start(tenant)}claim:{self._ledger}"]
        args = [self._ledger, self._name, CLAIM_LIFE_S, BUDGETS_LIFE_S]
        since, known, mine, age_ms = await self._link.call(lambda _: self._begin(keys=keys, args=args))
        if int(known):
            return None
        return Lost(_text(since), float(since), int(age_ms) / 1000, mine=bool(int(mine)))

    async def fill(self, tenant: str, lost: Lost, spent: Mapping[str, int]) -> None:
        """Take what was used before, by day and month; once, whoever tells it."""
        args = [lost.since, self._ledger, BUDGETS_LIFE_S]
        args += [value for period in spent.items() for value in period]
        keys = [_keys(tenant)[3]]
        await self._link.call(lambda _: self._fill(keys=keys, args=args))

    async def which(self) -> str:
        """What tells this Redis, with what it holds, from one of before."""

        async def name(redis: Any) -> Any:
            await redis.set(STORE_KEY, uuid.uuid4().hex, nx=True, ex=BUDGETS_LIFE_S)
            return await redis.get(STORE_KEY)

        return _text(await self._link.call(name) or "")

    def _standing(self, now_s: float, quota: QuotaConfig, tokens: int, remembered: Mapping[str, int]) -> list[Any]:
        limits = [limit or 0 for limit in quota.by_limit.values()]
        now = periods(now_s)
        return [*limits, tokens, *now, self._ledger, *(remembered.get(period, -1) for period in now)]

    async def _keep(self, key: str, args: list[Any]) -> None:
        await self._link.call(lambda _: self._renew(keys=[key], args=args))


def _verdict(found: Sequence[Any], now_s: float) -> tuple[Verdict, int]:
    """A script's answer, and whether budgets are known: 1, 0 where something is remembered, -1 where nothing is."""
    day, month = periods(now_s)
    *numbers, since = found
    refused, wait_ms, *rest = (int(value) for value in numbers)
    requests, requests_ms, tokens, tokens_ms, running, by_day, by_month, second, known = rest
    limit = LIMITS[refused - 1] if refused else None
    wait_s: float | None = None if wait_ms < 0 else wait_ms / 1000
    if limit == "concurrent":
        wait_s = CONCURRENT_WAIT_S
    elif limit in {"day", "month"}:
        wait_s = until_next(now_s, "day" if limit == "day" else "month")
    verdict = Verdict(
        limit,
        wait_s,
        requests,
        requests_ms / 1000,
        tokens,
        tokens_ms / 1000,
        running,
        by_day,
        by_month,
        second,
        day,
        month,
        _text(since),
        known > 0,
    )
    return verdict, known


def _start(tenant: str) -> str:
    return f"galerne:quota:{{{tenant}}}:"


def _keys(tenant: str) -> list[Any]:
    return [_start(tenant) + name for name in ("requests", "tokens", "leases", "budgets")]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
