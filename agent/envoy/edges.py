"""What a node has for regional edges and reverse tunnels: on a customer edge, and on a regional edge itself."""

from collections.abc import Iterable

from agent.envoy import gateway, gateways, names, relay, reverse, tls, tunnel
from agent.envoy.inputs import body
from agent.envoy.pools import dials
from agent.envoy.resources import Output, Resource
from agent.envoy.sources import Sources
from agent.protocol.items import Edge, Gateway, ItemKind, Peer


def customer(sources: Sources, output: Output) -> None:
    """Ways through regional edges, and reverse tunnels that are kept and accepted."""
    scope = sources.scope
    if not scope.edge_anchor_pem:
        for edge in sources.snapshot.by_kind[ItemKind.EDGE]:
            output.problem(edge.id, "the anchor of regional edges is not here")
        return
    direct = [peer.id.key for peer in sources.peers if body(peer, Peer).direct]
    uri = names.tenant_uri(scope.trust_domain, scope.tenant_id)
    output.put(tunnel.listener(names.RELAY), tunnel.listener(names.DIRECT), gateway.relayed_listener(scope))
    output.put(*reverse.relayed(scope.site_id), reverse.cluster(scope.tenant_id, uri, names.PEER_ANCHOR_SECRET, ()))
    output.put(*reverse.streams({scope.tenant_id: direct} if direct else {}, scope))
    _to_edges(sources, output)
    _to_peers(sources, output)


def _to_edges(sources: Sources, output: Output) -> None:
    scope = sources.scope
    for item in sources.edges.values():
        edge = body(item, Edge)
        if not edge.gateways:
            output.problem(item.id, "it has no gateway")
            continue
        output.put(*gateways.edge(item, scope))
        if edge.home:
            uri = names.edge_uri(scope.trust_domain, edge.site_id)
            output.put(*gateways.dialled(item, edge.gateways, uri, names.EDGE_ANCHOR_SECRET, scope))
            output.put(_listener(edge.site_id, edge.gateways, uri, names.EDGE_ANCHOR_SECRET, sources))


def _to_peers(sources: Sources, output: Output) -> None:
    """For calls of those that cannot dial this site."""
    scope = sources.scope
    for item in sources.peers:
        peer = body(item, Peer)
        if peer.site_id in sources.local.dials and peer.direct and peer.gateways:
            uri = names.site_uri(scope.trust_domain, scope.tenant_id, peer.site_id)
            output.put(*gateways.dialled(item, peer.gateways, uri, names.PEER_ANCHOR_SECRET, scope))
            output.put(_listener(peer.site_id, peer.gateways, uri, names.PEER_ANCHOR_SECRET, sources))


def _listener(other: str, dialled: Iterable[Gateway], uri: str, anchor: str, sources: Sources) -> Resource:
    scope = sources.scope
    claim = reverse.Claim(sources.local.node.node_id, scope.site_id, scope.tenant_id, scope.trust_domain)
    needed = 1 + max(gateway.workers for gateway in dialled)
    return reverse.tunnels_listener(other, -(-needed // sources.local.workers), claim, tls.from_node(uri, anchor))


def regional(sources: Sources, output: Output) -> None:
    """Tunnels and streams of every tenant that has sites here, and the edge's own streams for load balancers that it serves."""
    scope = sources.scope
    relays = sources.snapshot.by_kind[ItemKind.RELAY]
    if relays:
        output.put(relay.listener(relays, sources.local.addresses, scope))
    for item in relays:
        output.put(*relay.tenant(item, scope))
    served: dict[str, list[str]] = {item.id.key: [] for item in relays}
    for item in sources.snapshot.by_kind[ItemKind.PEER]:
        peer = body(item, Peer)
        if peer.tenant_id in served:
            served[peer.tenant_id].append(peer.site_id)
        else:
            output.problem(item.id, f"nothing is relayed for tenant {peer.tenant_id}")
    output.put(tunnel.listener(names.RELAY), *reverse.streams(served, scope))
    for item in sources.snapshot.by_kind[ItemKind.ORIGIN_POOL]:
        if dials(item, scope.site_id):
            output.problem(item.id, "a regional edge dials no origin: it must be at sites")
