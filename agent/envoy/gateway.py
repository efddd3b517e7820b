"""The way in from other sites: which peers may open which exports, and what becomes of the requests inside.

The gateway authorises a CONNECT stream by the peer's certificate, then writes the peer's identity and the export's name into filter state. Only
from there does the internal listener `exports` take them, never from a header: a header is what the peer wrote.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.rbac.v3.rbac_pb2 import RBAC
from envoy.config.route.v3.route_components_pb2 import VirtualHost
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBAC as RbacFilter  # noqa: N811  # RBAC is the name of two messages
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBACPerRoute
from envoy.extensions.filters.http.set_filter_state.v3.set_filter_state_pb2 import Config as SetFilterState
from envoy.extensions.http.original_ip_detection.custom_header.v3.custom_header_pb2 import CustomHeaderConfig
from envoy.extensions.http.original_ip_detection.xff.v3.xff_pb2 import XffConfig
from envoy.extensions.retry.host.previous_hosts.v3.previous_hosts_pb2 import PreviousHostsPredicate
from google.protobuf.any_pb2 import Any

from agent.envoy import callers, connections, names, retries, reverse, tls
from agent.envoy.clusters import TUNNEL_BUFFER, http2
from agent.envoy.connections import connect_route
from agent.envoy.inputs import Addresses, Item, ItemId, Scope, body
from agent.envoy.messages import Fields, extension, flag, header, milliseconds, number, packed, socket_address, state
from agent.envoy.policy import Requests, Verdict, matcher, verdicts
from agent.envoy.pools import CACHE
from agent.envoy.predicates import Input, Predicate, any_of, begins, exactly, filter_state, negated, peer_uri, source_ip
from agent.envoy.predicates import header as header_input
from agent.envoy.resources import ROUTES, Part, Resource, assembled, part, resource
from agent.protocol.items import EDGES, SHARDS, Export, ExportUse, OriginPool
from agent.protocol.overlay import OVERLAY_GATEWAY_PORT
from agent.protocol.peering import PEER_AUTHORITY, PEER_DOCUMENT_PATH, PEER_HEALTH_PATH

RBAC_FILTER = "envoy.filters.http.rbac"
_RETRIES_HERE = 2
_BROKEN_FLAGS = ("UC", "UR", "LR", "UPE")
_EVENLY: Fields = {"exact_balance": {}}
"""Connections to workers: those from a peer are few and stay, and the kernel may give several of them to one worker while another has none."""
_MOST_HEADERS, _MOST_HEADERS_KIB = 1_000, 1_024
"""Of a request inside: as many and as large as any that was let in where it entered, with all that load balancer, policies and nodes have added since."""
_UNREACHED_FLAGS = ("UF", "UH", "UO", "NC", "NR")
"""Response flags of local replies. Retries here follow only on failures to connect and refused streams, so these alone mean that no origin was reached."""


class ExportParts(NamedTuple):
    """Virtual hosts of one export, in the gateway's and in the export's route configuration."""

    gateway: Part
    exports: Part


@lru_cache(16)
def listener(addresses: Addresses, scope: Scope) -> Resource:
    """Takes CONNECT streams of peers and, where the fabric has regional edges, handshakes of their reverse tunnels."""
    tunnels = [reverse.handshakes(scope.tenant_id, _peers_uri(scope), names.PEER_ANCHOR_SECRET)] if scope.edge_anchor_pem else []
    message = Listener(
        name=names.GATEWAY,
        address=socket_address(addresses.gateway_host, addresses.gateway_port),
        connection_balance_config=_EVENLY,
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        listener_filters=[tls.inspector()],
        filter_chains=[*tunnels, *_peers_chains(scope)],
    )
    return resource(message, [])


@lru_cache(16)
def overlay_listener(scope: Scope) -> Resource:
    """The same for peers that come through IPsec: nothing but the way differs. The address may be there only later."""
    message = Listener(
        name=names.OVERLAY,
        address=socket_address(scope.overlay, OVERLAY_GATEWAY_PORT),
        connection_balance_config=_EVENLY,
        freebind=flag(value=True),
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        listener_filters=[tls.inspector()],
        filter_chains=_peers_chains(scope),
    )
    return resource(message, [])


@lru_cache(16)
def relayed_listener(scope: Scope) -> Resource:
    """Internal listener `relayed`: the same for sessions out of reverse tunnels, where regional edges may be the other end too."""
    edges = names.tenant_uri(scope.trust_domain, EDGES)
    message = Listener(
        name=names.RELAYED,
        internal_listener={},
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        listener_filters=[tls.inspector()],
        filter_chains=[_chain(names.INGRESS_SERVER_NAME, edges, names.EDGE_ANCHOR_SECRET, EDGES, scope), *_peers_chains(scope)],
    )
    return resource(message, [])


def _peers_uri(scope: Scope) -> str:
    return names.tenant_uri(scope.trust_domain, scope.tenant_id)


def _peers_chains(scope: Scope) -> list[Fields]:
    """One for each shard, so that a revocation ends the connections of few others. The certificate must belong to the shard that its owner asked for."""
    anchor = names.PEER_ANCHOR_SECRET
    return [_chain(names.peers_server_name(shard), _peers_uri(scope) + shard, anchor, shard, scope) for shard in SHARDS]


def _chain(server_name: str, uri_prefix: str, anchor_secret: str, shard: str, scope: Scope) -> Fields:
    return {
        "filter_chain_match": {"server_names": [server_name]},
        "filters": [_manager()],
        "metadata": connections.of_shard(shard, scope),
        "transport_socket": tls.from_node(uri_prefix, anchor_secret),
        "transport_socket_connect_timeout": milliseconds(connections.HANDSHAKE_TIMEOUT_MS),
    }


def _manager() -> Fields:
    granted = SetFilterState(
        on_request_headers=[
            state(names.PEER_STATE, "%DOWNSTREAM_PEER_URI_SAN%", shared=True),
            state(names.EXPORT_STATE, "%REQ(:AUTHORITY)%", shared=True),
        ]
    )
    return connections.manager(
        stat_prefix=names.GATEWAY,
        route_config_name=names.GATEWAY,
        codec_type="HTTP2",
        http2_protocol_options=http2(connection_keepalive=connections.keepalive(connections.KEEPALIVE_AT_GATEWAYS_MS)),
        stream_idle_timeout=milliseconds(0),
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        http_filters=[_denied_by_default(), extension("envoy.filters.http.set_filter_state", granted)],
    )


def _denied_by_default() -> Fields:
    """Routes say who may use them; one that says nothing may be used by nobody."""
    return extension(RBAC_FILTER, RbacFilter(rules=RBAC(action="ALLOW")))


def exports_listener() -> Resource:
    """Internal listener `exports`: HTTP inside CONNECT streams, balanced per request."""
    manager = connections.manager(
        stat_prefix=names.EXPORTS,
        route_config_name=names.EXPORTS,
        to_origins=True,
        codec_type="HTTP2",
        http2_protocol_options=http2(),
        stream_idle_timeout=milliseconds(0),
        use_remote_address={"value": False},
        skip_xff_append=True,
        original_ip_detection_extensions=_clients(),
        generate_request_id={"value": False},
        common_http_protocol_options={"max_headers_count": number(_MOST_HEADERS)},
        max_request_headers_kb=number(_MOST_HEADERS_KIB),
        upgrade_configs=[{"upgrade_type": "websocket"}],
        early_header_mutation_extensions=connections.early_mutations(
            connections.without_prefix(connections.ENVOY_HEADERS),
            *connections.overwritten(names.EXPORT_HEADER, f"%FILTER_STATE({names.EXPORT_STATE}:PLAIN)%"),
        ),
        http_filters=[_denied_by_default()],
        local_reply_config=_marked_replies(),
        server_header_transformation="PASS_THROUGH",
    )
    message = Listener(
        name=names.EXPORTS,
        internal_listener={},
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        filter_chains=[{"filters": [manager]}],
    )
    return resource(message, [])


def _clients() -> list[Fields]:
    """Where the client's address is: policies go by it also where a load balancer keeps it from origins."""
    return [
        extension("envoy.http.original_ip_detection.custom_header", CustomHeaderConfig(header_name=names.CLIENT_HEADER)),
        extension("envoy.http.original_ip_detection.xff", XffConfig()),
    ]


