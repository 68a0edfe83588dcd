"""API keys, kept as digests alone.

Promises: a key is compared by its SHA-256 digest and in constant time; an unknown, an expired, a revoked and a
misplaced key get the same answer.

Why a dictionary look-up leaks nothing: it is keyed by the digest of what the caller sent. How long the
look-up takes depends on the stored digest's leading bits at most, and a caller who wants a digest with
chosen bits must break SHA-256's preimage resistance. The digests are then compared with
`hmac.compare_digest`, so that the decision itself rests on no early exit, and an unknown key goes through
the same comparison.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from serving.api.auth.identity import MISSING, WRONG_SCHEME, Identity, Reason, Refused
from serving.config import AdminConfig, CredentialConfig, LimitsConfig, TenantConfig

KEY_PREFIX = "sk-"
# 32 random bytes: nobody guesses one, so a plain (unsalted, fast) digest is enough to keep it.
KEY_RANDOM_BYTES = 32
# Longer ones are not hashed: a header of many KiB must not buy CPU time.
MAX_KEY_BYTES = 256

NOBODY: Final = Identity("", "", frozenset())


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    identity: Identity
    expires_s: float
    revoked: bool

    def __repr__(self) -> str:
        return f"_Entry({self.identity!r}, digest='…')"

    @classmethod
    def of(cls, key: CredentialConfig, identity: Identity) -> _Entry:
        return cls(bytes.fromhex(key.sha256), identity, key.expires_s, key.revoked)


# Compared against where the key is unknown, so that an unknown and an expired key cost the same work.
_NOBODY = _Entry(bytes(32), NOBODY, 0.0, revoked=False)


def holder(tenant: TenantConfig, limits: LimitsConfig | None) -> Identity:
    """What every key and token of a tenant has in common; it has no scope yet."""
    own = tenant.limits
    return Identity(
        tenant.id,
        "",
        None if tenant.models is None else frozenset(tenant.models),
        limits=None if own is None or limits is None else own.within(limits),
        output_tokens=None if own is None else own.output_tokens,
    )


class _Ring:
    """Keys by digest. Immutable: a reload builds a new one."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._entries = {entry.digest: entry for entry in entries}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._entries)} keys)"

    def find(self, presented: bytes, now_s: float) -> tuple[Identity, Reason | None]:
        """Whose key this is the digest of, and why it is refused all the same; NOBODY where it is unknown."""
        entry = self._entries.get(presented, _NOBODY)
        known = hmac.compare_digest(entry.digest, presented) and entry is not _NOBODY
        expired = entry.expires_s <= now_s
        if not known:
            return NOBODY, "unknown"
        return entry.identity, "revoked" if entry.revoked else "expired" if expired else None


class KeyRing(_Ring):
    """Every key of the tenants. Immutable: a reload builds a new one."""

    def __init__(self, tenants: Iterable[TenantConfig], limits: LimitsConfig | None = None) -> None:
        """`limits`: the cluster's, which a tenant's own narrow."""
        super().__init__(entry for tenant in tenants for entry in _entries(tenant, limits))


def _entries(tenant: TenantConfig, limits: LimitsConfig | None) -> Iterable[_Entry]:
    common = holder(tenant, limits)
    for key in tenant.keys:
        yield _Entry.of(
            key,
            Identity(
                tenant.id,
                key.id,
                common.models if key.models is None else frozenset(key.models),
                frozenset(key.scopes),
                common.limits,
                common.output_tokens,
                key.networks,
            ),
        )


class AdminRing(_Ring):
    """The administrators' keys: a ring of their own, so that neither kind of key opens what the other does."""

    def __init__(self, admins: Iterable[AdminConfig]) -> None:
        super().__init__(_Entry.of(key, Identity("", key.id, frozenset(), networks=key.networks)) for key in admins)


def presented(authorization: bytes | None) -> bytes:
    """The key or token in an Authorization header's value; raises Refused where there is none, or not just one."""
    if authorization is None or not authorization.strip(b" \t"):
        raise Refused("missing", MISSING)
    # RFC 9110: the scheme's case does not matter; 1*SP follows it.
    scheme, _, key = authorization.strip(b" \t").partition(b" ")
    key = key.strip(b" \t")
    if scheme.lower() != b"bearer" or not key or b" " in key or b"," in key:
        raise Refused("scheme", WRONG_SCHEME)
    return key


def digest(key: str) -> str:
    """The hex SHA-256 of a key, as the configuration's `sha256` holds it."""
    return sha256(key.encode()).hexdigest()


def new_key() -> tuple[str, str]:
    """A new random key in the clear, to be shown once, and its digest, to be kept."""
    plain = KEY_PREFIX + secrets.token_urlsafe(KEY_RANDOM_BYTES)
    return plain, digest(plain)
