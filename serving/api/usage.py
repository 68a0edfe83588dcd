"""GET /v1/usage: what the key's tenant has used, what is left of its quota, and what of it waits; of nobody else.

Names follow OpenAI's usage API (/v1/organization/usage/completions) where it has them: a page of buckets with results.
The tenant is the identity's, never a parameter's. Everything a client sends is read by an allow-list before the ledger
is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl

import msgspec
import structlog

from serving.admission.quota_store import QuotaStanding
from serving.api.auth import Identity
from serving.api.ops import Answer
from serving.config import LIMITS, QuotaConfig
from serving.errors import BadRequest, RateLimited, RequestError, Unavailable
from serving.metering.asking import LedgerQuestions
from serving.metering.moments import moment
from serving.metering.questions import MOST_ROWS, WITHIN_S, Group, NoAnswer, Question, Sums

DAY_S: Final = 86_400
MOST_DAYS: Final = 366
MOST_QUERY_BYTES: Final = 4096
MOST_FIELDS: Final = 32
MOST_MODELS: Final = 16
MODEL_LENGTH: Final = 128
# Ten digits of seconds reach to the year 2286.
SECONDS_LENGTH: Final = 10
PARAMETERS: Final = ("from", "to", "model", "group_by")
# As OpenAI calls it, and as the ledger does.
GROUPS: Final[dict[str, Group]] = {"day": "day", "model": "model", "api_key_id": "key_id"}
BUSY_RETRY_S: Final = 1
AWAY_RETRY_S: Final = 5
# Trouble that goes on is logged once in so long.
REPEAT_S: Final = 60.0
RESULT: Final = "galerne.usage.result"
# By OpenAI's name, or one like it, the ledger's figure.
RESULT_COUNTS: Final = {
    "input_tokens": "prompt_tokens",
    "input_cached_tokens": "cached_tokens",
    "output_tokens": "completion_tokens",
    "num_model_requests": "requests",
    "num_estimated_requests": "estimated",
}

log = structlog.get_logger("galerne.usage")


class Limits(Protocol):
    """The quotas of all tenants."""

    async def standing(self, tenant: str) -> tuple[QuotaConfig, QuotaStanding | None]:
        """A tenant's limits and how much of them is used; None where that is not known."""


class Lanes(Protocol):
    """A model's fair queue."""

    def counts(self, tenant: str) -> tuple[int, int]:
        """A tenant's requests that wait, and those in flight."""


class ModelHold(Protocol):
    """A model's hold."""

    @property
    def queue(self) -> Lanes: ...


class Holds(Protocol):
    """The holds of all models."""

    def items(self) -> Iterable[tuple[str, ModelHold]]:
        """Every model with its hold."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks for: requests that began in [since_s, until_s), seconds since 1970."""

    since_s: int
    until_s: int
    by: tuple[Group, ...]
    models: tuple[str, ...]


