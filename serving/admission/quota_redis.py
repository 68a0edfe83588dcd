"""Quotas counted in Redis, for all gateways: one script, one round trip, atomic.

The rules are `quota_store`'s, in Lua beside the data; the clock is Redis' own, so gateways need not agree on the time.
What a request holds of `concurrent_requests` is a lease: gateways renew those of running requests, and what a gateway
that died held is free again after LEASE_S. The mark of a lease outlives it by MARK_S, whether or not that limit is set:
a gateway that has not heard whether a reservation or a settlement was done asks for it once more, or undoes it, and by
the mark nothing is done twice (`arrears`).

Keys, all of a tenant in one slot of a cluster: `galerne:quota:{tenant}:requests` and `:tokens` (hashes, second to
count), `:leases` (sorted set, until when), `:day:2027-01-31` and `:month:2027-01` (numbers). All expire.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from serving.admission.quota_store import (
    CONCURRENT_WAIT_S,
    Demand,
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
DAY_LIFE_S, MONTH_LIFE_S = 3 * 86400, 62 * 86400

_STANDING: Final = """
-- KEYS: requests, tokens, leases, day, month. ARGV: limits of requests, tokens, concurrent, day, month (0: none),
-- tokens asked for; to reserve also: lease, the lease's life in s, the budgets' lives in s, the life of its mark in s
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
if limit[4] > 0 then day = tonumber(redis.call('GET', KEYS[4]) or 0) end
if limit[5] > 0 then month = tonumber(redis.call('GET', KEYS[5]) or 0) end
local function ms(s) if s < 0 then return -1 end return math.ceil(s * 1000) end
local function answer(refused, wait)
  return {refused, ms(wait), requests.sum, ms(requests.reset), tokens.sum, ms(tokens.reset), running, day, month, now}
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
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[11]))
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[8]), ARGV[7])
  redis.call('EXPIRE', KEYS[3], ARGV[8] + ARGV[11])
  if limit[3] > 0 then running = running + 1 end
  if limit[4] > 0 then day = redis.call('INCRBY', KEYS[4], asked) redis.call('EXPIRE', KEYS[4], ARGV[9]) end
  if limit[5] > 0 then month = redis.call('INCRBY', KEYS[5], asked) redis.call('EXPIRE', KEYS[5], ARGV[10]) end
end
return answer(refused, wait)
"""
)

_SETTLE: Final = """
-- KEYS as above. ARGV: 1 for each limit that is set, else 0; lease, second, tokens beyond the reserved, 1 for a refund,
-- the budgets' lives in s, 1 where it may have been done before: then only if the lease's mark is there; the lease's
-- life in s. A second of 0 is not known: the one in which the lease began
local now = redis.call('TIME')[1]
local second, beyond = ARGV[7], tonumber(ARGV[8])
local till = redis.call('ZSCORE', KEYS[3], ARGV[6])
if till then redis.call('ZREM', KEYS[3], ARGV[6]) elseif ARGV[12] == '1' then return 0 end
if second == '0' and till then second = string.format('%d', tonumber(till) - tonumber(ARGV[13])) end
if ARGV[9] == '1' and redis.call('HEXISTS', KEYS[1], second) == 1 then redis.call('HINCRBY', KEYS[1], second, -1) end
if ARGV[2] == '1' then
  if beyond > 0 then
    redis.call('HINCRBY', KEYS[2], now, beyond)
    redis.call('EXPIRE', KEYS[2], 62)
  elseif beyond < 0 and redis.call('HEXISTS', KEYS[2], second) == 1 then
    redis.call('HINCRBY', KEYS[2], second, beyond)
  end
end
for i = 4, 5 do
  if ARGV[i] == '1' and beyond ~= 0 then
    redis.call('INCRBY', KEYS[i], beyond)
    redis.call('EXPIRE', KEYS[i], ARGV[6 + i])
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
-- KEYS as above. ARGV: 1 for each budget that is set, else 0; the debt's name, its tokens, the budgets' lives in s, the
-- life of its mark in s: it is charged once
local now = tonumber(redis.call('TIME')[1])
if redis.call('ZADD', KEYS[3], 'NX', now, ARGV[3]) == 0 then return 0 end
if redis.call('TTL', KEYS[3]) < tonumber(ARGV[7]) then redis.call('EXPIRE', KEYS[3], ARGV[7]) end
for i = 1, 2 do
  if ARGV[i] == '1' then
    redis.call('INCRBY', KEYS[3 + i], ARGV[4])
    redis.call('EXPIRE', KEYS[3 + i], ARGV[4 + i])
  end
