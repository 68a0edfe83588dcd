"""Lets a request in as somebody, or not at all: keys, tokens, networks, one after the other.

Immutable but for the memory of tokens: a reload makes a new one, and a request that is under way keeps what it was
let in as.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Protocol

from serving.api.auth import network
from serving.api.auth.identity import TWICE, Identity, NotAdmin, Reason, Refused
from serving.api.auth.keys import MAX_KEY_BYTES, AdminRing, KeyRing, presented
from serving.config import GalerneConfig

AUTHORIZATION = b"authorization"


class Tokens(Protocol):
    """What the door needs of the verification of tokens."""

    @staticmethod
    def looks_like_one(text: bytes) -> bool:
        """Whether this may be a token, by its form."""

    def identify(self, token: bytes, now_s: float) -> Identity:
        """Whom a token speaks for; raises Refused."""


class Door:
    """The only way in."""

    def __init__(
        self, config: GalerneConfig, *, edge: bytes, wall: Callable[[], float], tokens: Tokens | None = None
    ) -> None:
        """`edge`: what HAProxy proves itself with."""
        self._keys = KeyRing(config.tenants, config.limits)
        self._admins = AdminRing(config.admins)
        self._trusted = config.listen.trusted_proxies
        self._edge = edge
        self._wall = wall
        self._tokens = tokens

    def enter(self, headers: Mapping[bytes, bytes], scope: Mapping[str, Any]) -> Identity:
        """Whom a request speaks for; raises Refused. `headers`: the scope's, by name."""
        text, now_s = _only(headers, scope), self._wall()
        if self._tokens is not None and self._tokens.looks_like_one(text):
            return self._tokens.identify(text, now_s)
        if len(text) > MAX_KEY_BYTES:
            raise Refused("unknown")
        identity, reason = self._keys.find(sha256(text).digest(), now_s)
        return self._checked(identity, reason, scope)

    def admin(self, headers: Mapping[bytes, bytes], scope: Mapping[str, Any]) -> str:
        """The id of the administrator's key; raises NotAdmin for a tenant's key or token, else Refused."""
        text = _only(headers, scope)
        if len(text) <= MAX_KEY_BYTES:
            identity, reason = self._admins.find(sha256(text).digest(), self._wall())
            if reason != "unknown":
                return self._checked(identity, reason, scope).key_id
        tenant = self.enter(headers, scope)
        raise NotAdmin(tenant.tenant_id, tenant.key_id)

    def _checked(self, identity: Identity, reason: Reason | None, scope: Mapping[str, Any]) -> Identity:
        if reason is None and identity.networks is not None:
            peer = scope.get("client")
            address = network.client_address(peer and peer[0], scope["headers"], self._edge, self._trusted)
            if address is None or not network.within(address, identity.networks):
                reason = "network"
        if reason is not None:
            raise Refused(reason, tenant_id=identity.tenant_id, key_id=identity.key_id)
        return identity


def _only(headers: Mapping[bytes, bytes], scope: Mapping[str, Any]) -> bytes:
    """The one key or token that came along; raises Refused. Of two, whoever stood in front may have meant the other."""
    if sum(name == AUTHORIZATION for name, _ in scope["headers"]) > 1:
        raise Refused("twice", TWICE)
    return presented(headers.get(AUTHORIZATION))
