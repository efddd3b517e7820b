"""Clusters of gateways: of peers, by all paths and by each alone, and of regional edges."""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions

from agent.envoy import connections, names, tls
from agent.envoy.clusters import HTTP_OPTIONS, LB_METADATA, TUNNEL_BUFFER, USABLE, http2
from agent.envoy.inputs import Item, Scope, body
from agent.envoy.messages import (
    ADS,
    Fields,
    about,
    internal_address,
    milliseconds,
    number,
    packed,
    socket_address,
    struct,
    unlimited,
)
from agent.envoy.paths import DIRECT, IPSEC, REVERSE, Path, Way
from agent.envoy.pools import CACHE
from agent.envoy.resources import Resource, resource
from agent.protocol.items import EDGES, Edge, Gateway, Peer, shard
from agent.protocol.overlay import OVERLAY_GATEWAY_PORT, overlay_address
from agent.protocol.peering import PEER_AUTHORITY, PEER_HEALTH_PATH

_CONNECT_TIMEOUT_MS = 1_000
_CHECK_EVERY_MS = 150
_CHECK_MS = 950
"""Enough for the three round trips of the first check, of 300 ms each; and for a later one, which takes one, with a lost packet on a path of 350 ms."""
_KEEPALIVE_EVERY_MS = 150
_KEEPALIVE_MS = 1_000
_KEEPALIVE_AFTER_CHECK_MS = _CHECK_EVERY_MS + _CHECK_MS + 75
"""Where there are other paths: not before a check that failed has taken this one out of use, or what broke dials it anew and waits for that in vain."""
_TCP_KEEPALIVE = {"keepalive_time": number(1), "keepalive_interval": number(1), "keepalive_probes": number(3)}
_DIRECT, _IPSEC = Way(DIRECT, ""), Way(IPSEC, "")
_AT_ONCE: Fields = {"healthy_panic_threshold": {"value": 0}, "update_merge_window": milliseconds(0)}
"""What Envoy or the agent finds out about a path counts now: by default a change that follows another within a second waits for the rest of it."""
_INSIDE = {"inside": "1"}
"""Metadata of endpoints that are internal listeners, by which Envoy chooses their transport socket."""
_SUBSETS = {"fallback_policy": "ANY_ENDPOINT", "subset_selectors": [{"keys": list(USABLE)}]}
"""Who asks for usable paths gets no other; where the agent would use none, any."""


def site(item: Item, scope: Scope, paths: tuple[Path, ...]) -> tuple[Resource, ...]:
    """Clusters (and endpoints, where they come on their own) of a peer: by all its paths, and by each alone where there is a choice."""
    ways = tuple([path.way for path in paths])
    if ways == (_DIRECT,):
        return _direct(item, scope)
    return (*_clusters(item, scope, ways), _endpoints(item, paths))


@lru_cache(CACHE)
def _direct(item: Item, scope: Scope) -> tuple[Resource, ...]:
    peer = body(item, Peer)
    checked = _to_peer(peer, scope, _KEEPALIVE_MS, health_checks=[_health_check(2)], outlier_detection=_unreachable_gateways(2))
    return _gateways(names.site(peer.site_id), item, peer.site_id, peer.gateways, checked)


def _gateways(
    name: str, item: Item, site_id: str, gateways: tuple[Gateway, ...], fields: Fields, family: str = "AUTO"
) -> tuple[Resource, ...]:
    """Cluster (and endpoints, if it has any of its own) of a site's gateways. `family`: of the addresses that their names may have."""
    assignment = ClusterLoadAssignment(cluster_name=name, endpoints=[_gateway_endpoints(site_id, gateways)])
    by_address = _by_address(gateways)
    source: Fields = {"type": "EDS", "eds_cluster_config": {"eds_config": ADS}} if by_address else _by_name(assignment, family)
    cluster = resource(Cluster(name=name, **source, **fields), [item.id])
    return (cluster, resource(assignment, [item.id])) if by_address else (cluster,)


