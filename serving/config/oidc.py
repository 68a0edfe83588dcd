"""Tokens of an identity provider (OpenID Connect) in place of keys."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from serving.config.base import NAME, Frozen, Misplaced, Seconds
from serving.config.keys import DEFAULT_SCOPES, Scope

# Signatures that a public key checks. `none` and shared secrets (HS*) cannot be named: who checks one could make one.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class OidcConfig(Frozen):
    """One issuer, whose tokens speak for tenants."""

    # Stands where a key's id stands: in logs, the ledger, metrics.
    id: Annotated[str, Field(pattern=NAME)]
    # The claim `iss`, to the letter.
    issuer: Annotated[str, Field(min_length=1, max_length=512)]
    # The claim `aud` must hold one of these.
    audience: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=512)], ...], Field(min_length=1)]
    # The issuer's public keys (JWKS): an https address, or a file by its whole path. Either is read every `refresh_s`.
    jwks_url: Annotated[str, Field(max_length=1024)] | None = None
    jwks_file: Annotated[str, Field(max_length=1024)] | None = None
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256",)
    # Clocks that differ by so much still agree.
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 30.0
    # The claim that says the tenant; dots go into objects ("resource.tenant").
    tenant_claim: Annotated[str, Field(min_length=1, max_length=128)]
    # The claim's values and the tenants they stand for; absent: the value is the tenant's id.
    tenants: dict[str, str] | None = None
    # The claim with the scopes, a list or words in one text; absent: every token has `default_scopes`.
    scopes_claim: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    # The claim's values and the scopes they stand for; absent: they are called as here. Others open nothing.
    scopes: dict[str, Scope] | None = None
    default_scopes: tuple[Scope, ...] = DEFAULT_SCOPES
    # A longer token is not looked at. All headers together have `limits.header_bytes`.
    max_token_bytes: Annotated[int, Field(ge=256, le=15 * 1024)] = 6 * 1024
    # How often the keys are asked for; sooner where a token names one that is not known.
    refresh_s: Annotated[float, Field(ge=10, le=1800)] = 300.0
    # Keys that could not be renewed for so long are given up: nobody would hear that the issuer has withdrawn one.
    keep_s: Seconds = 24 * 3600.0
    timeout_s: Seconds = 5.0

    @field_validator("jwks_url")
    @classmethod
    def _private_way(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = urlsplit(value)
        plain = url.scheme == "http" and url.hostname in LOOPBACK_HOSTS
        if not url.hostname or not (url.scheme == "https" or plain):
            raise ValueError("must be an https address: who can change the keys on their way can be any tenant")
        if url.username or url.password:
            raise ValueError("must not hold a user or a password")
        return value

    @field_validator("jwks_file")
    @classmethod
    def _whole_path(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError("must be a whole path, such as /etc/galerne/jwks.json")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise Misplaced("give either jwks_url or jwks_file", "jwks_url")
        return self
