"""Which places a load balancer needs: a protocol on an address and port of a site's network, and a domain there."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

from agent.protocol.items import Network
from controlplane.compile.intent import CACHE, Intent
from controlplane.compile.members import Topology, topology
from controlplane.resources.advertise import AdvertiseWhere, Publish
from controlplane.resources.base import Stored, chosen
from controlplane.resources.claim import Claim, Place, Protocol
from controlplane.resources.http_loadbalancer import HttpLoadBalancer
from controlplane.resources.scalars import port_ranges
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer

LoadBalancer = HttpLoadBalancer | TcpLoadBalancer

PUBLIC: Network = "outside"
"""The one network of regional edges."""
REDIRECT_PORT = 80
"""Where `http_redirect` listens."""

_NETWORKS: dict[str, tuple[Network, ...]] = {
    "SITE_NETWORK_INSIDE_AND_OUTSIDE": ("inside", "outside"),
    "SITE_NETWORK_INSIDE": ("inside",),
    "SITE_NETWORK_OUTSIDE": ("outside",),
    "SITE_NETWORK_SERVICE": ("service",),
    "SITE_NETWORK_SPECIFIED_VIP_INSIDE": ("inside",),
    "SITE_NETWORK_SPECIFIED_VIP_OUTSIDE": ("outside",),
}


def claims(load_balancer: Stored[LoadBalancer], intent: Intent) -> frozenset[Claim]:
    """At all sites where it is advertised; none while it is disabled."""
    return frozenset() if load_balancer.metadata.disable else claimed(load_balancer, topology(intent))


@lru_cache(CACHE)
def claimed(load_balancer: Stored[LoadBalancer], topology: Topology) -> frozenset[Claim]:
    spec = load_balancer.spec
    protocol: Protocol = "tcp" if isinstance(spec, TcpLoadBalancer) else "https" if spec.https else "http"
    domains = ("",) if isinstance(spec, TcpLoadBalancer) else spec.domains
    places = {place for where in advertised(spec) for place in _places(where, _own_ports(spec), topology)}
    if spec.advertise_on_public_default_vip:
        places |= {Place(edge, PUBLIC, "", port) for edge in topology.edges for port in _own_ports(spec)}
    taken = {Claim(*place, protocol, domain) for place in places for domain in domains}
    if isinstance(spec, HttpLoadBalancer) and spec.https and spec.https.http_redirect:
        redirects = {place._replace(port=REDIRECT_PORT) for place in places} - places
        taken |= {Claim(*place, "http", domain) for place in redirects for domain in domains}
    return frozenset(taken)


def advertised(spec: LoadBalancer) -> tuple[AdvertiseWhere, ...]:
    return spec.advertise_custom.advertise_where if spec.advertise_custom else ()


def asking(spec: LoadBalancer, place: Place, topology: Topology) -> str:
    """JSON path of what asks for a place."""
    for index, where in enumerate(advertised(spec)):
        if place in _places(where, _own_ports(spec), topology):
            return f"spec.advertise_custom.advertise_where[{index}]"
    return "spec.advertise_on_public_default_vip" if place.port in _own_ports(spec) else "spec.https.http_redirect"


def published(spec: LoadBalancer, topology: Topology) -> Iterator[tuple[str, Publish, tuple[int, ...]]]:
    """Sites, the Services that lead to the load balancer there, and on which ports."""
    redirects = (REDIRECT_PORT,) if isinstance(spec, HttpLoadBalancer) and spec.https and spec.https.http_redirect else ()
    for where in advertised(spec):
        if where.publish:
            ports = _ports(where.port, where.port_ranges) or _own_ports(spec)
            for site_id in sorted({site_id for site_id, _, _ in _networks(where, topology)} - topology.edges):
                yield site_id, where.publish, (*ports, *redirects)


def refused_on_edges(where: AdvertiseWhere, topology: Topology) -> str:
    """Why it cannot be had on the regional edges that it means; empty if it can, or means none."""
    name, place = chosen(where, "choice")
    outside = name != "vk8s_service" and PUBLIC in _NETWORKS[place.network] and not getattr(place, "ip", None)
    if outside or not topology.edges.intersection(_sites(place, topology)):
        return ""
    return "regional edges have the outside network alone, and no VIPs"


def _own_ports(spec: LoadBalancer) -> tuple[int, ...]:
    """What `use_default_port` stands for."""
    if isinstance(spec, TcpLoadBalancer):
        return _ports(spec.listen_port, spec.port_ranges)
    if spec.https:
        return _ports(spec.https.port, spec.https.port_ranges) or (443,)
    return (_ports(spec.http.port, spec.http.port_ranges) if spec.http else ()) or (80,)


def _ports(port: int | None, ranges: str | None) -> tuple[int, ...]:
    if ranges:
        return tuple(number for first, last in port_ranges(ranges) for number in range(first, last + 1))
    return (port,) if port else ()


def _places(where: AdvertiseWhere, own_ports: tuple[int, ...], topology: Topology) -> Iterator[Place]:
    ports = _ports(where.port, where.port_ranges) or own_ports
    for site_id, network, vip in _networks(where, topology):
        address = vip or _site_vip(topology, site_id, network)
        for port in ports:
            yield Place(site_id, network, address, port)


def _networks(where: AdvertiseWhere, topology: Topology) -> Iterator[tuple[str, Network, str]]:
    """Sites with network and VIP, where one is given. A VIP belongs to one network, so on both it is taken to be inside."""
    name, place = chosen(where, "choice")
    vip = getattr(place, "ip", None) or ""
    networks = ("service",) if name == "vk8s_service" else _NETWORKS[place.network]
    for site_id in _sites(place, topology):
        if site_id in topology.edges:
            if PUBLIC in networks and not vip:
                yield site_id, PUBLIC, ""
            continue
        for network in networks[:1] if vip else networks:
            yield site_id, network, vip


def _sites(place: object, topology: Topology) -> Iterable[str]:
    return topology.located(getattr(place, "site", None), getattr(place, "virtual_site", None))


def _site_vip(topology: Topology, site_id: str, network: Network) -> str:
    site = topology.sites[site_id].spec
    return {"inside": site.inside_vip, "outside": site.outside_vip, "service": None}[network] or ""
