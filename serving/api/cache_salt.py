"""Every tenant's prefixes in a cache of its own: the engine mixes a salt into the hash of a prompt's first block.

With one cache for all, the time to first token tells a client whether somebody else has sent the same prefix
(CVE-2025-46570). The salt is an HMAC of the tenant under the cluster's secret: the same in every gateway, and nothing
that another tenant could send. What a client sends as `cache_salt` has no effect.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

# The secret guards engines too; what it is used for here is told apart by this.
PURPOSE = b"galerne cache salt:"
JSON_SPACE = b" \t\r\n"
# A stream's last event then says what was used; the gateway takes it out again (serving.metering.answers).
ASK_FOR_USAGE = b',"stream_options":{"include_usage":true}'


class CacheSalts:
    """The salt of each tenant, and how it gets into a body."""

    def __init__(self, secret: str, tenants: Iterable[str]) -> None:
        """`secret`: the same in every gateway of a cluster."""
        self._secret = secret
        self.follow(tenants)

    def follow(self, tenants: Iterable[str]) -> None:
        """Take a new list of tenants."""
        self._ends = {tenant: _end(self._secret, tenant) for tenant in tenants}
        self._asking = {tenant: ASK_FOR_USAGE + end for tenant, end in self._ends.items()}

    def into(self, body: bytes, tenant: str, *, ask_usage: bool = False) -> bytes:
        """The body, a JSON object that is not empty, with the tenant's salt as its last entry.

        `ask_usage`: the engine is also to end its stream with a usage event, whatever the client said of that.

        Of a key that stands twice the engine takes the last, whatever spelling the first has: a client's is void.
        """
        body = body.rstrip(JSON_SPACE)
        end = (self._asking if ask_usage else self._ends).get(tenant)
        if end is None:  # a tenant that has left the configuration while its request was read
            end = (ASK_FOR_USAGE if ask_usage else b"") + _end(self._secret, tenant)
        return body[:-1] + end


def _end(secret: str, tenant: str) -> bytes:
    return b',"cache_salt":"%b"}' % _salt(secret, tenant)


def _salt(secret: str, tenant: str) -> bytes:
    return hmac.new(secret.encode(), PURPOSE + tenant.encode(), hashlib.sha256).hexdigest().encode()
