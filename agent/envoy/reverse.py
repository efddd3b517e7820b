"""Reverse tunnels: connections that a site dials, and through which the other end opens streams to the site.

Their first bytes are a handshake in TLS, whose client certificate must prove what it claims: the node's name and its site. Then both ends speak
TLS again on the same connection, with the roles exchanged; Envoy's own mechanism would go on in clear. A tunnel leads to nothing but the gateway
of the site that dialled it.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.clusters.reverse_connection.v3.reverse_connection_pb2 import ReverseConnectionClusterConfig
from envoy.extensions.filters.network.reverse_tunnel.v3.reverse_tunnel_pb2 import ReverseTunnel, Validation
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions

from agent.envoy import clusters, connections, names, tls
from agent.envoy.clusters import HTTP_OPTIONS, TUNNEL_BUFFER, http2
from agent.envoy.connections import connect_route
from agent.envoy.inputs import ItemId, Scope
from agent.envoy.messages import Fields, amended, extension, milliseconds, number, packed, unlimited, wired
from agent.envoy.pools import CACHE
from agent.envoy.resources import Resource, resource

_CONNECT_TIMEOUT_MS = 1_000
_KEEPALIVE_MS = 1_000
_PING_MS = 2_000
_BOUNDED = b"\x48\x01" + b"\x5a\x02\x08\x05"
"""Fields 9 and 11 of `ReverseTunnel`: `enable_connection_limit`, and a `handshake_timeout` of five seconds."""
_TENANT_OF_CLAIM = 5
"""Field `Validation.tenant_id_format`."""
_TENANT_OF_HOST = 3
"""Field `ReverseConnectionClusterConfig.tenant_id_format`."""


def _site_name(site_id: str) -> str:
    """How a site is called in handshakes: the subject of its nodes' certificates. It may be a format with the site's id in it."""
    return f"CN={site_id}"


# --- the end that dials ----------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """Who a node says it is when it dials: what its certificate proves."""

    node_id: str
    site_id: str
    tenant_id: str
    trust_domain: str

    def __str__(self) -> str:
        """As in addresses of listeners: the DNS name of the certificate, its subject, and the tenant."""
        node = f"{self.node_id}.{self.site_id}.{self.tenant_id}.{self.trust_domain}"
        return f"{node}:{_site_name(self.site_id)}:{self.tenant_id}"


def tunnels_listener(other: str, count: int, claim: Claim, socket: Fields) -> Resource:
    """Each worker keeps `count` tunnels to each gateway of `tunnels|other`; all need one more than that has workers, which each hold on to one.

    What comes out of them is a CONNECT stream to this site's own gateway, or it is refused.
    """
    where = f"rc://{claim}@{names.tunnels(other)}:{count}"
    manager = connections.manager(
        stat_prefix=names.RELAYED,
        route_config_name=names.RELAYED,
        codec_type="HTTP2",
        http2_protocol_options=http2(connection_keepalive=connections.keepalive()),
        stream_idle_timeout=milliseconds(0),
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
    )
    message = Listener(
        name=names.tunnels(other),
        address={"socket_address": {"address": where, "port_value": 0, "resolver_name": "envoy.resolvers.reverse_connection"}},
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        filter_chains=[{"filters": [manager], "transport_socket": socket}],
    )
    return resource(message, [])


def relayed(site_id: str) -> tuple[Resource, Resource]:
    """Cluster and routes of what comes out of tunnels."""
    host = {"name": site_id, "domains": [site_id], "routes": [connect_route(names.RELAYED)]}
    return clusters.internal(names.RELAYED), resource(RouteConfiguration(name=names.RELAYED, virtual_hosts=[host]), [])


# --- the end that accepts --------------------------------------------------------------------------------------------


def handshakes(tenant_id: str, uri_prefix: str, anchor: str, *guards: Fields) -> Fields:
    """Filter chain: nodes of the tenant, each as itself, after the filters `guards`."""
    claims = Validation(node_id_format="%DOWNSTREAM_PEER_DNS_SAN%", cluster_id_format="%DOWNSTREAM_PEER_SUBJECT%")
    validation = amended(claims, wired(_TENANT_OF_CLAIM, tenant_id))
    tunnel = amended(ReverseTunnel(ping_interval=milliseconds(_PING_MS), validation=validation), _BOUNDED)
    return {
        "filter_chain_match": {"server_names": [names.tunnels_server_name(tenant_id)]},
        "filters": [*guards, extension("envoy.filters.network.reverse_tunnel", tunnel)],
        "transport_socket": tls.from_node(uri_prefix, anchor, alpn=()),
        "transport_socket_connect_timeout": milliseconds(connections.HANDSHAKE_TIMEOUT_MS),
    }


@lru_cache(CACHE)
def cluster(tenant_id: str, uri_prefix: str, anchor: str, sources: tuple[ItemId, ...]) -> Resource:
    """Tunnels of the tenant's sites; `:authority` is the id of the site. One cluster, for each worker of it takes a tunnel for itself."""
    config = ReverseConnectionClusterConfig(host_id_format=_site_name("%REQ(:authority)%"))
    keepalive = {"interval": milliseconds(_KEEPALIVE_MS), "timeout": milliseconds(_KEEPALIVE_MS)}
    options = HttpProtocolOptions(
        explicit_http_config={"http2_protocol_options": http2(connection_keepalive=keepalive)},
        common_http_protocol_options={"idle_timeout": milliseconds(0)},
    )
    message = Cluster(
        name=names.reverse(tenant_id),
        lb_policy="CLUSTER_PROVIDED",
        cluster_type=extension("envoy.clusters.reverse_connection", amended(config, wired(_TENANT_OF_HOST, tenant_id))),
        connect_timeout=milliseconds(_CONNECT_TIMEOUT_MS),
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        circuit_breakers=unlimited(),
        transport_socket=tls.to_node(uri_prefix, anchor),
        typed_extension_protocol_options={HTTP_OPTIONS: packed(options)},
    )
    return resource(message, sources)


def streams(sites: Mapping[str, Iterable[str]], scope: Scope) -> tuple[Resource, Resource, Resource]:
    """Listener, cluster and routes of this node's own streams through tunnels. `sites`: their ids by tenant."""
    manager = connections.manager(
        stat_prefix=names.REVERSE,
        route_config_name=names.REVERSE,
        codec_type="HTTP2",
        http2_protocol_options=http2(),
        stream_idle_timeout=milliseconds(0),
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
    )
    message = Listener(
        name=names.REVERSE,
        internal_listener={},
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        filter_chains=[{"filters": [manager]}],
    )
    protocol = packed(HttpProtocolOptions(explicit_http_config={"http2_protocol_options": http2()}))
    hosts = [host(tenant_id, tenant_id, ids) for tenant_id, ids in sorted(sites.items()) if ids]
    return (
        resource(message, []),
        clusters.internal(names.REVERSE, scope.site_id, typed_extension_protocol_options={HTTP_OPTIONS: protocol}),
        resource(RouteConfiguration(name=names.REVERSE, virtual_hosts=hosts), []),
    )


def host(name: str, tenant_id: str, sites: Iterable[str], **fields: object) -> Fields:
    """Virtual host: CONNECT streams to these sites."""
    routes = [connect_route(names.reverse(tenant_id), terminated=False)]
    return {"name": name, "domains": list(sites), "routes": routes, **fields}