def _by_address(gateways: Iterable[Gateway]) -> bool:
    return all(_is_ip_address(gateway.host) for gateway in gateways)


def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _by_name(assignment: ClusterLoadAssignment, family: str) -> Fields:
    return {"type": "STRICT_DNS", "load_assignment": assignment, "dns_refresh_rate": milliseconds(5_000), "dns_lookup_family": family}


def _gateway_endpoints(site_id: str, gateways: Iterable[Gateway]) -> Fields:
    site = about({"site": site_id})
    endpoints = [{"endpoint": {"address": _address(gateway)}, "metadata": site} for gateway in gateways]
    return {"locality": {"zone": site_id}, "lb_endpoints": endpoints}


def _address(gateway: Gateway) -> Fields:
    return socket_address(gateway.host, gateway.port)


@lru_cache(CACHE)
def _clusters(item: Item, scope: Scope, ways: tuple[Way, ...]) -> tuple[Resource, ...]:
    peer = body(item, Peer)
    inside = {"name": "inside", "match": _INSIDE, "transport_socket": tls.internal(_socket(peer, scope))}
    fields = _to_peer(peer, scope, transport_socket_matches=[inside], common_lb_config=_AT_ONCE)
    checked = {"health_checks": [_health_check()]} if _DIRECT in ways or _IPSEC in ways else {}
    source: Fields = {"type": "EDS", "eds_cluster_config": {"eds_config": ADS}}
    found = [resource(Cluster(name=names.site(peer.site_id), lb_subset_config=_SUBSETS, **source, **fields, **checked), [item.id])]
    if not scope.regional:
        found += [resource(_probed(peer, way, fields), [item.id]) for way in ways]
    if _DIRECT in ways and not _by_address(peer.gateways):
        found += _named_gateways(item, peer)
    return tuple(found)


def _probed(peer: Peer, way: Way, fields: Fields) -> Cluster:
    """The peer by one path, which nothing but its answers to the agent can take out of use; gateways are checked where there are several."""
    name = names.path(peer.site_id, way.path)
    assignment = {"cluster_name": name, "endpoints": [_locality(peer, way)]}
    several = len({_DIRECT: peer.gateways, _IPSEC: peer.ipsec}.get(way, ())) > 1
    checked = {"health_checks": [_health_check()]} if several else {}
    kept = {key: value for key, value in fields.items() if several or key != "outlier_detection"}
    return Cluster(name=name, type="STATIC", load_assignment=assignment, **kept, **checked)


def _named_gateways(item: Item, peer: Peer) -> tuple[Resource, ...]:
    """Names are resolved by a cluster of their own: one with paths through internal listeners cannot."""
    every = milliseconds(_CHECK_EVERY_MS)
    check = {
        "interval": every,
        "no_traffic_interval": every,
        "timeout": milliseconds(_CHECK_MS),
        "healthy_threshold": number(1),
        "unhealthy_threshold": number(2),
        "tcp_health_check": {},
    }
    fields = {
        "connect_timeout": milliseconds(_CONNECT_TIMEOUT_MS),
        "per_connection_buffer_limit_bytes": number(TUNNEL_BUFFER),
        "common_lb_config": _AT_ONCE,
        "circuit_breakers": unlimited(),
        "health_checks": [check],
        "close_connections_on_host_health_failure": True,
        "upstream_connection_options": {"tcp_keepalive": {}},
    }
    return _gateways(names.gateway(peer.site_id), item, peer.site_id, peer.gateways, fields, "ALL")


@lru_cache(CACHE)
def _endpoints(item: Item, paths: tuple[Path, ...]) -> Resource:
    """Each path is a priority; which are used, the agent says in their health, and what Envoy notices itself comes on top.

    One that shall not be used is degraded, not unhealthy: when all others fail at once it is tried, before the agent has heard of that. This is for what
    no other site can serve, since it is likely to be in vain, and takes a second.
    """
    peer = body(item, Peer)
    independent = _independent(paths)
    localities = [
        {"priority": priority, **_judged(_locality(peer, path.way), usable=path.usable, labelled=path.way in independent)}
        for priority, path in enumerate(paths)
    ]
    policy = {"overprovisioning_factor": number(100_000)}
    return resource(ClusterLoadAssignment(cluster_name=names.site(peer.site_id), endpoints=localities, policy=policy), [item.id])


