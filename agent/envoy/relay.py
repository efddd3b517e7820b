"""A regional edge's gateway: tunnels that sites of many tenants keep to it, and streams between sites of one tenant.

Each tenant has filter chains of its own, whose only anchor is that tenant's: the certificate decides whose site speaks, and the tenant's routes say
to which sites. What flows in a stream is a session between two sites, of which the edge sees ciphertext.
"""

from collections.abc import Sequence
from functools import lru_cache

from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.rbac.v3.rbac_pb2 import RBAC
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBAC as RbacFilter  # noqa: N811  # RBAC is the name of two messages
from envoy.extensions.filters.network.rbac.v3.rbac_pb2 import RBAC as NetworkRbac  # noqa: N811  # and of a third

from agent.envoy import connections, gateway, names, reverse, tls
from agent.envoy.clusters import TUNNEL_BUFFER, http2
from agent.envoy.inputs import Addresses, Item, Scope, body
from agent.envoy.messages import Fields, extension, milliseconds, number, socket_address
from agent.envoy.policy import matcher
from agent.envoy.pools import CACHE
from agent.envoy.predicates import Predicate, any_of, begins, peer_uri
from agent.envoy.resources import Resource, resource
from agent.protocol.items import Relay


def listener(relays: Sequence[Item], addresses: Addresses, scope: Scope) -> Resource:
    message = Listener(
        name=names.GATEWAY,
        address=socket_address(addresses.gateway_host, addresses.gateway_port),
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        listener_filters=[tls.inspector()],
        filter_chains=[chain for relay in relays for chain in _chains(relay, scope)],
    )
    return resource(message, [relay.id for relay in relays])


@lru_cache(CACHE)
def tenant(item: Item, scope: Scope) -> tuple[Resource, ...]:
    """What else there is for one tenant: its anchor, its tunnels and its routes."""
    relay = body(item, Relay)
    anchor = names.anchor(relay.tenant_id)
    return (
        tls.anchor(anchor, relay.anchor_pem, relay.crl_pem, item.id),
        reverse.cluster(relay.tenant_id, _nodes(relay, scope), anchor, (item.id,)),
        _routes(item, scope),
    )


def _nodes(relay: Relay, scope: Scope) -> str:
    return names.tenant_uri(scope.trust_domain, relay.tenant_id)


@lru_cache(CACHE)
def _chains(item: Item, scope: Scope) -> tuple[Fields, Fields]:
    relay = body(item, Relay)
    anchor = names.anchor(relay.tenant_id)
    streams = {
        "filter_chain_match": {"server_names": [names.relay_server_name(relay.tenant_id)]},
        "filters": [_manager(relay)],
        "transport_socket": tls.from_node(_nodes(relay, scope), anchor),
        "transport_socket_connect_timeout": milliseconds(connections.HANDSHAKE_TIMEOUT_MS),
    }
    listed = NetworkRbac(stat_prefix=names.REVERSE, matcher=matcher([(_from(relay, scope), "ALLOW"), (True, "DENY")]))
    tunnels = reverse.handshakes(relay.tenant_id, _nodes(relay, scope), anchor, extension("envoy.filters.network.rbac", listed))
    return streams, tunnels


def _from(relay: Relay, scope: Scope) -> Predicate:
    return any_of(begins(peer_uri(), names.site_uri(scope.trust_domain, relay.tenant_id, site)) for site in relay.sites)


def _manager(relay: Relay) -> Fields:
    return connections.manager(
        stat_prefix=names.RELAY,
        route_config_name=names.relay_server_name(relay.tenant_id),
        codec_type="HTTP2",
        http2_protocol_options=http2(connection_keepalive=connections.keepalive(connections.KEEPALIVE_AT_GATEWAYS_MS)),
        stream_idle_timeout=milliseconds(0),
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        http_filters=[extension(gateway.RBAC_FILTER, RbacFilter(rules=RBAC(action="ALLOW")))],
    )


def _routes(item: Item, scope: Scope) -> Resource:
    """To the tenant's sites, from the tenant's sites; and this node's own document, for them alone."""
    relay = body(item, Relay)
    allowed = gateway.rbac([(_from(relay, scope), "ALLOW")])
    hosts: list[object] = [gateway.documents(allowed)]
    if relay.sites:
        guarded = {gateway.RBAC_FILTER: allowed}
        hosts.append(reverse.host(relay.tenant_id, relay.tenant_id, relay.sites, typed_per_filter_config=guarded))
    return resource(RouteConfiguration(name=names.relay_server_name(relay.tenant_id), virtual_hosts=hosts), [item.id])
