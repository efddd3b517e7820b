"""The paths to a peer: its gateways, tunnels that it keeps to this node, and regional edges at which it keeps some."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from agent.envoy import names
from agent.envoy.inputs import Item, PeerView, Scope, body
from agent.envoy.pools import CACHE
from agent.protocol.items import Edge, Peer

IPSEC = "ipsec"
"""Direct, inside an IPsec tunnel."""
DIRECT = "direct"
REVERSE = "reverse"
"""Direct, over tunnels that the peer dialled."""


class Way(NamedTuple):
    """A path that there is, usable or not."""

    path: str
    """`ipsec`, `direct`, `reverse` or an edge's id."""
    through: str
    """The cluster on which the relay opens a stream to the peer; empty for `ipsec` and `direct`."""


class Path(NamedTuple):
    way: Way
    usable: bool


def paths(peer: Item, edges: Mapping[str, Item], view: PeerView | None, scope: Scope) -> tuple[Path, ...]:
    """In order of preference; none if the peer cannot be reached. That of a regional edge nobody has to judge."""
    own = scope.site_id if scope.regional else ""
    found = ways(peer, edges, own=own, anchored=bool(scope.edge_anchor_pem), ipsec=bool(scope.overlay))
    if own:
        return tuple([Path(way, usable=True) for way in found])
    about = body(peer, Peer)
    judged = {} if view is None else view.paths
    return tuple([Path(way, judged.get(way.path, _is_tried(way.path, about))) for way in found])


def _is_tried(path: str, peer: Peer) -> bool:
    """One that nobody has judged: unless it has to be built first, or the peer has no reason to open it."""
    return path != IPSEC and (path != REVERSE or not peer.gateways)


def ways(peer: Item, edges: Mapping[str, Item], *, own: str, anchored: bool, ipsec: bool) -> tuple[Way, ...]:
    """In order of preference. `own`: id of this site if it is a regional edge, which reaches peers by the tunnels that they keep to it.

    `anchored`: whether this site knows whom to believe that they are a regional edge; `ipsec`: whether this node has IPsec.
    """
    if own:
        return (Way(own, names.REVERSE),)
    relaying = tuple([edges[edge] for edge in body(peer, Peer).edges if edge in edges]) if anchored else ()
    return _ways(peer, relaying, anchored, ipsec)


@lru_cache(CACHE)
def _ways(peer: Item, edges: tuple[Item, ...], anchored: bool, ipsec: bool) -> tuple[Way, ...]:
    about = body(peer, Peer)
    found = [Way(IPSEC, "")] if about.ipsec and ipsec else []
    if about.direct and about.gateways:
        found.append(Way(DIRECT, ""))
    if about.direct and about.ssl and anchored:
        found.append(Way(REVERSE, names.REVERSE))
    return (*found, *_over(edges))


def _over(edges: Iterable[Item]) -> Iterable[Way]:
    known = [body(edge, Edge) for edge in edges]
    for edge in sorted(known, key=lambda edge: edge.draining):
        if edge.gateways:
            yield Way(edge.site_id, names.edge(edge.site_id))