end
return 0
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

    def __init__(self, link: RedisLink, wall_s: Callable[[], float] = time.time) -> None:
        """`wall_s` says only which day and month it is."""
        self._link = link
        self.wall_s = wall_s
        scripts = (_RESERVE, _SETTLE, _RENEW, _LOOK, _OWE, _RELEASE)
        scripts_of = (link.redis.register_script(s) for s in scripts)
        self._reserve, self._settle, self._renew, self._look, self._owe, self._release = scripts_of

    async def reserve(self, demand: Demand) -> Verdict:
        """Count a request if every limit has room for it, else count nothing."""
        return await self.reserve_at(self.wall_s(), demand)

    async def reserve_at(self, now_s: float, demand: Demand) -> Verdict:
        """The same, by the budgets of this moment."""
        day, month = periods(now_s)
        limits = [limit or 0 for limit in demand.quota.by_limit.values()]
        args = [*limits, demand.tokens, demand.lease, LEASE_S, DAY_LIFE_S, MONTH_LIFE_S, MARK_S]
        keys = _keys(demand.tenant, day, month)
        return _verdict(await self._link.call(lambda _: self._reserve(keys=keys, args=args)), now_s)

    async def look(self, tenant: str, quota: QuotaConfig) -> QuotaStanding:
        """Where a tenant stands, nothing counted."""
        now_s = self.wall_s()
        keys, args = _keys(tenant, *periods(now_s)), [*(limit or 0 for limit in quota.by_limit.values()), 0]
        found = await self._link.call(lambda _: self._look(keys=keys, args=args))
        return QuotaStanding.of(quota, _verdict(found, now_s), now_s)

    async def release(self, demand: Demand) -> None:
        """A request has ended, and what it used is not known yet."""
        keys = [_keys(demand.tenant, "", "")[2]]
        await self._link.call(lambda _: self._release(keys=keys, args=[demand.lease]))

    async def settle(
        self, demand: Demand, verdict: Verdict, used_tokens: int, *, refund: bool, again: bool = False
    ) -> None:
        """What a request used is known; `again`: only if it was counted and has not been settled before."""
        flags = [int(limit is not None) for limit in demand.quota.by_limit.values()]
        beyond = used_tokens - demand.tokens
        args = [
            *flags,
            demand.lease,
            verdict.second,
            beyond,
            int(refund),
            DAY_LIFE_S,
            MONTH_LIFE_S,
            int(again),
            LEASE_S,
        ]
        keys = _keys(demand.tenant, verdict.day, verdict.month)
        await self._link.call(lambda _: self._settle(keys=keys, args=args))

    async def owe(self, name: str, tenant: str, quota: QuotaConfig, day: str, tokens: int) -> None:
        """Charge the budgets of a day and its month what was used while this store was away; once for each name."""
        by_budget = (quota.tokens_per_day, quota.tokens_per_month)
        args = [*(int(limit is not None) for limit in by_budget), name, tokens, DAY_LIFE_S, MONTH_LIFE_S, MARK_S]
        keys = _keys(tenant, day, month_of(day))
        await self._link.call(lambda _: self._owe(keys=keys, args=args))

    async def renew(self, leases: Iterable[tuple[str, list[str]]]) -> None:
        """Keep what running requests hold: (tenant, its leases)."""
        for tenant, running in leases:
            await self._keep(_keys(tenant, "", "")[2], [LEASE_S, MARK_S, *running])

    async def _keep(self, key: str, args: list[Any]) -> None:
        await self._link.call(lambda _: self._renew(keys=[key], args=args))


def _verdict(found: Iterable[Any], now_s: float) -> Verdict:
    """A script's answer."""
    day, month = periods(now_s)
    refused, wait_ms, *rest = (int(value) for value in found)
    requests, requests_ms, tokens, tokens_ms, running, by_day, by_month, second = rest
    limit = LIMITS[refused - 1] if refused else None
    wait_s: float | None = None if wait_ms < 0 else wait_ms / 1000
    if limit == "concurrent":
        wait_s = CONCURRENT_WAIT_S
    elif limit in {"day", "month"}:
        wait_s = until_next(now_s, "day" if limit == "day" else "month")
    return Verdict(
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
    )


def _keys(tenant: str, day: str, month: str) -> list[Any]:
    start = f"galerne:quota:{{{tenant}}}:"
    return [start + name for name in ("requests", "tokens", "leases", f"day:{day}", f"month:{month}")]
