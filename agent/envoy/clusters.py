"""Clusters of origin pools: the origins that this site dials, the sites that serve the rest, and orders of both."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.extensions.clusters.aggregate.v3.cluster_pb2 import ClusterConfig as AggregateCluster
from envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2 import HeaderMutation
from envoy.extensions.filters.http.upstream_codec.v3.upstream_codec_pb2 import UpstreamCodec
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions
from google.protobuf import any_pb2

from agent.envoy import names, tls
from agent.envoy.health import health_checks
from agent.envoy.inputs import Endpoint, Item, Scope, body
from agent.envoy.messages import (
    ADS,
    MIB,
    Fields,
    about,
    extension,
    header,
    internal_address,
    milliseconds,
    number,
    packed,
    socket_address,
    struct,
    unlimited,
)
from agent.envoy.pools import CACHE, PoolView, latest
from agent.envoy.resources import Resource, resource
from agent.protocol.items import CircuitBreaker, Origin, OriginPool, OutlierDetection

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
STREAM_WINDOW = 8 * MIB
"""Per stream between sites: a smaller one caps a stream at window / round-trip time."""
CONNECTION_WINDOW = 64 * MIB
TUNNEL_BUFFER = 4 * MIB
"""Per connection between sites."""
_RENEWED_MS = 60_000
LB_METADATA = "envoy.lb"
"""Of endpoints, by which Envoy narrows the choice among those of a cluster; it crosses internal listeners where `tls.internal` is told so."""
USABLE = {"usable": "1"}
"""Of paths to a site, those that may be used: what another site can serve as well asks for these, and goes there at once when they all fail."""
_LB_POLICIES = {"LB_OVERRIDE": "RING_HASH"}
"""Of the load balancer's hash policy; requests without one are spread at random."""


def http2(**fields: object) -> Fields:
    """HTTP/2 options for what flows between sites."""
    return {
        "allow_connect": True,
        "initial_stream_window_size": number(STREAM_WINDOW),
        "initial_connection_window_size": number(CONNECTION_WINDOW),
        "max_concurrent_streams": number(65_536),
        **fields,
    }


def local(view: PoolView, *, connected: bool) -> tuple[Resource, Resource]:
    """Cluster and endpoints of the origins that this site dials itself. `connected`: also for connections that are no HTTP."""
    return _local_cluster(view.item, view.scope, connected), _local_endpoints(view.item, view)


@lru_cache(CACHE)
def verifiable(item: Item) -> bool:
    """Whether what its origins' certificates have to be for is known without a Host header."""
    pool = body(item, OriginPool)
    return pool.tls is None or pool.tls.verify == "none" or bool(pool.tls.sni) or _by_name(pool)


def _by_name(pool: OriginPool) -> bool:
    return all(origin.type == "dns" for origin in pool.origins)


@lru_cache(CACHE)
def _local_cluster(item: Item, scope: Scope, connected: bool) -> Resource:
    pool = body(item, OriginPool)
    cluster = Cluster(
        name=names.pool(item.id.key),
        **_endpoints_by_ads(),
        **_balancing(pool),
        **_origin_connections(pool),
        **_origin_socket(pool, scope, connected),
        typed_extension_protocol_options={HTTP_OPTIONS: _origin_protocol(pool)},
    )
    return resource(cluster, [item.id])


def _endpoints_by_ads() -> Fields:
    return {"type": "EDS", "eds_cluster_config": {"eds_config": ADS}, "ignore_health_on_host_removal": True}


def _balancing(pool: OriginPool) -> Fields:
    return {
        "lb_policy": _LB_POLICIES.get(pool.algorithm, pool.algorithm),
        "common_lb_config": {"healthy_panic_threshold": {"value": pool.panic_threshold_percent}},
    }


def _origin_connections(pool: OriginPool) -> Fields:
    fields: Fields = {
        "connect_timeout": milliseconds(pool.connection_timeout),
        "per_connection_buffer_limit_bytes": number(MIB),
        "health_checks": health_checks(pool.health_checks),
        "circuit_breakers": unlimited() if pool.circuit_breaker_disabled else _limits(pool.circuit_breaker or CircuitBreaker()),
    }
    if pool.outlier_detection is not None:
        fields["outlier_detection"] = _outliers(pool.outlier_detection)
    return fields


def _limits(limits: CircuitBreaker) -> Fields:
    given = {
        "max_connections": limits.connection_limit,
        "max_requests": limits.max_requests,
        "max_pending_requests": limits.pending_requests,
        "max_retries": limits.retries,
    }
    return {"thresholds": [{"priority": limits.priority, **{name: number(value) for name, value in given.items() if value is not None}}]}