def _marked_replies() -> Fields:
    """The first that fits."""
    broken = {"response_flag_filter": {"flags": _BROKEN_FLAGS}}
    idempotent = {"header_filter": {"header": {"name": ":method", "string_match": {"safe_regex": {"regex": retries.IDEMPOTENT}}}}}
    unreached = {"response_flag_filter": {"flags": _UNREACHED_FLAGS}}
    return {
        "mappers": [
            _marked({"and_filter": {"filters": [broken, idempotent]}}, names.REPLAYABLE),
            _marked(broken, names.BROKEN),
            _marked(unreached, names.UNREACHED),
        ]
    }


def _marked(filter: Fields, value: str) -> Fields:
    return {"filter": filter, "headers_to_add": [header(names.MARKER, value)]}


def peers_cluster(scope: Scope) -> Resource:
    """The agent's own server for peers."""
    endpoint = {"endpoint": {"address": {"pipe": {"path": f"{scope.run_dir}/peers.sock"}}}}
    assignment = {"cluster_name": names.PEERS, "endpoints": [{"lb_endpoints": [endpoint]}]}
    return resource(Cluster(name=names.PEERS, type="STATIC", connect_timeout=milliseconds(1_000), load_assignment=assignment), [])


def routes(
    parts: Sequence[ExportParts], sources: Sequence[ItemId], peers: Sequence[Item], edges: Iterable[str], scope: Scope
) -> tuple[Resource, Resource]:
    """Route configurations of `gateway` and of `exports`. `sources`: of the parts; `edges`: ids of regional edges that may use some export."""
    asking = [_from_sites(peer_uri(), [peer.id.key for peer in peers], scope), _from_edges(peer_uri(), edges, scope)]
    documents_ = RouteConfiguration(name=names.GATEWAY, virtual_hosts=[documents(rbac([(any_of(asking), "ALLOW")]))])
    exports = RouteConfiguration(name=names.EXPORTS, vhost_header=names.EXPORT_HEADER)
    return (
        assembled(ROUTES, names.GATEWAY, [part(documents_), *(found.gateway for found in parts)], [*sources, *(peer.id for peer in peers)]),
        assembled(ROUTES, names.EXPORTS, [part(exports), *(found.exports for found in parts)], sources),
    )


