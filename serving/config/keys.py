"""Keys: of tenants and of administrators; of each only the digest."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AwareDatetime, Field, IPvAnyNetwork, field_validator

from serving.config.base import NAME, SHA256, Frozen

# What a tenant's key or token may open. Administration is none of them: no tenant can be given it.
Scope = Literal["inference", "models", "usage"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
# Of a key that names none. `usage` is not among them: it tells what the whole tenant uses, under all of its keys, which
# a key in some application has no need to know; and a key opens no more after an upgrade than it was given out for.
DEFAULT_SCOPES: Final[tuple[Scope, ...]] = ("inference", "models")
ISO_DATE_LENGTH: Final = len("2027-01-31")
Networks = tuple[IPvAnyNetwork, ...]


class CredentialConfig(Frozen):
    """What every key has."""

    id: Annotated[str, Field(pattern=NAME)]
    sha256: Annotated[str, Field(pattern=SHA256)]
    # The last day on which it is good (UTC), or a moment with its zone from which it is not.
    expires: date | AwareDatetime | None = None
    # Refused like an unknown key, but the gateway's log says who still uses it.
    revoked: bool = False
    # Client addresses it is good from; absent: any. Behind a proxy of yours name that in `listen.trusted_proxies`.
    networks: Annotated[Networks, Field(min_length=1)] | None = None

    @field_validator("expires", mode="before")
    @classmethod
    def _zoned(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value) if len(value) > ISO_DATE_LENGTH else date.fromisoformat(value)
            except ValueError:
                value = None
        elif value is None:
            return None
        if not isinstance(value, date):
            raise ValueError(  # noqa: TRY004 - pydantic reads a ValueError
                "must be a date such as 2027-01-31, or a time with its zone: 2027-01-31T18:00:00+01:00"
            )
        if isinstance(value, datetime) and value.tzinfo is None:
            raise ValueError("a time needs its zone, such as 2027-01-31T18:00:00+01:00; or give a date alone")
        return value

    @property
    def expires_s(self) -> float:
        """The moment from which it is refused, seconds since 1970; infinite: never."""
        if self.expires is None:
            return float("inf")
        if isinstance(self.expires, datetime):
            return self.expires.timestamp()
        return datetime.combine(self.expires + timedelta(days=1), time(), UTC).timestamp()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, sha256='…', expires={self.expires!r})"


class KeyConfig(CredentialConfig):
    """One API key of a tenant."""

    # What it opens; what is not named stays shut.
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = DEFAULT_SCOPES
    # Of the tenant's models those it may use; absent: all of them.
    models: tuple[str, ...] | None = None


class AdminConfig(CredentialConfig):
    """One administrator's key; it opens the ops page and nothing that a tenant's key opens."""
