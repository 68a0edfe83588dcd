"""What a tenant may use, and where that is counted."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from serving.config.base import Frozen, PositiveInt

MEMORY, REDIS, REDIS_TLS = "memory", "redis", "rediss"
# The store's password where its URL has none, so that none need stand in the file (a Secret, on Kubernetes).
ENV_LIMITS_STORE_PASSWORD: Final = "GALERNE_LIMITS_STORE_PASSWORD"  # noqa: S105 - its name
# The limits by their short names, as metrics and errors have them.
Limit = Literal["requests", "tokens", "concurrent", "day", "month"]
LIMITS: Final[tuple[Limit, ...]] = get_args(Limit)
# While the shared store does not answer: requests pass uncounted, are refused with 503, or are counted by each gateway
# against its part of the limits.
OnOutage = Literal["open", "closed", "local"]


def _known_store(value: str) -> str:
    # The value is not repeated: it may hold a password.
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("no URL that can be read") from None
    if parts.scheme == MEMORY and not parts.netloc:
        return value
    if parts.scheme in {REDIS, REDIS_TLS} and parts.hostname and port != 0:
        return value
    raise ValueError("no store that is known; allowed: memory://, memory:///file, redis://…, rediss://… (TLS)")


StoreUrl = Annotated[str, AfterValidator(_known_store), Field(max_length=1024, repr=False)]


class QuotaConfig(Frozen):
    """Limits of one tenant over all its keys and models; absent: none."""

    # In any 60 seconds.
    requests_per_minute: PositiveInt | None = None
    # Prompt and answer, estimated when a request comes and settled by what the engine counted.
    tokens_per_minute: PositiveInt | None = None
    # Accepted and not yet ended, those that wait included.
    concurrent_requests: PositiveInt | None = None
    # Budgets of calendar days and months, UTC.
    tokens_per_day: PositiveInt | None = None
    tokens_per_month: PositiveInt | None = None

    @property
    def by_limit(self) -> dict[Limit, int | None]:
        """Every limit by its short name; None where it is not set."""
        return {
            "requests": self.requests_per_minute,
            "tokens": self.tokens_per_minute,
            "concurrent": self.concurrent_requests,
            "day": self.tokens_per_day,
            "month": self.tokens_per_month,
        }

    @property
    def has_budget(self) -> bool:
        """Whether the tokens of a day or a month are limited."""
        return self.tokens_per_day is not None or self.tokens_per_month is not None

    @property
    def limited(self) -> bool:
        """Whether anything is limited at all."""
        return any(value is not None for _, value in self)
