"""A bound that tenants share: requests under way in one gateway, or the bytes of their bodies.

All of them together are bounded, and so that one tenant cannot have it all: it may have as much as `SHARE` times what
is still free (dynamic thresholds, Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches", 1998). A tenant alone gets eight ninths, two that flood get less each, and whoever comes last still finds
room. This comes before quotas and the fair queue: it holds also while bodies are read, however slowly they come.
"""

from __future__ import annotations

from typing import Final

SHARE: Final = 8


def may(mine: int, used: int, most: int, tenants: int, amount: int = 1) -> bool:
    """Whether a tenant that has `mine` of what is used may take `amount` more; without other tenants it may have all.

    >>> may(mine=3640, used=3640, most=4096, tenants=2), may(mine=3641, used=3641, most=4096, tenants=2)
    (True, False)
    """
    free = most - used
    if amount > free:
        return False
    return tenants <= 1 or mine + amount <= SHARE * free


class FairShare:
    """What is used of one bound, by tenant. Used from one event loop only; keeps nothing of who uses nothing."""

    __slots__ = ("_by_tenant", "_most", "tenants", "used")

    def __init__(self, most: int, tenants: int) -> None:
        """`most` of all tenants together; `tenants` that may come."""
        self._most = most
        self._by_tenant: dict[str, int] = {}
        self.tenants = tenants
        self.used = 0

    @property
    def free(self) -> int:
        """What nobody has."""
        return self._most - self.used

    @property
    def full(self) -> bool:
        """Whether nobody may have more."""
        return self.free <= 0

    @property
    def holders(self) -> int:
        """How many tenants have anything."""
        return len(self._by_tenant)

    def may(self, tenant: str, amount: int = 1) -> bool:
        """Whether this tenant may take so much more."""
        return may(self._by_tenant.get(tenant, 0), self.used, self._most, self.tenants, amount)

    def take(self, tenant: str, amount: int = 1) -> None:
        """Take it; `give` follows."""
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + amount
        self.used += amount

    def give(self, tenant: str, amount: int = 1) -> None:
        """Give back what was taken."""
        left = self._by_tenant[tenant] - amount
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]
        self.used -= amount


class Holding:
    """What one request has of a bound: it grows, and goes back as a whole, once."""

    __slots__ = ("_share", "_tenant", "amount")

    def __init__(self, share: FairShare, tenant: str) -> None:
        self._share = share
        self._tenant = tenant
        self.amount = 0

    def grow(self, amount: int) -> bool:
        """Take so much more; False, and nothing is taken, where the tenant may not."""
        if amount and not self._share.may(self._tenant, amount):
            return False
        if amount:
            self._share.take(self._tenant, amount)
            self.amount += amount
        return True

    def end(self) -> None:
        """Give everything back; a second call does nothing."""
        if self.amount:
            self._share.give(self._tenant, self.amount)
            self.amount = 0
