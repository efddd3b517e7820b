"""What is known of one cluster's services, and the endpoints that an origin means by it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal

from agent.envoy.inputs import Endpoint
from agent.protocol.items import Origin
from agent.protocol.report import (
    MOST_ENDPOINTS,
    MOST_ENDPOINTS_NAMED,
    MOST_HOSTS,
    MOST_LABELS,
    MOST_PORTS,
    MOST_SERVICES,
    DiscoveredService,
    ServicePort,
)

Delivery = Literal["isolated", "reachable", "cluster_ip", "ingress_controller"]


@dataclass(frozen=True)
class Port:
    """One port of a service, and its ready endpoints, sorted: pods, or what leads to them, which may be a DNS name."""

    name: str
    port: int
    protocol: str
    target_port: int | None
    """None if it has a name, or none is given."""
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class Service:
    namespace: str
    name: str
    type: str
    cluster_ip: str
    labels: tuple[tuple[str, str], ...] = ()
    """Sorted."""
    ports: tuple[Port, ...] = ()
    any_port: tuple[str, ...] = ()
    """Ready addresses whose EndpointSlices say nothing of ports."""
    external_name: str = ""
    hosts: tuple[str, ...] = ()
    """Under which an ingress controller leads to it, sorted; `*` is any."""
    delivery: Literal["isolated", "reachable", "cluster_ip", "ingress_controller", "external_name", "none"] = "reachable"
    """How it is reached."""
    reason: str = ""
    """Why it is not."""

    def endpoints(self, port: int) -> tuple[Endpoint, ...]:
        """Of the TCP port with this number; or else of the first one whose pods listen on it."""
        tcp = [candidate for candidate in self.ports if candidate.protocol == "TCP"]
        for candidate in tcp:
            if candidate.port == port:
                return candidate.endpoints
        for candidate in tcp:
            if candidate.target_port == port or any(endpoint.port == port for endpoint in candidate.endpoints):
                return candidate.endpoints
        return tuple(Endpoint(address, port) for address in self.any_port)

    @property
    def ready(self) -> int:
        """Distinct addresses."""
        return len({endpoint.address for port in self.ports for endpoint in port.endpoints} | {*self.any_port})


@dataclass(frozen=True)
class ServiceTable:
    """Services of one cluster. Never changed in place; equal tables mean the same endpoints, and comparing them is cheap."""

    cluster_id: str = ""
    """Empty: services are found without naming a cluster."""
    services: Mapping[str, Service] = field(default_factory=dict)
    """By `name.namespace`."""

    def report(self) -> tuple[DiscoveredService, ...]:
        """Sorted by namespace and name; the first `MOST_SERVICES`."""
        services = sorted(self.services.values(), key=lambda service: (service.namespace, service.name))[:MOST_SERVICES]
        most = min(MOST_ENDPOINTS, MOST_ENDPOINTS_NAMED // max(1, sum(len(service.ports) for service in services)))
        return tuple(self._reported(service, most) for service in services)

    def _reported(self, service: Service, most_endpoints: int) -> DiscoveredService:
        return DiscoveredService(
            name=service.name,
            namespace=service.namespace,
            cluster_id=self.cluster_id,
            type=service.type,
            cluster_ip=service.cluster_ip,
            labels=dict(service.labels[:MOST_LABELS]),
            ports=tuple(_reported_port(port, most_endpoints) for port in service.ports[:MOST_PORTS]),
            endpoints=service.ready,
            delivery=service.delivery,
            hosts=service.hosts[:MOST_HOSTS],
            reason=service.reason,
        )


def _reported_port(port: Port, most_endpoints: int) -> ServicePort:
    shown = tuple(_shown(endpoint) for endpoint in port.endpoints[:most_endpoints])
    return ServicePort(name=port.name, port=port.port, protocol=port.protocol, endpoints=shown)


def _shown(endpoint: Endpoint) -> str:
    address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
    return f"{address}:{endpoint.port}"


Names = Mapping[str, tuple[str, ...]]
"""DNS name to its addresses, sorted; a name that is missing has not been resolved yet."""


def resolve(origin: Origin, tables: Iterable[ServiceTable], names: Names | None = None) -> tuple[Endpoint, ...]:
    """The endpoints that an origin means now, sorted.

    `origin.port` is the port of the service, as F5 XC has it. If the service has no such port, it is the port on which its pods listen.
    """
    if origin.type == "ip":
        return (Endpoint(origin.address or "", origin.port),)
    found = {each for named in _named(origin, tables) for each in _addressed(named, names or {})}
    return tuple(sorted(found))


def needed_names(origin: Origin, tables: Iterable[ServiceTable]) -> frozenset[str]:
    """DNS names that `resolve` looks up for an origin."""
    return frozenset(named.address for named in _named(origin, tables) if not _is_address(named.address))


def _named(origin: Origin, tables: Iterable[ServiceTable]) -> tuple[Endpoint, ...]:
    """Its endpoints, some of which may be DNS names."""
    if origin.type != "k8s_service":
        return (Endpoint(origin.address or "", origin.port),)
    service = _service(origin, tables)
    if service is None:
        return ()
    return (Endpoint(service.external_name, origin.port),) if service.external_name else service.endpoints(origin.port)


def _service(origin: Origin, tables: Iterable[ServiceTable]) -> Service | None:
    """Of the first cluster with this id that has it: services of several clusters never mix."""
    name, _, cluster_id = (origin.service or "").partition(":")
    return next((table.services[name] for table in tables if table.cluster_id == cluster_id and name in table.services), None)


def _addressed(endpoint: Endpoint, names: Names) -> tuple[Endpoint, ...]:
    if _is_address(endpoint.address):
        return (endpoint,)
    return tuple(Endpoint(address, endpoint.port) for address in names.get(endpoint.address, ()))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
