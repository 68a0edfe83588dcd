"""Whom a key or token speaks for, and why one is refused."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal

from serving.config import LimitsConfig, Scope
from serving.errors import Forbidden, Unauthenticated

MISSING: Final = "No API key was given. Send it in the header 'Authorization: Bearer sk-…'."
WRONG_SCHEME: Final = "The Authorization header must be 'Bearer' followed by one API key: 'Authorization: Bearer sk-…'."
TWICE: Final = "The request has more than one Authorization header. Send exactly one, with one API key."
REFUSED: Final = (
    "The API key is not valid. Check that it is complete, has not expired and is used from where it may be, "
    "or ask for a new one."
)
NO_ADMIN: Final = "This key is a tenant's. The ops page takes an administrator's key (`admins` in the configuration)."

# Why somebody was not let in, for the gateway's log and the label of its metric.
Reason = Literal[
    "missing",
    "scheme",
    "twice",
    "unknown",
    "expired",
    "revoked",
    "network",
    "scope",
    "not_admin",
    "token_malformed",
    "token_too_large",
    "token_algorithm",
    "token_issuer",
    "token_audience",
    "token_key",
    "token_signature",
    "token_expired",
    "token_early",
    "token_claims",
    "token_tenant",
]
REASONS: Final[tuple[Reason, ...]] = Reason.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a key or token speaks for, and what it opens: without `scopes` nothing.

    `key_id`: the key's id, or the issuer's. `models` is None where every model may be used. `limits`: the tenant's,
    where it has any of its own. `networks`: None for any.
    """

    tenant_id: str
    key_id: str
    models: frozenset[str] | None
    scopes: frozenset[Scope] = frozenset()
    limits: LimitsConfig | None = None
    # What a request that names no number of output tokens gets; None: the model's context is the bound.
    output_tokens: int | None = None
    networks: tuple[IPv4Network | IPv6Network, ...] | None = None

    def require(self, scope: Scope) -> None:
        """Raise `NotInScope` unless this identity has the scope."""
        if scope not in self.scopes:
            raise NotInScope(scope, self.tenant_id, self.key_id)


class Refused(Unauthenticated):
    """401, with what only the operator is told: the reason and, where it is known, whose key it was."""

    def __init__(self, reason: Reason, message: str = REFUSED, tenant_id: str = "", key_id: str = "") -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.tenant_id = tenant_id
        self.key_id = key_id

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason, self.message, self.tenant_id, self.key_id))


class NotInScope(Forbidden):
    """403 for a good key that may not do this: its holder may know which scope is missing."""

    reason: Reason = "scope"

    def __init__(self, scope: Scope, tenant_id: str, key_id: str) -> None:
        super().__init__(f"This key may not do this: it lacks the scope '{scope}'.")
        self.scope = scope
        self.tenant_id = tenant_id
        self.key_id = key_id

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.scope, self.tenant_id, self.key_id))


class NotAdmin(Forbidden):
    """403 for a tenant's key or token where an administrator's is asked for.

    It tells nothing that is secret: its reader holds a good key, and that there is an ops page is in the manual. It
    tells an operator who pasted the wrong one which it was, and a tenant who tries stands out in the metrics.
    """

    reason: Reason = "not_admin"

    def __init__(self, tenant_id: str, key_id: str) -> None:
        super().__init__(NO_ADMIN)
        self.tenant_id = tenant_id
        self.key_id = key_id

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.tenant_id, self.key_id))
