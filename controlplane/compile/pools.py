"""Origin pools as items: the same for the sites that call one and those that serve it."""

from functools import lru_cache
from typing import Any, NamedTuple

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.intent import CACHE
from controlplane.compile.load_balancers import Algorithm
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem
from controlplane.compile.tls import origin_tls
from controlplane.resources.base import Stored, chosen
from controlplane.resources.healthcheck import Healthcheck, HttpHealthCheck
from controlplane.resources.origin_pool import AdvancedOptions, OriginPool, OriginServer
from controlplane.resources.scalars import status_range

_NETWORKS: dict[str, items.Network] = {"inside_network": "inside", "outside_network": "outside", "vk8s_networks": "service"}


class Locations(NamedTuple):
    """Where a pool's origin servers are."""

    each: tuple[tuple[str, ...] | None, ...]
    """By origin server, ids of the sites that can reach it, sorted; None: any site."""
    all: frozenset[str]
    """Sites that serve the pool to others."""
    anywhere: bool
    """Whether some origin server can be reached from any site."""


@lru_cache(CACHE)
def locations(pool: Stored[OriginPool], topology: Topology) -> Locations:
    each = tuple(_sites(server, topology) for server in pool.spec.origin_servers)
    return Locations(each, frozenset(site for sites in each for site in sites or ()), None in each)


@lru_cache(CACHE)
def pool_item(
    pool: Stored[OriginPool],
    health_checks: tuple[Stored[Healthcheck], ...],
    sites: tuple[tuple[str, ...] | None, ...],
    override: Algorithm,
    lost_sites: items.LostSites,
) -> CompiledItem:
    """`sites` are `Locations.each`; `override` is what `LB_OVERRIDE` stands for. Origin servers that are nowhere are left out."""
    spec = pool.spec
    options = spec.advanced_options or AdvancedOptions()
    reuse = spec.upstream_conn_pool_reuse_type
    body = items.OriginPool(
        origins=_origins(spec, sites),
        algorithm=override if spec.loadbalancer_algorithm == "LB_OVERRIDE" else spec.loadbalancer_algorithm,
        selection=spec.endpoint_selection,
        health_checks=tuple(_health_check(stored.spec) for stored in health_checks),
        health_check_port=spec.health_check_port,
        tls=origin_tls(spec.use_tls) if spec.use_tls else None,
        http=_http(options),
        connection_timeout=options.connection_timeout or 2_000,
        http_idle_timeout=options.http_idle_timeout or 300_000,
        outlier_detection=_outlier_detection(options),
        circuit_breaker=_circuit_breaker(options),
        circuit_breaker_disabled=options.disable_circuit_breaker is not None,
        panic_threshold_percent=options.panic_threshold or 0,
        connection_reuse=reuse is None or reuse.disable_conn_pool_reuse is None,
        lost_sites=lost_sites,
    )
    return CompiledItem.of(ItemKind.ORIGIN_POOL, str(pool.key), body)


def _sites(server: OriginServer, topology: Topology) -> tuple[str, ...] | None:
    _, origin = chosen(server, "choice")
    locator = getattr(origin, "site_locator", None)
    return tuple(sorted(topology.located(locator.site, locator.virtual_site) - topology.edges)) if locator else None


def _origins(spec: OriginPool, sites: tuple[tuple[str, ...] | None, ...]) -> tuple[items.Origin, ...]:
    """Sorted by key. Servers that differ in nothing that tells origins apart are one."""
    found: dict[str, items.Origin] = {}
    for server, at in zip(spec.origin_servers, sites, strict=True):
        if at != () and spec.port:
            origin = _origin(server, spec.port, at)
            found.setdefault(origin.key, origin)
    return tuple(found[key] for key in sorted(found))


def _origin(server: OriginServer, port: int, sites: tuple[str, ...] | None) -> items.Origin:
    name, origin = chosen(server, "choice")
    network = _NETWORKS[chosen(origin, "network_choice")[0]] if sites is not None else "inside"
    target = _target(origin)
    return items.Origin(
        key="|".join((name, target, *_where(origin, network))),
        type="k8s_service" if name == "k8s_service" else "ip" if name.endswith("_ip") else "dns",
        service=target if name == "k8s_service" else None,
        address=None if name == "k8s_service" else target,
        refresh_interval_s=getattr(origin, "refresh_interval", 0),
        port=port,
        sites=sites,
        network=network,
    )


def _target(origin: Any) -> str:
    """The field that names it."""
    return str(next(value for name in ("service_name", "ip", "dns_name") if (value := getattr(origin, name, None))))


def _where(origin: Any, network: str) -> tuple[str, ...]:
    locator = getattr(origin, "site_locator", None)
    if locator is None:
        return ()
    name, ref = chosen(locator, "choice")
    return f"{name} {ref.key}", network


def _http(options: AdvancedOptions) -> Any:
    if options.http2_options:
        return "http2" if options.http2_options.enabled else "http1"
    return "auto" if options.auto_http_config else "http1"


def _outlier_detection(options: AdvancedOptions) -> items.OutlierDetection | None:
    wanted = options.outlier_detection
    if wanted is None:
        return None
    return items.OutlierDetection(
        consecutive_5xx=wanted.consecutive_5xx,
        consecutive_gateway_failure=wanted.consecutive_gateway_failure,
        interval=wanted.interval,
        base_ejection_time=wanted.base_ejection_time,
        max_ejection_percent=wanted.max_ejection_percent,
    )


def _circuit_breaker(options: AdvancedOptions) -> items.CircuitBreaker | None:
    limits = options.circuit_breaker
    if limits is None:
        return None
    return items.CircuitBreaker(
        connection_limit=limits.connection_limit,
        max_requests=limits.max_requests,
        pending_requests=limits.pending_requests,
        retries=limits.retries,
        priority=limits.priority,
    )


def _health_check(spec: Healthcheck) -> items.HealthCheck:
    http, tcp = spec.http_health_check, spec.tcp_health_check
    pace = items.HealthCheck(
        interval_s=spec.interval,
        timeout_s=spec.timeout,
        healthy_threshold=spec.healthy_threshold,
        unhealthy_threshold=spec.unhealthy_threshold,
        jitter_percent=spec.jitter_percent,
    )
    if http:
        return pace.model_copy(update=_http_check(http))
    payloads = {"tcp_send": tcp.send_payload, "tcp_receive": tcp.expected_response} if tcp else {}
    return pace.model_copy(update={"tcp": True, **payloads})


def _http_check(http: HttpHealthCheck) -> dict[str, object]:
    return {
        "http_path": http.path,
        "http_host": http.host_header or "",
        "http_headers": tuple(items.HeaderValue(name=name, value=value) for name, value in sorted(http.headers.items())),
        "http_headers_remove": http.request_headers_to_remove,
        "http2": http.use_http2,
        "expected_statuses": tuple(status_range(code) for code in http.expected_status_codes),
    }
