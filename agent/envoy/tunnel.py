"""The internal listeners that lead to other sites, and the listener through which the agent asks them how they are."""

from collections.abc import Iterable

from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.network.set_filter_state.v3.set_filter_state_pb2 import Config as SetFilterState
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy

from agent.envoy import connections, names
from agent.envoy.clusters import TUNNEL_BUFFER
from agent.envoy.inputs import Item, ItemId, Scope, body
from agent.envoy.messages import (
    Fields,
    extension,
    milliseconds,
    number,
)
from agent.envoy.paths import DIRECT, Path
from agent.envoy.resources import Resource, resource
from agent.protocol.items import Peer
from agent.protocol.peering import PEER_AUTHORITY, PROBE_PATH_HEADER

_CONNECT_ATTEMPTS = 8
"""When a path breaks, it takes a moment until all of Envoy knows; attempts are spread over that."""


def listeners(peers: Iterable[Item], scope: Scope) -> Iterable[Resource]:
    """Of HTTP to these peers: one for each shard, so that a revocation ends the streams of few others."""
    for shard in sorted({scope.shard(peer.id.key, body(peer, Peer).tenant_id) for peer in peers}):
        yield listener(names.tunnel(shard), connections.of_shard(shard, scope))


def listener(name: str, metadata: Fields | None = None) -> Resource:
    """Internal listener: opens one CONNECT stream per connection, or just a connection if it is `direct`, as the endpoint that led here says."""
    cluster = names.metadata("cluster")
    state = {"object_key": "envoy.tcp_proxy.cluster", "format_string": {"text_format_source": {"inline_string": cluster}}}
    chosen = SetFilterState(on_new_connection=[state])
    proxy = TcpProxy(
        stat_prefix=name,
        cluster="none",
        max_connect_attempts=number(_CONNECT_ATTEMPTS),
        backoff_options={"base_interval": milliseconds(25), "max_interval": milliseconds(250)},
        idle_timeout=milliseconds(0),
        tunneling_config=None if name == names.DIRECT else {"hostname": names.metadata("authority")},
    )
    filters = [
        extension("envoy.filters.network.set_filter_state", chosen),
        extension("envoy.filters.network.tcp_proxy", proxy),
    ]
    message = Listener(
        name=name,
        internal_listener={},
        per_connection_buffer_limit_bytes=number(TUNNEL_BUFFER),
        filter_chains=[{"filters": filters, "metadata": metadata}],
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


def probe_routes(peers: Iterable[tuple[Item, tuple[Path, ...]]], edges: Iterable[Item]) -> Resource:
    """Hosts are peers, and regional edges themselves; a header chooses among the paths to a peer, where those are given."""
    sources: list[ItemId] = []
    hosts = []
    for peer, paths in peers:
        sources.append(peer.id)
        key = peer.id.key
        hosts.append({"name": names.site(key), "domains": [key], "routes": [*_probe_paths(key, paths), _asked(names.site(key))]})
    for edge in edges:
        sources.append(edge.id)
        key = edge.id.key
        hosts.append({"name": names.edge(key), "domains": [key], "routes": [_asked(names.edge(key))]})
    return resource(RouteConfiguration(name=names.PROBE, virtual_hosts=hosts), sources)


def _probe_paths(key: str, paths: tuple[Path, ...]) -> Iterable[Fields]:
    ways = [path.way.path for path in paths]
    if ways == [DIRECT] or not ways:
        return
    for way in ways:
        yield _asked(names.path(key, way), {"string_match": {"exact": way}})
    elsewhere = {"prefix": "/", "headers": [{"name": PROBE_PATH_HEADER, "present_match": True}]}
    yield {"match": elsewhere, "direct_response": {"status": 404, "body": {"inline_string": "there is no such path"}}}


def _asked(cluster: str, path: Fields | None = None) -> Fields:
    headers = {} if path is None else {"headers": [{"name": PROBE_PATH_HEADER, **path}]}
    action = {"cluster": cluster, "host_rewrite_literal": PEER_AUTHORITY, "timeout": milliseconds(5_000)}
    return {"match": {"prefix": "/", **headers}, "route": action}
