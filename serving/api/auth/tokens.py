"""Tokens of identity providers (JWT): who signed, for whom, until when, and which tenant they speak for.

Promises: only algorithms with a public key, and of those the issuer's list; the key decides which algorithm it may
check, never the token; nothing in a token's header is fetched or taken for a key; every claim that decides is read from
the payload that was verified; a token is verified once and remembered by its digest until it expires, so that a
client's next request costs a look-up. Memory is bounded by `REMEMBERED` tokens.

A token speaks for a tenant and never for an administrator: no claim can name what is not a tenant's scope.
"""

from __future__ import annotations

import asyncio
import math
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha256
from typing import Any, Final

import jwt
import msgspec

from serving.api.auth.identity import Identity, Reason, Refused
from serving.api.auth.jwks import KeyStore
from serving.api.auth.keys import holder
from serving.config import SCOPES, GalerneConfig, OidcConfig, Scope
from serving.errors import Unavailable

REMEMBERED: Final = 4096
RETRY_AFTER_S: Final = 5
MAX_KID: Final = 256
# How every compact JWS of a JSON object begins: base64url of '{"'.
_BEGINS: Final = b"eyJ"
_DOTS: Final = 2
_CLAIMS: Final = msgspec.json.Decoder(dict[str, Any])
_OPTIONS: Final[Any] = {
    "require": ["exp", "iss", "aud"],
    # Compared here, against the gateway's own clock.
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
}
_REASONS: Final[tuple[tuple[type[Exception], Reason], ...]] = (
    (jwt.InvalidSignatureError, "token_signature"),
    (jwt.InvalidAudienceError, "token_audience"),
    (jwt.InvalidIssuerError, "token_issuer"),
    (jwt.MissingRequiredClaimError, "token_claims"),
    (jwt.InvalidAlgorithmError, "token_algorithm"),
    (jwt.InvalidKeyError, "token_algorithm"),
)


