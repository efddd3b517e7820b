"""The paths to a peer: its gateways, tunnels that it keeps to this node, and regional edges at which it keeps some."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from agent.envoy import names
from agent.envoy.inputs import Item, PeerView, Scope, body
from agent.envoy.pools import CACHE
from agent.protocol.items import Edge, Peer

IPSEC = "ipsec"
DIRECT = "direct"
REVERSE = "reverse"


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
    """In order of preference; none if the peer cannot be reached. A regional edge has but one to a peer, which nobody has to judge."""
    if scope.regional:
        return (Path(Way(scope.site_id, names.REVERSE), usable=True),)
    about = body(peer, Peer)
    ways = _ways(peer, tuple([edges[edge] for edge in about.edges if edge in edges]), scope)
    judged = {} if view is None else view.paths
    return tuple([Path(way, judged.get(way.path, _is_tried(way.path, about))) for way in ways])


def _is_tried(path: str, peer: Peer) -> bool:
    """One that nobody has judged: unless it has to be built first, or the peer has no reason to open it."""
    return path != IPSEC and (path != REVERSE or not peer.gateways)


@lru_cache(CACHE)
def _ways(peer: Item, edges: tuple[Item, ...], scope: Scope) -> tuple[Way, ...]:
    about = body(peer, Peer)
    found = [Way(IPSEC, "")] if about.ipsec and scope.overlay else []
    if about.direct and about.gateways:
        found.append(Way(DIRECT, ""))
    if about.direct and about.ssl and scope.edge_anchor_pem:
        found.append(Way(REVERSE, names.REVERSE))
    return (*found, *_over(edges))


def _over(edges: Iterable[Item]) -> Iterable[Way]:
    known = [body(edge, Edge) for edge in edges]
    for edge in sorted(known, key=lambda edge: edge.draining):
        if edge.gateways:
            yield Way(edge.site_id, names.edge(edge.site_id))