def documents(allowed: Any) -> VirtualHost:
    """What this node says of itself; `allowed`: to whom, as the config of the RBAC filter."""
    who = [header(names.PEER_HEADER, "%DOWNSTREAM_PEER_URI_SAN%")]
    document = {"cluster": names.PEERS, "timeout": milliseconds(2_000)}
    return VirtualHost(
        name=PEER_AUTHORITY,
        domains=[PEER_AUTHORITY],
        typed_per_filter_config={RBAC_FILTER: allowed},
        routes=[
            {"match": {"path": PEER_HEALTH_PATH}, "direct_response": {"status": 200}},
            {"match": {"path": PEER_DOCUMENT_PATH}, "route": document, "request_headers_to_add": who},
        ],
    )


def rbac(decisions: Iterable[Verdict]) -> Any:
    """Per-route config of the RBAC filter."""
    return packed(RBACPerRoute(rbac=RbacFilter(matcher=matcher(decisions))))


def _from_sites(input_: Input, sites: Iterable[str], scope: Scope) -> Predicate:
    return any_of(begins(input_, names.site_uri(scope.trust_domain, scope.tenant_id, site)) for site in sites)


def _from_edges(input_: Input, edges: Iterable[str], scope: Scope) -> Predicate:
    return any_of(begins(input_, names.edge_uri(scope.trust_domain, edge)) for edge in edges)


@lru_cache(CACHE)
def export(item: Item, pool: Item, policies: tuple[Item, ...], scope: Scope) -> ExportParts:
    """`policies`: all that the export's uses name; raises KeyError if one is missing."""
    by_key = {policy.id.key: policy for policy in policies}
    uses = body(item, Export).uses
    http = [use for use in uses if use.protocol == "http"]
    tcp = [use for use in uses if use.protocol == "tcp"]
    gateway = [_http_export(item.id.key, http, scope)] if http else []
    gateway += [_tcp_export(item.id.key, tcp, by_key, scope)] if tcp else []
    inside = [_exported(pool, http, by_key, scope)] if http else []
    return ExportParts(part(RouteConfiguration(virtual_hosts=gateway)), part(RouteConfiguration(virtual_hosts=inside)))


