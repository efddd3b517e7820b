"""What Envoy is started with. Everything that can change comes over ADS."""

from typing import Any

from agent.envoy.access import PREFIX
from agent.envoy.inputs import NodeIdentity

MAX_CONNECTIONS = 50_000
MAX_HEAP_BYTES = 2 * 1024**3
MAX_REGEX_PROGRAM = 10_000
"""Twice what the control plane accepts by its estimate; Envoy's own default is 100."""
DIALLED_TUNNELS = "dialled_tunnels"
ACCEPTED_TUNNELS = "accepted_tunnels"
"""Prefixes of statistics."""
MAX_TUNNELS_PER_NODE = 256
LATENCY_BUCKETS_MS = (0.5, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000)
_KEPT_STATS = (
    {"prefix": f"{PREFIX}."},
    {"prefix": "cluster.site|"},
    {"suffix": ".membership_healthy"},
    {"suffix": ".membership_total"},
    {"prefix": "cluster_manager."},
    {"prefix": "listener_manager."},
    {"prefix": "server."},
    {"prefix": "overload."},
    {"prefix": "control_plane."},
    {"prefix": "http.ingress."},
    {"prefix": "http.gateway."},
    {"prefix": "http.relay."},
    {"prefix": "cluster.edge|"},
    {"safe_regex": {"regex": r"cluster\.path\|.*\.ssl\..*"}},
    {"prefix": "cluster.reverse|"},
    {"prefix": f"{DIALLED_TUNNELS}."},
    {"prefix": f"{ACCEPTED_TUNNELS}."},
    {"prefix": "reverse_tunnel."},
)
"""A cluster has about a hundred others, which nobody reads."""


def bootstrap(
    node: NodeIdentity, run_dir: str, *, max_connections: int = MAX_CONNECTIONS, max_heap_bytes: int = MAX_HEAP_BYTES
) -> dict[str, Any]:
    """As JSON. It holds nothing that a renewed certificate or a new snapshot changes, so that Envoy need not restart for them."""
    return {
        "node": {"id": node.node_id, "cluster": node.site_id, "locality": {"zone": node.site_id}},
        "admin": {"address": {"pipe": {"path": f"{run_dir}/admin.sock", "mode": 0o600}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {"clusters": [_xds(f"{run_dir}/xds.sock")]},
        "bootstrap_extensions": [
            _extension("envoy.bootstrap.internal_listener", "envoy.extensions.bootstrap.internal_listener.v3.InternalListener"),
            *_reverse_tunnels(),
        ],
        "layered_runtime": {"layers": [{"name": "limits", "static_layer": {"re2.max_program_size.error_level": MAX_REGEX_PROGRAM}}]},
        "overload_manager": _overload(max_connections, max_heap_bytes),
        "stats_config": {
            "stats_matcher": {"inclusion_list": {"patterns": list(_KEPT_STATS)}},
            "histogram_bucket_settings": [{"match": {"prefix": f"{PREFIX}."}, "buckets": list(LATENCY_BUCKETS_MS)}],
        },
        "stats_flush_interval": "2s",
    }


def _reverse_tunnels() -> tuple[dict[str, Any], dict[str, Any]]:
    """Both ends. Detailed statistics are the only ones there are: tunnels by host that was dialled, and by node that dialled."""
    kind = "envoy.bootstrap.reverse_tunnel"
    message = "envoy.extensions.bootstrap.reverse_tunnel"
    return (
        _extension(
            f"{kind}.downstream_socket_interface",
            f"{message}.downstream_socket_interface.v3.DownstreamReverseConnectionSocketInterface",
            stat_prefix=DIALLED_TUNNELS,
            enable_detailed_stats=True,
            max_reconnect_backoff="2s",
            maintain_interval="1s",
        ),
        _extension(
            f"{kind}.upstream_socket_interface",
            f"{message}.upstream_socket_interface.v3.UpstreamReverseConnectionSocketInterface",
            stat_prefix=ACCEPTED_TUNNELS,
            enable_detailed_stats=True,
            enable_tenant_isolation=True,
            max_connections_per_node=MAX_TUNNELS_PER_NODE,
        ),
    )


def _xds(socket: str) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": {"pipe": {"path": socket}}}}
    http2: dict[str, Any] = {"explicit_http_config": {"http2_protocol_options": {}}}
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": "xds",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {options: {"@type": f"type.googleapis.com/{options}", **http2}},
    }


def _extension(name: str, message: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{message}", **fields}}


def _overload(max_connections: int, max_heap_bytes: int) -> dict[str, Any]:
    """Beyond the limits: first idle connections are closed, then requests refused, then connections."""
    heap, connections = "envoy.resource_monitors.fixed_heap", "envoy.resource_monitors.global_downstream_max_connections"
    monitors = "envoy.extensions.resource_monitors"
    return {
        "refresh_interval": "0.5s",
        "resource_monitors": [
            _extension(heap, f"{monitors}.fixed_heap.v3.FixedHeapConfig", max_heap_size_bytes=max_heap_bytes),
            _extension(
                connections,
                f"{monitors}.downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=max_connections,
            ),
        ],
        "actions": [
            _action("envoy.overload_actions.disable_http_keepalive", heap, 0.92),
            _action("envoy.overload_actions.stop_accepting_requests", heap, 0.95),
            _action("envoy.overload_actions.stop_accepting_connections", heap, 0.98),
        ],
    }


def _action(name: str, monitor: str, threshold: float) -> dict[str, Any]:
    return {"name": name, "triggers": [{"name": monitor, "threshold": {"value": threshold}}]}
