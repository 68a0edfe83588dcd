"""Where a request comes from, said by whom.

The connection's other end is HAProxy, which adds what it saw itself as the last entry of X-Forwarded-For, having
dropped what a client wrote there unless that is one of `listen.trusted_proxies`. Whether it was HAProxy that spoke is
told by `x-galerne-edge` (`serving.cluster.edge`), which it overwrites in every request: whoever reaches a gateway's
port past HAProxy, from the same machine or another pod, cannot choose an address.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from serving.cluster import edge

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

EDGE_HEADER: Final = edge.HEADER.encode()
FORWARDED: Final = edge.FORWARDED.encode()
# More proxies than these stand in front of nobody; a longer chain is not followed.
MAX_HOPS: Final = 16


def client_address(
    peer: str | None, headers: Iterable[tuple[bytes, bytes]], expected: bytes, trusted: Sequence[Network]
) -> Address | None:
    """The address the request was sent from, as far as those who say so are believed; None: nobody says.

    `peer`: the connection's other end; `expected`: what HAProxy proves itself with. From right to left each entry was
    written by whoever has the one right of it, or by HAProxy itself: the first that is no trusted proxy is the client.
    """
    chain: list[bytes] = []
    proof = b""
    for name, value in headers:
        if name == FORWARDED:
            chain += value.split(b",")
        elif name == EDGE_HEADER:
            proof = value
    if hmac.compare_digest(proof, expected):
        found = _address(chain.pop()) if chain else None
    else:
        found = None if peer is None else _parsed(peer)
    hops = 0
    while found is not None and chain and within(found, trusted):
        hops += 1
        if hops > MAX_HOPS:
            return None
        found = _address(chain.pop())
    return found


def within(address: Address, networks: Iterable[Network]) -> bool:
    """Whether one of the networks holds the address."""
    return any(address.version == network.version and address in network for network in networks)


def _address(entry: bytes) -> Address | None:
    """One entry; some balancers write the port behind it."""
    text = entry.strip(b" \t").decode("latin-1")
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return _parsed(text)


def _parsed(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # One client, whichever kind of socket it was accepted on.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped
