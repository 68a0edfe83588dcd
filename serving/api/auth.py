"""Who is calling: API keys, kept as digests alone.

Promises: a key is compared by its SHA-256 digest and in constant time; an unknown, an expired and a revoked
key get the same answer; any bytes in the header are an answer, never an exception of another kind; no key
and no digest appears in an error, a repr or a log.

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
from datetime import date
from hashlib import sha256

from serving.config import TenantConfig
from serving.errors import Unauthenticated

KEY_PREFIX = "sk-"
# 32 random bytes: nobody guesses one, so a plain (unsalted, fast) digest is enough to keep it.
KEY_RANDOM_BYTES = 32
# Longer ones are not hashed: a header of many KiB must not buy CPU time.
MAX_KEY_BYTES = 256

MISSING = "No API key was given. Send it in the header 'Authorization: Bearer sk-…'."
WRONG_SCHEME = "The Authorization header must be 'Bearer' followed by one API key: 'Authorization: Bearer sk-…'."
REFUSED = "The API key is not valid. Check that it is complete and has not expired, or ask for a new one."


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a key speaks for. `models` is None where every model may be used."""

    tenant_id: str
    key_id: str
    models: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    identity: Identity
    expires: date | None

    def __repr__(self) -> str:
        return f"_Entry({self.identity!r}, digest='…')"


# Compared against where the key is unknown, so that an unknown and an expired key cost the same work.
_NOBODY = _Entry(bytes(32), Identity("", "", frozenset()), None)


class KeyRing:
    """Every key of the configuration. Immutable: a reload builds a new one."""

    def __init__(self, tenants: Iterable[TenantConfig]) -> None:
        self._entries: dict[bytes, _Entry] = {}
        for tenant in tenants:
            models = None if tenant.models is None else frozenset(tenant.models)
            for key in tenant.keys:
                value = bytes.fromhex(key.sha256)
                self._entries[value] = _Entry(value, Identity(tenant.id, key.id, models), key.expires)

    def __repr__(self) -> str:
        return f"KeyRing({len(self._entries)} keys)"

    def identify(self, authorization: bytes | None, today: date) -> Identity:
        """Whose key the Authorization header's value carries; raises Unauthenticated.

        A key is good through the whole of its `expires` day.
        """
        presented = sha256(_key(authorization)).digest()
        entry = self._entries.get(presented, _NOBODY)
        known = hmac.compare_digest(entry.digest, presented) and entry is not _NOBODY
        expired = entry.expires is not None and entry.expires < today
        if not known or expired:
            raise Unauthenticated(REFUSED)
        return entry.identity


def _key(authorization: bytes | None) -> bytes:
    if authorization is None or not authorization.strip(b" \t"):
        raise Unauthenticated(MISSING)
    # RFC 9110: the scheme's case does not matter; 1*SP follows it.
    scheme, _, key = authorization.strip(b" \t").partition(b" ")
    key = key.strip(b" \t")
    if scheme.lower() != b"bearer" or not key or b" " in key or b"," in key:
        raise Unauthenticated(WRONG_SCHEME)
    if len(key) > MAX_KEY_BYTES:
        raise Unauthenticated(REFUSED)
    return key


def digest(key: str) -> str:
    """The hex SHA-256 of a key, as the configuration's `sha256` holds it."""
    return sha256(key.encode()).hexdigest()


def new_key() -> tuple[str, str]:
    """A new random key in the clear, to be shown once, and its digest, to be kept."""
    plain = KEY_PREFIX + secrets.token_urlsafe(KEY_RANDOM_BYTES)
    return plain, digest(plain)