class TenantUsage:
    """Answers for one gateway. `ledger` None: nobody is billed, and nothing is known."""

    def __init__(
        self,
        ledger: LedgerQuestions | None,
        limits: Limits,
        holds: Holds,
        *,
        wall: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._holds = holds
        self._wall = wall
        self._clock = clock
        self._said_s = -REPEAT_S

    async def answer(self, identity: Identity, query: bytes) -> Answer:
        """The tenant's usage; raises BadRequest, RateLimited or Unavailable."""
        asked = read(query, self._wall())
        sums, covers = await self._sums(identity.tenant_id, asked)
        quota, standing = await self._limits.standing(identity.tenant_id)
        document = {
            "object": "page",
            "data": buckets(asked, sums),
            "has_more": False,
            "next_page": None,
            "covers": covers,
            "quota": quota_document(quota, standing),
            "queue": self._queue(identity.tenant_id),
        }
        body = msgspec.json.encode(document)
        kind = (b"content-type", b"application/json")
        return Answer(200, (kind, (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")), body)

    def close(self) -> None:
        """Ask no more."""
        if self._ledger is not None:
            self._ledger.close()

    async def _sums(self, tenant: str, asked: Asked) -> tuple[tuple[Sums, ...], str]:
        if self._ledger is None:
            raise refusal(NoAnswer("away"))
        question = Question(
            tenant=tenant, since_s=asked.since_s, until_s=asked.until_s, by=asked.by, models=asked.models
        )
        try:
            return await self._ledger.ask(question), "cluster" if self._ledger.covers_cluster else "host"
        except NoAnswer as trouble:
            if trouble.trouble in {"away", "slow"} and self._clock() - self._said_s >= REPEAT_S:
                self._said_s = self._clock()
                log.warning("the ledger was asked and does not answer", tenant=tenant, reason=trouble.reason)
            raise refusal(trouble) from None

    def _queue(self, tenant: str) -> dict[str, Any]:
        found = [(model, *hold.queue.counts(tenant)) for model, hold in self._holds.items()]
        return {
            "waiting": sum(waiting for _, waiting, _ in found),
            "in_flight": sum(in_flight for _, _, in_flight in found),
            "models": [
                {"model": model, "waiting": waiting, "in_flight": in_flight}
                for model, waiting, in_flight in found
                if waiting or in_flight
            ],
        }


def read(query: bytes, now_s: float) -> Asked:
    """What a query string asks for; raises BadRequest.

    Without `to` it is until now, without `from` since the beginning of the month that `to` ends.
    """
    if len(query) > MOST_QUERY_BYTES:
        raise BadRequest(f"The query is longer than {MOST_QUERY_BYTES} bytes.")
    try:
        pairs = parse_qsl(
            query.decode(),
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=MOST_FIELDS,
        )
    except ValueError:
        raise BadRequest(
            f"The query cannot be read: at most {MOST_FIELDS} fields, as name=value&name=value, in UTF-8."
        ) from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in PARAMETERS:
            raise BadRequest(
                f"Unknown parameter '{name[:64]}'. Known are {', '.join(PARAMETERS)}.",
                code="unknown_parameter",
                param=name[:64],
            )
        fields.setdefault(name, []).append(value)
    # A request that began in this second is among them.
    until_s = _seconds("to", fields.get("to"), int(now_s) + 1)
    since_s = _seconds("from", fields.get("from"), _month_of(until_s - 1))
    if since_s >= until_s:
        raise BadRequest("'from' must lie before 'to'.", param="from")
    if until_s - since_s > MOST_DAYS * DAY_S:
        raise BadRequest(f"From 'from' to 'to' may be {MOST_DAYS} days at most.", param="from")
    return Asked(since_s, until_s, _groups(fields.get("group_by", [])), _models(fields.get("model", [])))


def buckets(asked: Asked, sums: Iterable[Sums]) -> list[dict[str, Any]]:
    """Sums as buckets of time with their results: one a day (UTC) where they are by day, else one."""
    if "day" not in asked.by:
        return [_bucket(asked.since_s, asked.until_s, sums)]
    by_day: dict[str, list[Sums]] = {}
    for group in sums:
        by_day.setdefault(group.day or "", []).append(group)
    found = []
    start_s = asked.since_s
    while start_s < asked.until_s:
        end_s = min((start_s // DAY_S + 1) * DAY_S, asked.until_s)
        found.append(_bucket(start_s, end_s, by_day.get(time.strftime("%Y-%m-%d", time.gmtime(start_s)), ())))
        start_s = end_s
    return found


def quota_document(quota: QuotaConfig, standing: QuotaStanding | None) -> dict[str, Any]:
    """Every limit that is set, by its name in the configuration."""
    found = {}
    for limit, (name, most) in zip(LIMITS, quota, strict=True):
        if most is None:
            continue
        used = None if standing is None else standing.used[limit]
        resets_s = None if standing is None else standing.resets_s[limit]
        found[name] = {
            "limit": most,
            "used": used,
            "remaining": None if used is None else max(0, most - used),
            "resets_in_s": None if resets_s is None else round(resets_s, 3),
        }
    return found


def refusal(trouble: NoAnswer) -> RequestError:
    """Why there are no figures, as a client is told."""
    if trouble.trouble == "busy":
        return RateLimited(
            "A question about your organisation's usage is being answered: ask one after the other.",
            retry_after_s=BUSY_RETRY_S,
        )
    if trouble.trouble == "many":
        return BadRequest(
            f"The answer would have more than {MOST_ROWS} results. Ask for fewer days or models, or group by less.",
            param="group_by",
        )
    if trouble.trouble == "slow":
        return Unavailable(
            f"Usage could not be summed within {WITHIN_S:g} s. Try again, or ask for fewer days.",
            code="usage_unavailable",
            retry_after_s=AWAY_RETRY_S,
        )
    return Unavailable(
        "Usage cannot be read at the moment. It is kept all the same. Try again shortly.",
        code="usage_unavailable",
        retry_after_s=AWAY_RETRY_S,
    )


def _bucket(start_s: int, end_s: int, sums: Iterable[Sums]) -> dict[str, Any]:
    return {
        "object": "bucket",
        "start_time": start_s,
        "end_time": end_s,
        "results": [
            {
                "object": RESULT,
                **{name: getattr(group, figure) for name, figure in RESULT_COUNTS.items()},
                "model": group.model,
                "api_key_id": group.key_id,
            }
            for group in sums
        ],
    }


def _seconds(name: str, values: list[str] | None, default: int) -> int:
    if values is None:
        return default
    if len(values) > 1:
        raise BadRequest(f"'{name}' may stand once.", param=name)
    text = values[0]
    try:
        if text.isascii() and text.isdigit() and len(text) <= SECONDS_LENGTH:
            return int(text)
        found_s = moment(text).timestamp()
    except (ValueError, OverflowError):
        found_s = -1.0
    if not 0 <= found_s < 10**SECONDS_LENGTH or not found_s.is_integer():
        raise BadRequest(
            f"'{name}' must be a day (2026-11-01), a moment (2026-11-01T12:00:00Z; in a query '+' is written %2B) or "
            "seconds since 1970, in whole seconds.",
            param=name,
        )
    return int(found_s)


def _groups(values: list[str]) -> tuple[Group, ...]:
    names = [name for value in values for name in value.split(",")]
    for name in names:
        if name not in GROUPS:
            raise BadRequest(f"'group_by' takes {', '.join(GROUPS)}.", param="group_by")
    # The order of the answer does not depend on the order of asking.
    return tuple(group for name, group in GROUPS.items() if name in names)


def _models(values: list[str]) -> tuple[str, ...]:
    if len(values) > MOST_MODELS:
        raise BadRequest(f"'model' may stand {MOST_MODELS} times at most.", param="model")
    for value in values:
        if not value or len(value) > MODEL_LENGTH or not value.isprintable():
            raise BadRequest(f"'model' must be a model's id: 1 to {MODEL_LENGTH} printable characters.", param="model")
    return tuple(dict.fromkeys(values))


def _month_of(at_s: int) -> int:
    """The beginning of the calendar month (UTC) of a time."""
    return at_s // DAY_S * DAY_S - (time.gmtime(at_s).tm_mday - 1) * DAY_S