class TokenDoor:
    """Verifies the tokens of every issuer of the configuration; one per gateway."""

    def __init__(self, config: GalerneConfig, told: Callable[[str, bool], None] = lambda *_: None) -> None:
        """`told`: an issuer's id, and whether its keys were renewed."""
        self._told = told
        self._issuers = {issuer.issuer: (issuer, KeyStore(issuer)) for issuer in config.oidc}
        self._longest = max(issuer.max_token_bytes for issuer in config.oidc)
        self._verified: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()
        self._holders: dict[str, Identity] = {}
        self.follow(config)

    def follow(self, config: GalerneConfig) -> None:
        """Take a new list of tenants; what was verified before is verified again."""
        self._holders = {tenant.id: holder(tenant, config.limits) for tenant in config.tenants}
        self._verified.clear()

    def store(self, issuer_id: str) -> KeyStore:
        """The keys of one issuer; KeyError where there is none of this id."""
        return next(store for issuer, store in self._issuers.values() if issuer.id == issuer_id)

    async def run(self) -> None:
        """Keep every issuer's keys fresh, until cancelled."""
        await asyncio.gather(*(self._renew(issuer, store) for issuer, store in self._issuers.values()))

    async def _renew(self, issuer: OidcConfig, store: KeyStore) -> None:
        def told(renewed: bool) -> None:
            self._told(issuer.id, renewed)
            # A key that was withdrawn vouches for nothing any more.
            self._verified.clear()

        await store.run(told)

    @staticmethod
    def looks_like_one(text: bytes) -> bool:
        """Whether this may be a token, by its form; a key made by `galerne keys` never does."""
        return text.startswith(_BEGINS) and text.count(b".") == _DOTS

    def identify(self, token: bytes, now_s: float) -> Identity:
        """Whom a token speaks for; raises Refused, or Unavailable where its issuer's keys are not known."""
        if len(token) > self._longest:
            raise Refused("token_too_large")
        digest = sha256(token).digest()
        known = self._verified.get(digest)
        if known is not None:
            identity, until_s = known
            if now_s >= until_s:
                del self._verified[digest]
                raise Refused("token_expired", tenant_id=identity.tenant_id, key_id=identity.key_id)
            self._verified.move_to_end(digest)
            return identity
        identity, until_s = self._verify(token, now_s)
        self._verified[digest] = identity, until_s
        if len(self._verified) > REMEMBERED:
            self._verified.popitem(last=False)
        return identity

    def _verify(self, token: bytes, now_s: float) -> tuple[Identity, float]:
        algorithm, kid = _header(token)
        issuer, store = self._issuer(token)
        if len(token) > issuer.max_token_bytes:
            raise Refused("token_too_large", key_id=issuer.id)
        if algorithm not in issuer.algorithms:
            raise Refused("token_algorithm", key_id=issuer.id)
        keys = store.candidates(kid, algorithm)
        if keys is None:
            raise Unavailable(
                "Tokens cannot be checked at the moment: the issuer's keys are not known yet. Try again shortly.",
                code="issuer_unavailable",
                retry_after_s=RETRY_AFTER_S,
            )
        reason: Reason = "token_key"
        for key in keys:
            try:
                claims = jwt.decode(
                    token, key.key, [algorithm], options=_OPTIONS, audience=issuer.audience, issuer=issuer.issuer
                )
            except jwt.PyJWTError as error:
                reason = next((r for kind, r in _REASONS if isinstance(error, kind)), "token_malformed")
                continue
            except (ValueError, TypeError, RecursionError):
                raise Refused("token_malformed", key_id=issuer.id) from None
            return self._identity(issuer, claims, now_s)
        raise Refused(reason, key_id=issuer.id)

    def _issuer(self, token: bytes) -> tuple[OidcConfig, KeyStore]:
        """By the claim as it stands, unverified: it only chooses whose keys must have signed it."""
        payload = token.split(b".")[1]
        try:
            claims = _CLAIMS.decode(urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
        except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
            raise Refused("token_malformed") from None
        name = claims.get("iss")
        found = self._issuers.get(name) if isinstance(name, str) else None
        if found is None:
            raise Refused("token_issuer")
        return found

    def _identity(self, issuer: OidcConfig, claims: dict[str, Any], now_s: float) -> tuple[Identity, float]:
        expires_s, begins_s = _moment(claims["exp"]), _moment(claims.get("nbf", 0))
        if expires_s is None or begins_s is None:
            raise Refused("token_claims", key_id=issuer.id)
        until_s = expires_s + issuer.leeway_s
        if now_s >= until_s:
            raise Refused("token_expired", key_id=issuer.id)
        if begins_s > now_s + issuer.leeway_s:
            raise Refused("token_early", key_id=issuer.id)
        tenant = self._holders.get(_tenant(issuer, claims) or "")
        if tenant is None:
            raise Refused("token_tenant", key_id=issuer.id)
        return replace(tenant, key_id=issuer.id, scopes=_scopes(issuer, claims)), until_s


def _header(token: bytes) -> tuple[str, str | None]:
    """Algorithm and key's name as the token says; everything else in its header is of no account."""
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise Refused("token_malformed") from None
    algorithm, kid = header.get("alg"), header.get("kid")
    named = kid is None or (isinstance(kid, str) and len(kid) <= MAX_KID)
    # What a token calls critical must be understood; nothing is.
    if not isinstance(algorithm, str) or not named or "crit" in header or "b64" in header:
        raise Refused("token_malformed")
    return algorithm, kid


def _moment(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def _claim(claims: dict[str, Any], name: str) -> Any:
    """A claim by its name, or else by its path; names that are addresses hold dots themselves."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


def _tenant(issuer: OidcConfig, claims: dict[str, Any]) -> str | None:
    """The tenant's id; None: the claim names none, or, as a list of groups may, several."""
    table, values = issuer.tenants, _words(_claim(claims, issuer.tenant_claim))
    found = set(values) if table is None else {table[value] for value in values if value in table}
    return found.pop() if len(found) == 1 else None


def _scopes(issuer: OidcConfig, claims: dict[str, Any]) -> frozenset[Scope]:
    if issuer.scopes_claim is None:
        return frozenset(issuer.default_scopes)
    words: Iterable[str] = (word for value in _words(_claim(claims, issuer.scopes_claim)) for word in value.split())
    if issuer.scopes is not None:
        return frozenset(issuer.scopes[word] for word in words if word in issuer.scopes)
    given = frozenset(words)
    return frozenset(scope for scope in SCOPES if scope in given)