def _http_export(pool: str, uses: Sequence[ExportUse], scope: Scope) -> VirtualHost:
    """Whoever may use the export through any load balancer may open a stream to it; requests in it are judged one by one."""
    authority = names.export_authority("http", pool)
    peers = sorted({peer for use in uses for peer in use.peers})
    edges = sorted({edge for use in uses for edge in use.edges})
    allowed = rbac([(any_of([_from_sites(peer_uri(), peers, scope), _from_edges(peer_uri(), edges, scope)]), "ALLOW")])
    return VirtualHost(
        name=authority, domains=[authority], typed_per_filter_config={RBAC_FILTER: allowed}, routes=[connect_route(names.EXPORTS)]
    )


def _tcp_export(pool: str, uses: Sequence[ExportUse], policies: dict[str, Item], scope: Scope) -> VirtualHost:
    authority = names.export_authority("tcp", pool)
    routes_ = [
        {
            **connect_route(names.pool(pool), headers=[_exact(names.LB_HEADER, use.load_balancer)]),
            "typed_per_filter_config": {RBAC_FILTER: rbac(_use(use, policies, _tcp_requests(scope), _callers(use, peer_uri(), scope)))},
        }
        for use in uses
    ]
    return VirtualHost(name=authority, domains=[authority], routes=routes_)


def _exact(name: str, value: str) -> Fields:
    return {"name": name, "string_match": {"exact": value}}


def _tcp_requests(scope: Scope) -> Requests:
    return Requests(lambda sites: _from_sites(peer_uri(), sites, scope), header_input(names.CLIENT_HEADER), callers.told, is_http=False)


def _http_requests(scope: Scope) -> Requests:
    return Requests(
        lambda sites: _from_sites(filter_state(names.PEER_STATE), sites, scope), source_ip(), callers.told, names.COPIED_HEADERS
    )


def _callers(use: ExportUse, input_: Input, scope: Scope) -> Predicate:
    return any_of([_from_sites(input_, use.peers, scope), _from_edges(input_, use.edges, scope)])


def _use(use: ExportUse, policies: dict[str, Item], requests: Requests, callers: Predicate) -> list[Verdict]:
    """Only the sites and edges where the load balancer is advertised, and of their requests only what its policies allow."""
    strangers = (negated(callers), "DENY")
    if use.policies is None:
        return [strangers, (True, "ALLOW")]
    exempt = [(exactly(header_input(names.EXEMPT_HEADER), "1"), "ALLOW")] if use.exempt_routes else []
    return [strangers, *exempt, *verdicts([policies[key] for key in use.policies], requests)]


def _exported(pool: Item, uses: Sequence[ExportUse], policies: dict[str, Item], scope: Scope) -> VirtualHost:
    authority = names.export_authority("http", pool.id.key)
    routes_ = [route for use in uses for route in _export_routes(pool, use, policies, scope)]
    return VirtualHost(
        name=authority, domains=[authority], routes=routes_, response_headers_to_remove=[names.MARKER], retry_policy=_retries()
    )


def _retries() -> Fields:
    """On another pod, and only what no pod has seen: whether more may be retried is for ingress to know."""
    previous = extension("envoy.retry_host_predicates.previous_hosts", PreviousHostsPredicate())
    return {
        "retry_on": "connect-failure,refused-stream",
        "num_retries": number(_RETRIES_HERE),
        "retry_host_predicate": [previous],
        "host_selection_retry_max_attempts": 3,
    }


def _export_routes(pool: Item, use: ExportUse, policies: dict[str, Item], scope: Scope) -> list[Fields]:
    """Two: ingress says with a header whether the origin wants to be called by its own name."""
    lb = _exact(names.LB_HEADER, use.load_balancer)
    own_name = {"name": names.ORIGIN_HOST_HEADER, "present_match": True}
    decided = {RBAC_FILTER: rbac(_use(use, policies, _http_requests(scope), _callers(use, filter_state(names.PEER_STATE), scope)))}
    hashing = {"hash_policy": [{"header": {"header_name": names.HASH_HEADER}}]} if _hashes(body(pool, OriginPool)) else {}
    action = {"cluster": names.pool(pool.id.key), "timeout": milliseconds(0), **hashing}
    return [
        {
            "match": {"prefix": "/", "headers": [lb, own_name]},
            "route": {**action, "auto_host_rewrite": {"value": True}},
            "typed_per_filter_config": decided,
        },
        {"match": {"prefix": "/", "headers": [lb]}, "route": action, "typed_per_filter_config": decided},
    ]


def _hashes(pool: OriginPool) -> bool:
    return pool.algorithm in {"RING_HASH", "LB_OVERRIDE"}
