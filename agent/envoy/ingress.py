"""Listeners on which applications call load balancers: one per address and port, whatever networks share it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from envoy.config.listener.v3.listener_pb2 import Listener as ListenerMessage
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2 import HeaderMutation
from envoy.extensions.filters.http.header_to_metadata.v3.header_to_metadata_pb2 import Config as HeaderToMetadata
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBAC as RbacFilter  # noqa: N811  # RBAC is the name of two messages
from envoy.extensions.filters.listener.tls_inspector.v3.tls_inspector_pb2 import TlsInspector
from google.protobuf.message import Message

from agent.envoy import access, callers, connections, names, retries, tls
from agent.envoy.gateway import RBAC_FILTER
from agent.envoy.inputs import Item, ItemId, body
from agent.envoy.messages import MIB, Fields, extension, flag, milliseconds, number, socket_address
from agent.envoy.pools import CACHE
from agent.envoy.resources import LISTENER, Part, Resource, assembled, part, resource
from agent.envoy.routes import HEADER_MUTATION_FILTER
from agent.envoy.stickiness import HEADER_TO_METADATA_FILTER
from agent.protocol.items import HttpLoadBalancer

_STREAM_IDLE_MS = 300_000
_CONNECTION_IDLE_MS = 300_000
_MAX_HEADERS = 100
_MAX_DIRECT_RESPONSE = 65_536


@dataclass(frozen=True)
class Bind:
    """Where one Envoy listener listens."""

    address: str
    port: int
    protocol: str

    @property
    def name(self) -> str:
        return f"{self.address}|{self.port}"


def https_routes_name(bind: Bind, load_balancer: str) -> str:
    """Each TLS load balancer has its own routes, so that a name in SNI opens no other one's."""
    return f"{bind.name}|{load_balancer}"


@lru_cache(CACHE)
def http_listener(bind: Bind, sources: frozenset[ItemId], max_header_kib: int) -> Resource:
    """All load balancers of a plain HTTP port share one filter chain; which they are is in its routes alone."""
    chain = {"filters": [_manager(bind.name, max_header_kib)]}
    return resource(listener_message(bind, [chain]), sources)


def https_listener(bind: Bind, load_balancers: Iterable[Item], sources: Iterable[ItemId]) -> Resource:
    """A filter chain per load balancer, chosen by SNI."""
    parts = [_tls_head(bind), *[_tls_chain(bind, item) for item in load_balancers]]
    return assembled(LISTENER, bind.name, parts, sources)


@lru_cache(CACHE)
def _tls_head(bind: Bind) -> Part:
    """A listener without filter chains, which are appended to it."""
    inspector = extension("envoy.filters.listener.tls_inspector", TlsInspector())
    return part(listener_message(bind, [], listener_filters=[inspector]))


@lru_cache(CACHE)
def _tls_chain(bind: Bind, item: Item) -> Part:
    lb = body(item, HttpLoadBalancer)
    assert lb.tls is not None
    named = [] if "*" in lb.domains else list(lb.domains)
    chain = {
        "name": item.id.key,
        "filter_chain_match": {"server_names": named},
        "filters": [_manager(https_routes_name(bind, item.id.key), lb.max_request_header_kib)],
        "transport_socket": tls.server(lb.tls),
        "transport_socket_connect_timeout": milliseconds(connections.REQUEST_HEADERS_TIMEOUT_MS),
    }
    return part(ListenerMessage(filter_chains=[chain]))


def listener_message(bind: Bind, chains: Sequence[Fields], **fields: object) -> ListenerMessage:
    return ListenerMessage(
        name=bind.name,
        address=socket_address(bind.address, bind.port),
        filter_chains=chains,
        per_connection_buffer_limit_bytes=number(MIB),
        **fields,
    )


def _manager(routes: str, max_header_kib: int) -> Fields:
    """Nothing that a client says of itself is believed: not its address, not that it is internal, not what only nodes may say."""
    return connections.manager(
        stat_prefix="ingress",
        route_config_name=routes,
        to_origins=True,
        codec_type="AUTO",
        use_remote_address=flag(True),
        internal_address_config={},
        forward_client_cert_details="SANITIZE",
        strip_any_host_port=True,
        strip_trailing_host_dot=True,
        normalize_path=flag(True),
        merge_slashes=True,
        path_with_escaped_slashes_action="REJECT_REQUEST",
        early_header_mutation_extensions=connections.early_mutations(
            connections.without_prefix(names.PRIVATE_HEADERS), connections.without_prefix(connections.ENVOY_HEADERS)
        ),
        http_filters=[
            _where_wanted(HEADER_TO_METADATA_FILTER, HeaderToMetadata()),
            _where_wanted(callers.PODS_FILTER, RbacFilter()),
            _where_wanted(HEADER_MUTATION_FILTER, HeaderMutation()),
            _where_wanted(RBAC_FILTER, RbacFilter()),
            retries.method_filter(),
        ],
        upgrade_configs=[{"upgrade_type": "websocket", "enabled": flag(False)}],
        http2_protocol_options={
            "allow_connect": True,
            "max_concurrent_streams": number(100),
            "initial_stream_window_size": number(65_536),
            "initial_connection_window_size": number(MIB),
        },
        common_http_protocol_options={
            "idle_timeout": milliseconds(_CONNECTION_IDLE_MS),
            "max_headers_count": number(_MAX_HEADERS),
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        max_request_headers_kb=number(max_header_kib),
        stream_idle_timeout=milliseconds(_STREAM_IDLE_MS),
        server_header_transformation="PASS_THROUGH",
        access_log=[access.http_log()],
    )


def _where_wanted(name: str, filter: Message) -> Fields:
    """Costs nothing for requests whose virtual host or route has no config for it."""
    return {**extension(name, filter), "disabled": True}


@lru_cache(CACHE)
def misdirected(domains: tuple[str, ...]) -> Part:
    """A virtual host for what belongs on another connection.

    Browsers take one connection for all names that its certificate has, whichever load balancers they are of; upon 421 they try a new one.
    """
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 421}}
    return part(RouteConfiguration(virtual_hosts=[{"name": "misdirected", "domains": domains, "routes": [route]}]))


@lru_cache(CACHE)
def routes_head(name: str) -> Part:
    """A RouteConfiguration without virtual hosts, which are appended to it. Origins cannot send the marker to clients.

    Of a port that is missing after its colon, or no number, Envoy strips nothing: here it does not count.
    """
    return part(
        RouteConfiguration(
            name=name,
            ignore_port_in_host_matching=True,
            response_headers_to_remove=[names.MARKER],
            max_direct_response_body_size_bytes=number(_MAX_DIRECT_RESPONSE),
        )
    )