def _outliers(outliers: OutlierDetection) -> Fields:
    return {
        "consecutive_5xx": number(outliers.consecutive_5xx),
        "consecutive_gateway_failure": number(outliers.consecutive_gateway_failure),
        "enforcing_consecutive_gateway_failure": number(100),
        "enforcing_success_rate": number(0),
        "interval": milliseconds(outliers.interval),
        "base_ejection_time": milliseconds(outliers.base_ejection_time),
        "max_ejection_percent": number(outliers.max_ejection_percent),
    }


def _origin_socket(pool: OriginPool, scope: Scope, connected: bool) -> Fields:
    if pool.tls is None:
        return {}
    expected = [pool.tls.sni] if pool.tls.sni else []
    if not pool.tls.sni and not pool.tls.sni_from_host and _by_name(pool):
        expected = sorted({origin.address or "" for origin in pool.origins})
    by_origin = connected and pool.tls.sni_from_host and _by_name(pool)
    alpn = {"http1": ["http/1.1"], "http2": ["h2"], "auto": ["h2", "http/1.1"]}[pool.http]
    return {"transport_socket": tls.to_origin(pool.tls, alpn, scope.trusted_ca_file, expected, by_origin=by_origin)}


def _origin_protocol(pool: OriginPool) -> any_pb2.Any:
    per_connection = {} if pool.connection_reuse else {"max_requests_per_connection": number(1)}
    from_host = pool.tls is not None and pool.tls.sni_from_host
    verified = from_host and pool.tls is not None and pool.tls.verify != "none"
    options = HttpProtocolOptions(
        common_http_protocol_options={"idle_timeout": milliseconds(pool.http_idle_timeout), **per_connection},
        upstream_http_protocol_options={"auto_sni": from_host, "auto_san_validation": verified},
        http_filters=_origin_filters(),
        **_origin_version(pool),
    )
    return packed(options)


def _origin_version(pool: OriginPool) -> Fields:
    if pool.http == "auto" and pool.tls is not None:
        return {"auto_config": {"http_protocol_options": {}, "http2_protocol_options": {}}}
    if pool.http == "http2":
        return {"explicit_http_config": {"http2_protocol_options": {"allow_connect": True}}}
    return {"explicit_http_config": {"http_protocol_options": {}}}


def _origin_filters() -> list[Fields]:
    """Whichever way a request came, its origin sees nothing of what nodes tell each other, and cannot speak like one.

    The filter's name is its own: under the usual one it would take what routes say to the filter of that name on the downstream side.
    """
    removed = [{"remove_on_match": {"key_matcher": {"prefix": names.PRIVATE_HEADERS}}}]
    return _upstream_filters(
        "isthmus.private_headers_removed", {"request_mutations": removed, "response_mutations": [{"remove": names.MARKER}]}
    )


def _witnessing_filters() -> list[Fields]:
    """Of answers that may come from here or from elsewhere: only the export by which it came makes a marker worth believing."""
    mutation = {"append": header(names.MARKER, names.WITNESSED)}
    return _upstream_filters("isthmus.marker_witnessed", {"response_mutations": [mutation]})


def _upstream_filters(name: str, mutations: Fields) -> list[Fields]:
    mutation = HeaderMutation(mutations=mutations)
    return [extension(name, mutation), extension("envoy.filters.http.upstream_codec", UpstreamCodec())]


@latest
def _local_endpoints(item: Item, view: PoolView) -> Resource:
    name = names.pool(view.key)
    endpoints = [{"locality": {"zone": view.scope.site_id}, "lb_endpoints": list(_origin_endpoints(view))}]
    return resource(ClusterLoadAssignment(cluster_name=name, endpoints=endpoints, policy=_whole_priorities()), [item.id])


def _whole_priorities() -> Fields:
    """A priority is used until its last endpoint is gone; by default Envoy spills over while a part is still healthy."""
    return {"overprovisioning_factor": number(100_000)}


def _origin_endpoints(view: PoolView) -> Iterable[Fields]:
    pool = view.pool
    here = [origin for origin in pool.origins if origin.sites is None or view.scope.site_id in origin.sites]
    for origin, endpoints in zip(here, view.local or (), strict=True):
        for endpoint in endpoints:
            yield _origin_endpoint(pool, origin, endpoint, view.scope.site_id)


def _origin_endpoint(pool: OriginPool, origin: Origin, endpoint: Endpoint, site_id: str) -> Fields:
    check: Fields = {}
    if pool.health_check_port is not None:
        check = {"health_check_config": {"port_value": pool.health_check_port}}
    hostname = (origin.service or origin.address or "").partition(":")[0]
    return {
        "endpoint": {"address": socket_address(endpoint.address, endpoint.port), "hostname": hostname, **check},
        "metadata": about({"site": site_id}),
    }