def _independent(paths: Iterable[Path]) -> set[Way]:
    """Usable ways, but for reverse tunnels beside a way that takes the same link, and takes them along when it fails."""
    usable = {path.way for path in paths if path.usable}
    return {way for way in usable if way.path != REVERSE} if usable & {_DIRECT, _IPSEC} else usable


def _locality(peer: Peer, way: Way) -> Fields:
    if way == _IPSEC:
        return _gateway_endpoints(peer.site_id, _overlay_gateways(peer))
    if way == _DIRECT and _by_address(peer.gateways):
        return _gateway_endpoints(peer.site_id, peer.gateways)
    return {"locality": {"zone": peer.site_id}, "lb_endpoints": [_inside(peer, way)]}


def _judged(locality: Fields, *, usable: bool, labelled: bool) -> Fields:
    health = {} if usable else {"health_status": "DEGRADED"}
    label = {LB_METADATA: struct(USABLE)} if labelled else {}
    endpoints = [
        {**endpoint, **health, "metadata": {"filter_metadata": {**endpoint["metadata"]["filter_metadata"], **label}}}
        for endpoint in locality["lb_endpoints"]
    ]
    return {**locality, "lb_endpoints": endpoints}


def _overlay_gateways(peer: Peer) -> Iterable[Gateway]:
    """The peer's gateways as they are dialled through IPsec."""
    return (Gateway(node_id=node.node_id, host=overlay_address(node.node_id), port=OVERLAY_GATEWAY_PORT) for node in peer.ipsec)


def _inside(peer: Peer, way: Way) -> Fields:
    """A path as an endpoint: an internal listener, told which cluster to use and what to ask of it. No active check reaches one."""
    listener = names.RELAY if way.through else names.DIRECT
    told = about({"site": peer.site_id, "cluster": way.through or names.gateway(peer.site_id), "authority": peer.site_id})
    told["filter_metadata"]["envoy.transport_socket_match"] = struct(_INSIDE)
    unchecked = {"health_check_config": {"disable_active_health_check": True}}
    return {"endpoint": {"address": internal_address(listener, way.path), **unchecked}, "metadata": told}


def _socket(peer: Peer, scope: Scope) -> Fields:
    """The site must prove to be that one, by whichever path. A regional edge shows itself as one."""
    if scope.regional:
        uri = names.site_uri(scope.trust_domain, peer.tenant_id, peer.site_id)
        return tls.to_node(uri, names.anchor(peer.tenant_id), server_name=names.INGRESS_SERVER_NAME)
    uri = names.site_uri(scope.trust_domain, scope.tenant_id, peer.site_id)
    return tls.to_node(uri, names.PEER_ANCHOR_SECRET, server_name=names.peers_server_name(shard(scope.site_id)))


@lru_cache(CACHE)
def edge(item: Item, scope: Scope) -> tuple[Resource, ...]:
    """Cluster of a regional edge's gateways, for streams to sites that keep tunnels to it."""
    about_ = body(item, Edge)
    uri = names.edge_uri(scope.trust_domain, about_.site_id)
    socket = tls.to_node(uri, names.EDGE_ANCHOR_SECRET, server_name=names.relay_server_name(scope.tenant_id))
    revoked = connections.of_shard(EDGES, scope)
    checked = _tunnel(socket, health_checks=[_health_check()], common_lb_config=_AT_ONCE, metadata=revoked)
    return _gateways(names.edge(about_.site_id), item, about_.site_id, about_.gateways, checked, "ALL")


