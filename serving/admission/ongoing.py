"""How many requests one gateway has under way, from the first byte of the body to the last of the answer.

All of them together are bounded, and so that one tenant cannot have them all: it may have as many as `SHARE` times what
is still free (dynamic thresholds, Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches", 1998). A tenant alone gets eight ninths, two that flood get less each, and whoever comes last still finds
room. This comes before quotas and the fair queue: it holds also while bodies are read, however slowly they come.
"""

from __future__ import annotations

from typing import Final

SHARE: Final = 8


def may(mine: int, all_of_them: int, most: int, tenants: int) -> bool:
    """Whether a tenant with `mine` requests under way may have one more; a tenant without others may have all."""
    free = most - all_of_them
    return free > 0 if tenants <= 1 else mine < SHARE * free


class Ongoing:
    """Requests under way, by tenant. Used from one event loop only; holds no more names than requests."""

    def __init__(self, most: int, tenants: int) -> None:
        """`most` of all tenants together; `tenants` that may come."""
        self._most = most
        self.tenants = tenants
        self._by_tenant: dict[str, int] = {}
        self.requests = 0

    @property
    def full(self) -> bool:
        """Whether nobody may have more."""
        return self.requests >= self._most

    def may(self, tenant: str) -> bool:
        """Whether this tenant may have one more."""
        return may(self._by_tenant.get(tenant, 0), self.requests, self._most, self.tenants)

    def begin(self, tenant: str) -> None:
        """One more; `end` follows."""
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + 1
        self.requests += 1

    def end(self, tenant: str) -> None:
        """One less."""
        left = self._by_tenant[tenant] - 1
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]
        self.requests -= 1