def remote_http(view: PoolView) -> tuple[Resource, Resource]:
    """Cluster and endpoints of the other sites that serve an HTTP pool: HTTP/2 inside one CONNECT stream per worker and site."""
    return _remote_http_cluster(view.item, view.scope), _remote_http_endpoints(view.item, view)


@lru_cache(CACHE)
def _remote_http_cluster(item: Item, scope: Scope) -> Resource:
    """A stream stays on the path that it was opened on. So that none is used forever, each is replaced now and then where there are several."""
    pool = body(item, OriginPool)
    renewed = {"max_connection_duration": milliseconds(_RENEWED_MS)} if scope.edge_anchor_pem else {}
    options = HttpProtocolOptions(
        common_http_protocol_options={"idle_timeout": milliseconds(pool.http_idle_timeout), **renewed},
        explicit_http_config={"http2_protocol_options": http2()},
    )
    cluster = Cluster(
        name=names.remote(item.id.key),
        **_endpoints_by_ads(),
        **_balancing(pool),
        connect_timeout=milliseconds(pool.connection_timeout),
        per_connection_buffer_limit_bytes=number(MIB),
        circuit_breakers=unlimited(),
        transport_socket=tls.internal(passed=LB_METADATA),
        typed_extension_protocol_options={HTTP_OPTIONS: packed(options)},
    )
    return resource(cluster, [item.id])


@latest
def _remote_http_endpoints(item: Item, view: PoolView) -> Resource:
    name = names.remote(view.key)
    authority = names.export_authority("http", view.key)
    via, remote = dict(view.via), view.remote or ()
    alone = view.servers == 1

    def locality(site: str, weight: int) -> Fields:
        return _site_locality(site, weight, authority, names.tunnel(view.shard(site)), via.get(site), alone=alone)

    endpoints = [locality(site, weight) for site, weight in remote]
    endpoints += [{**locality(site, weight), "priority": min(1, len(remote))} for site, weight in view.spare]
    return resource(ClusterLoadAssignment(cluster_name=name, endpoints=endpoints, policy=_whole_priorities()), [item.id])


def _site_locality(site: str, weight: int, authority: str, tunnel: str, via: str | None, *, alone: bool) -> Fields:
    """One site as an endpoint: the internal listener `tunnel`, told which cluster and export to open. `alone`: nobody else can serve.

    When the path in use changes, so does the endpoint's address: new requests open a stream on the new path, and the old stream ends with
    the requests that are in it. Hashes of requests still fall on the same site.
    """
    metadata = about({"site": site, "cluster": names.site(site), "authority": authority, "export": "http"})
    if via is not None:
        metadata["filter_metadata"][LB_METADATA] = struct({"hash_key": f"envoy://{tunnel}/{site}"})
    elif not alone:
        metadata["filter_metadata"][LB_METADATA] = struct(USABLE)
    endpoint = {
        "endpoint": {"address": internal_address(tunnel, site if via is None else f"{site}/{via}")},
        "metadata": metadata,
        "load_balancing_weight": number(weight),
    }
    return {"locality": {"zone": site}, "lb_endpoints": [endpoint]}


@lru_cache(CACHE)
def order(clusters: tuple[str, ...]) -> Resource:
    """The first of these clusters with a usable endpoint: a name and a list of names, in which there is nothing that Envoy could refuse."""
    cluster = Cluster(
        name=names.first_of(clusters),
        lb_policy="CLUSTER_PROVIDED",
        cluster_type=extension("envoy.clusters.aggregate", AggregateCluster(clusters=clusters)),
        common_lb_config={"healthy_panic_threshold": {"value": 0}},
        circuit_breakers=unlimited(),
        typed_extension_protocol_options={HTTP_OPTIONS: packed(_aggregate_protocol(clusters))},
    )
    return resource(cluster, [])


def _aggregate_protocol(clusters: Sequence[str]) -> HttpProtocolOptions:
    """Upstream filters are those of the aggregate, not of its members.

    Where other sites are among them private headers must stay, also for origins of this site: what a filter takes away for one attempt
    is gone for the next, which may go to another site.
    """
    only_here = all(map(names.is_local, clusters))
    return HttpProtocolOptions(
        explicit_http_config={"http_protocol_options": {}}, http_filters=_origin_filters() if only_here else _witnessing_filters()
    )


def internal(name: str, site_id: str = "", **fields: Any) -> Resource:
    """The cluster of the internal listener of that name; `site_id`: the site that serves there."""
    cluster = Cluster(
        name=name,
        type="STATIC",
        connect_timeout=milliseconds(1_000),
        load_assignment={
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": internal_address(name)}, "metadata": about({"site": site_id})}]}],
        },
        circuit_breakers=unlimited(),
        transport_socket=tls.internal(),
        **fields,
    )
    return resource(cluster, [])
