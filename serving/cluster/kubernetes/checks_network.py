"""Preflight's checks of the network: whether policies hold, and leave the ways open that a release needs."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final

from serving.cluster.kubernetes.facts import Facts, Unknown
from serving.cluster.kubernetes.findings import Finding, fail, not_seen, ok, warn
from serving.cluster.kubernetes.resources import dig, name_of
from serving.cluster.kubernetes.values import Needs

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Network plug-ins by a part of their DaemonSet's name: whether they enforce NetworkPolicy.
PLUGINS: Final = (
    ("calico-node", True),
    ("cilium", True),
    ("azure-npm", True),
    ("antrea-agent", True),
    ("kube-router", True),
    ("weave-net", True),
    ("ovnkube-node", True),
    ("ovs-node", True),
    ("anetd", True),
    ("aws-node", True),
    ("kube-flannel", False),
    ("kindnet", True),
)
CILIUM: Final = ("cilium", "anetd")
NODE_DNS: Final = "node-local-dns"
ENDPOINTS: Final = "kubectl get endpointslice -n default kubernetes"


def enforced(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """A hint whether NetworkPolicies are enforced: by the plug-in's name, nothing is sent."""
    if not needs.network_policies:
        why = "every pod of the cluster reaches Ray's ports and the engines"
        yield warn("network policy", "off in the values", why, "set networkPolicy.enabled to true")
    elif isinstance(facts.daemon_sets, Unknown):
        yield not_seen("network policy", facts.daemon_sets)
    else:
        names = [name_of(d) for d in facts.daemon_sets]
        known = [(plugin, enforces) for plugin, enforces in PLUGINS for name in names if plugin in name]
        if any(enforces for _, enforces in known):
            plugin = next(plugin for plugin, enforces in known if enforces)
            hint = " (where its policy engine is on)" if plugin in {"aws-node", "cilium"} else ""
            yield ok("network policy", f"{plugin} enforces it{hint}; `helm test` proves it")
        elif known:
            why = "policies are accepted and have no effect"
            yield fail("network policy", f"{known[0][0]} does not enforce it", why, "add Calico or Cilium")
        else:
            why = "no network plug-in that is known by name"
            yield warn("network policy", "not known", why, "`helm test` proves whether policies hold")


def api_server(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """Whether what is opened for the autoscaler is the API server, and whether Cilium takes it for that."""
    if not (needs.known and needs.network_policies and needs.autoscaler):
        return
    what = "api server"
    if needs.cilium_policy:
        # Whether Cilium is there its CRDs say.
        yield ok(what, "opened by Cilium's entity kube-apiserver")
        return
    given = [network for text in needs.api_server if (network := _network(text))]
    if not given:
        why = "the autoscaler could add no pod"
        yield fail(what, "networkPolicy.apiServer is empty", why, f"set it to its addresses as CIDRs ({ENDPOINTS})")
        return
    if (on_nodes := _nodes_among(facts, given)) and _runs_cilium(facts):
        why = "by default Cilium matches no node with an address, so the autoscaler could add no pod"
        fix = "set networkPolicy.cilium to true, or Cilium's policyCIDRMatchMode to nodes"
        yield warn(
            what, f"{', '.join(on_nodes)} in networkPolicy.apiServer is a node's, and Cilium runs here", why, fix
        )
        return
    host = facts.api_server.rpartition(":")[0].strip("[]")
    at = _address(host)
    if at is None:
        why = "whether networkPolicy.apiServer names it cannot be told"
        yield warn(what, f"says {host or 'nothing'} of where it is", why, f"compare with {ENDPOINTS}")
    elif any(at in network for network in given):
        yield ok(what, f"{at} is in networkPolicy.apiServer")
    else:
        why = "the autoscaler could not reach it and add no pod"
        fix = f"name all of its addresses ({ENDPOINTS})"
        yield warn(what, f"{at}, by its own word, is not in networkPolicy.apiServer", why, fix)


def node_dns(facts: Facts, needs: Needs) -> Iterator[Finding]:
    """A DNS cache on every node, which the rule for cluster DNS' pods does not name."""
    if not needs.network_policies or isinstance(facts.daemon_sets, Unknown):
        return
    if not any(NODE_DNS in name_of(found) for found in facts.daemon_sets):
        return
    if needs.dns_addresses:
        yield ok("dns on nodes", f"{', '.join(needs.dns_addresses)} opened")
    else:
        why = "pods ask a process of their node, which network policies do not open"
        fix = "set networkPolicy.dns.cidrs to its address (169.254.20.10/32) and that of the Service kube-dns"
        yield warn("dns on nodes", f"{NODE_DNS} runs, and networkPolicy.dns.cidrs is empty", why, fix)


def _runs_cilium(facts: Facts) -> bool:
    # Unknown: `enforced` has said so.
    if isinstance(facts.daemon_sets, Unknown):
        return False
    return any(plugin in name_of(found) for found in facts.daemon_sets for plugin in CILIUM)


def _nodes_among(facts: Facts, networks: list[Network]) -> list[str]:
    """Addresses of nodes that lie in the networks."""
    if isinstance(facts.nodes, Unknown):
        return []
    texts = (
        str(dig(entry, "address", default=""))
        for node in facts.nodes
        for entry in dig(node, "status", "addresses", default=[])
    )
    return sorted(
        text for text in texts if (at := _address(text)) is not None and any(at in network for network in networks)
    )


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
