"""The way out to other sites: one cluster of gateways per peer, and the internal listeners that lead there."""

from functools import lru_cache
from ipaddress import ip_address

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.network.set_filter_state.v3.set_filter_state_pb2 import Config as SetFilterState
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions

from agent.envoy import connections, names, tls
from agent.envoy.clusters import HTTP_OPTIONS, http2
from agent.envoy.inputs import Item, Scope, body
from agent.envoy.messages import ADS, MIB, Fields, about, extension, milliseconds, number, packed, socket_address, unlimited
from agent.envoy.pools import CACHE
from agent.envoy.resources import Resource, resource
from agent.protocol.items import Gateway, Peer
from agent.protocol.peering import PEER_AUTHORITY, PEER_HEALTH_PATH

TUNNEL_BUFFER = 4 * MIB
_CONNECT_TIMEOUT_MS = 1_000
_CHECK_EVERY_MS = 500
_KEEPALIVE_MS = 1_000


@lru_cache(CACHE)
def site(item: Item, scope: Scope) -> tuple[Resource, ...]:
    """Cluster (and endpoints, if it has any of its own) of a peer's gateways."""
    peer = body(item, Peer)
    name = names.site(peer.site_id)
    assignment = ClusterLoadAssignment(cluster_name=name, endpoints=[_gateways(peer)])
    by_address = all(_is_ip_address(gateway.host) for gateway in peer.gateways)
    source: Fields = {"type": "EDS", "eds_cluster_config": {"eds_config": ADS}} if by_address else _by_name(assignment)
    cluster = resource(Cluster(name=name, **source, **_tunnel(peer, scope)), [item.id])
    return (cluster, resource(assignment, [item.id])) if by_address else (cluster,)


def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _by_name(assignment: ClusterLoadAssignment) -> Fields:
    return {"type": "STRICT_DNS", "load_assignment": assignment, "dns_refresh_rate": milliseconds(5_000)}


def _gateways(peer: Peer) -> Fields:
    site = about({"site": peer.site_id})
    endpoints = [{"endpoint": {"address": _address(gateway)}, "metadata": site} for gateway in peer.gateways]
    return {"locality": {"zone": peer.site_id}, "lb_endpoints": endpoints}


def _address(gateway: Gateway) -> Fields:
    return socket_address(gateway.host, gateway.port)


def _tunnel(peer: Peer, scope: Scope) -> Fields:
    options = HttpProtocolOptions(
        explicit_http_config={"http2_protocol_options": http2(connection_keepalive=_keepalive())},
        common_http_protocol_options={"idle_timeout": milliseconds(0)},
    )
    return {
        "connect_timeout": milliseconds(_CONNECT_TIMEOUT_MS),
        "per_connection_buffer_limit_bytes": number(TUNNEL_BUFFER),
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": unlimited(),
        "health_checks": [_health_check()],
        "close_connections_on_host_health_failure": True,
        "ignore_health_on_host_removal": True,
        "outlier_detection": _unreachable_gateways(),
        "upstream_connection_options": {"tcp_keepalive": {}},
        "transport_socket": tls.to_site(scope, peer.site_id),
        "typed_extension_protocol_options": {HTTP_OPTIONS: packed(options)},
    }


def _keepalive() -> Fields:
    """The only thing that notices a peer whose process is frozen."""
    return {"interval": milliseconds(_KEEPALIVE_MS), "timeout": milliseconds(_KEEPALIVE_MS)}


def _health_check() -> Fields:
    """Whether the gateway answers. 403 is an answer too: of one that has not heard of this site yet, as when both have just become peers."""
    every = milliseconds(_CHECK_EVERY_MS)
    answers = [{"start": 200, "end": 201}, {"start": 403, "end": 404}]
    return {
        "interval": every,
        "no_traffic_interval": every,
        "no_traffic_healthy_interval": every,
        "timeout": milliseconds(_CONNECT_TIMEOUT_MS),
        "healthy_threshold": number(1),
        "unhealthy_threshold": number(2),
        "http_health_check": {"path": PEER_HEALTH_PATH, "host": PEER_AUTHORITY, "codec_client_type": "HTTP2", "expected_statuses": answers},
    }


def _unreachable_gateways() -> Fields:
    """Only failures to reach a gateway eject it: that it refuses one export says nothing about the others."""
    never = number(0)
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": number(2),
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


def listener() -> Resource:
    """Internal listener `tunnel`: opens one CONNECT stream per connection, as the metadata of the endpoint that led here says."""
    cluster = names.metadata("cluster")
    state = {"object_key": "envoy.tcp_proxy.cluster", "format_string": {"text_format_source": {"inline_string": cluster}}}
    chosen = SetFilterState(on_new_connection=[state])
    proxy = TcpProxy(
        stat_prefix=names.TUNNEL,
        cluster="none",
        max_connect_attempts=number(3),
        idle_timeout=milliseconds(0),
        tunneling_config={"hostname": names.metadata("authority")},
    )
    filters = [
        extension("envoy.filters.network.set_filter_state", chosen),
        extension("envoy.filters.network.tcp_proxy", proxy),
    ]
    message = Listener(
        name=names.TUNNEL,
        internal_listener={},
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        filter_chains=[{"filters": filters}],
    )
    return resource(message, [])


def probe_listener(scope: Scope) -> Resource:
    """Unix socket on which the agent reads what its peers say of themselves: `Host` is a site's id."""
    manager = connections.manager(
        stat_prefix=names.PROBE,
        route_config_name=names.PROBE,
        codec_type="HTTP1",
    )
    message = Listener(
        name=names.PROBE,
        address={"pipe": {"path": f"{scope.run_dir}/probe.sock", "mode": 0o600}},
        enable_reuse_port={"value": False},
        filter_chains=[{"filters": [manager]}],
    )
    return resource(message, [])


def probe_routes(peers: tuple[Item, ...]) -> Resource:
    hosts = [
        {
            "name": names.site(peer.id.key),
            "domains": [peer.id.key],
            "routes": [
                {
                    "match": {"prefix": "/"},
                    "route": {"cluster": names.site(peer.id.key), "host_rewrite_literal": PEER_AUTHORITY, "timeout": milliseconds(5_000)},
                }
            ],
        }
        for peer in peers
    ]
    return resource(RouteConfiguration(name=names.PROBE, virtual_hosts=hosts), [peer.id for peer in peers])