@lru_cache(CACHE)
def dialled(item: Item, gateways: tuple[Gateway, ...], uri: str, anchor: str, scope: Scope) -> tuple[Resource, ...]:
    """Cluster through which reverse tunnels to a regional edge or peer are dialled.

    A tunnel that nobody uses yet sends nothing: only TCP itself notices then that the other end is gone.
    """
    fields = {
        "connect_timeout": milliseconds(_CONNECT_TIMEOUT_MS),
        "circuit_breakers": unlimited(),
        "upstream_connection_options": {"tcp_keepalive": _TCP_KEEPALIVE},
        "transport_socket": tls.to_node(uri, anchor, alpn=(), server_name=names.tunnels_server_name(scope.tenant_id)),
    }
    return _gateways(names.tunnels(item.id.key), item, item.id.key, gateways, fields, "V4_PREFERRED")


def _to_peer(peer: Peer, scope: Scope, keepalive_ms: int = _KEEPALIVE_AFTER_CHECK_MS, **fields: object) -> Fields:
    """After a revocation in its shard the cluster is another one, which has to shake hands anew."""
    revoked = connections.of_shard(scope.shard(peer.site_id, peer.tenant_id), scope)
    return _tunnel(_socket(peer, scope), keepalive_ms, metadata=revoked, **fields)


def _tunnel(socket: Fields, keepalive_ms: int = _KEEPALIVE_AFTER_CHECK_MS, **fields: object) -> Fields:
    """A connection that leaves a ping unanswered for `keepalive_ms` is closed, as none to a frozen peer would be otherwise. Any frame is an answer."""
    keepalive = {"interval": milliseconds(_KEEPALIVE_EVERY_MS), "timeout": milliseconds(keepalive_ms)}
    options = HttpProtocolOptions(
        explicit_http_config={"http2_protocol_options": http2(connection_keepalive=keepalive)},
        common_http_protocol_options={"idle_timeout": milliseconds(0)},
    )
    return {
        "connect_timeout": milliseconds(_CONNECT_TIMEOUT_MS),
        "per_connection_buffer_limit_bytes": number(TUNNEL_BUFFER),
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": unlimited(),
        "close_connections_on_host_health_failure": True,
        "ignore_health_on_host_removal": True,
        "outlier_detection": _unreachable_gateways(),
        "upstream_connection_options": {"tcp_keepalive": {}},
        "transport_socket": socket,
        "typed_extension_protocol_options": {HTTP_OPTIONS: packed(options)},
        **fields,
    }


def _health_check(failures: int = 1) -> Fields:
    """Whether the gateway answers. 403 is an answer too: of one that has not heard of this site yet, as when both have just become peers.

    After so many failures nothing new goes there; what is on its way stays until the keepalive gives up. Where there is another path, the first failure
    counts: a wrong one costs a detour until the next check, and breaks nothing.
    """
    every = milliseconds(_CHECK_EVERY_MS)
    answers = [{"start": 200, "end": 201}, {"start": 403, "end": 404}]
    return {
        "interval": every,
        "no_traffic_interval": every,
        "no_traffic_healthy_interval": every,
        "timeout": milliseconds(_CHECK_MS),
        "healthy_threshold": number(1),
        "unhealthy_threshold": number(failures),
        "http_health_check": {"path": PEER_HEALTH_PATH, "host": PEER_AUTHORITY, "codec_client_type": "HTTP2", "expected_statuses": answers},
    }


def _unreachable_gateways(failures: int = 1) -> Fields:
    """Only failures to reach a gateway eject it: that it refuses one export says nothing about the others."""
    never = number(0)
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": number(failures),
        "enforcing_consecutive_local_origin_failure": number(100),
        "enforcing_local_origin_success_rate": never,
        "enforcing_consecutive_5xx": never,
        "enforcing_consecutive_gateway_failure": never,
        "enforcing_success_rate": never,
        "interval": milliseconds(1_000),
        "base_ejection_time": milliseconds(1_000),
        "max_ejection_time": milliseconds(5_000),
        "max_ejection_percent": number(100),
    }
