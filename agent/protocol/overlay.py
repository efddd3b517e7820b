"""Addresses inside IPsec tunnels: one for each node, which follows from its id, so that both ends know it without being told."""

import hashlib
from ipaddress import IPv6Address, IPv6Network

OVERLAY = IPv6Network("fd69:7374:686d::/48")
"""Unique local (RFC 4193), and the same in every fabric: nothing is ever routed to it but through tunnels."""
OVERLAY_GATEWAY_PORT = 15443
"""Where a node's gateway listens at its address."""


def overlay_address(node_id: str) -> str:
    """The network's 48 bits, then 80 of the SHA-256 of the node's id: not even a million nodes make two of one address likely."""
    digest = hashlib.sha256(node_id.encode()).digest()
    return str(IPv6Address(OVERLAY.network_address.packed[:6] + digest[:10]))
