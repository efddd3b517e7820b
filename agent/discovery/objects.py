"""Kubernetes objects as far as discovery needs them: read once at the edge, small and comparable from there on.

Hints of EndpointSlices (`hints.forZones`, `forNodes`) are not followed: they spread the load of clients inside the cluster, each in a zone of it, and would
keep callers elsewhere from endpoints that are ready. `internalTrafficPolicy` likewise matters to cluster IPs only.
"""

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from lightkube.models import core_v1, discovery_v1
from lightkube.models.meta_v1 import ObjectMeta

from agent.discovery.table import Delivery, Port, Service
from agent.envoy.inputs import Endpoint

SERVICE_LABEL = "kubernetes.io/service-name"
MAX_LABELS = 64
"""Of a service, to be reported."""


@dataclass(frozen=True)
class DeclaredPort:
    name: str
    port: int
    protocol: str
    target_port: int | None
    node_port: int | None


@dataclass(frozen=True)
class DeclaredService:
    """A Service as written, without endpoints."""

    namespace: str
    name: str
    type: str
    cluster_ip: str
    labels: tuple[tuple[str, str], ...]
    ports: tuple[DeclaredPort, ...]
    external_name: str
    only_local: bool
    """`externalTrafficPolicy: Local`: a node answers for its own pods only."""
    only_inside: bool
    """`internalTrafficPolicy: Local`: the cluster IP leads from nodes to their own pods only."""
    cluster_ips: tuple[str, ...]
    """One of each family; none if it is headless."""
    families: tuple[int, ...]
    balancers: tuple[str, ...]
    """Addresses or names of its load balancer, as far as it has one."""

    @property
    def key(self) -> str:
        """As origins name it."""
        return f"{self.name}.{self.namespace}"


@dataclass(frozen=True)
class Ready:
    """An endpoint that may be used."""

    address: str
    node: str


@dataclass(frozen=True)
class Slice:
    """The usable part of an EndpointSlice."""

    namespace: str
    name: str
    service: str
    """`name.namespace`."""
    ports: tuple[tuple[str, str, int], ...]
    """(name, protocol, number)."""
    endpoints: tuple[Ready, ...]


@dataclass(frozen=True)
class Node:
    """A node; `addresses` are the internal ones, none while it is not ready."""

    name: str
    addresses: tuple[str, ...]


def read_service(body: core_v1.Service) -> DeclaredService:
    metadata, spec = body.metadata or ObjectMeta(), body.spec or core_v1.ServiceSpec()
    balanced = body.status.loadBalancer.ingress if body.status and body.status.loadBalancer else None
    return DeclaredService(
        namespace=metadata.namespace or "",
        name=metadata.name or "",
        type=spec.type or "ClusterIP",
        cluster_ip=spec.clusterIP or "",
        labels=_labels(metadata.labels),
        ports=tuple(_declared(port) for port in spec.ports or ()),
        external_name=(spec.externalName or "") if spec.type == "ExternalName" else "",
        only_local=spec.externalTrafficPolicy == "Local",
        only_inside=spec.internalTrafficPolicy == "Local",
        cluster_ips=tuple(filter(_is_address, spec.clusterIPs or (spec.clusterIP or "",))),
        families=tuple(6 if family == "IPv6" else 4 for family in spec.ipFamilies or ("IPv4",)),
        balancers=tuple(filter(None, (one.ip or one.hostname for one in balanced or ()))),
    )


def read_slice(body: discovery_v1.EndpointSlice) -> Slice | None:
    """None for a slice of no service, or of names instead of addresses."""
    metadata = body.metadata or ObjectMeta()
    service = (metadata.labels or {}).get(SERVICE_LABEL)
    if not service or body.addressType == "FQDN":
        return None
    return Slice(
        namespace=metadata.namespace or "",
        name=metadata.name or "",
        service=f"{service}.{metadata.namespace}",
        ports=tuple(_numbered(body.ports or ())),
        endpoints=tuple(Ready(one.addresses[0], one.nodeName or "") for one in body.endpoints or () if _usable(one)),
    )


def read_node(body: core_v1.Node) -> Node:
    metadata, status = body.metadata or ObjectMeta(), body.status or core_v1.NodeStatus()
    ready = any(condition.type == "Ready" and condition.status == "True" for condition in status.conditions or ())
    internal = (address.address for address in status.addresses or () if address.type == "InternalIP")
    return Node(metadata.name or "", tuple(sorted(filter(_is_address, internal))) if ready else ())


def discovered(declared: DeclaredService, slices: Iterable[Slice], nodes: Mapping[str, Node], delivery: Delivery) -> Service:
    """A service with its endpoints."""
    slices = tuple(slices)
    reason = _unreachable(declared, delivery)
    at: Callable[[DeclaredPort], tuple[Endpoint, ...]]
    if delivery == "reachable":
        at = partial(_at_pods, slices=slices)
    elif delivery == "isolated":
        at = partial(_at_nodes, addresses=node_addresses(declared, slices, nodes))
    else:
        at = partial(_at_cluster_ips, addresses=declared.cluster_ips if _hosts(slices) and not reason else ())
    return Service(
        namespace=declared.namespace,
        name=declared.name,
        type=declared.type,
        cluster_ip=declared.cluster_ip,
        labels=declared.labels,
        ports=tuple(Port(port.name, port.port, port.protocol, port.target_port, at(port)) for port in declared.ports),
        any_port=_without_ports(slices) if delivery == "reachable" else (),
        external_name=declared.external_name,
        delivery="external_name" if declared.external_name else "none" if reason else delivery,
        reason=reason,
    )


def _unreachable(declared: DeclaredService, delivery: Delivery) -> str:
    """Why this delivery cannot lead to a service, whatever its endpoints."""
    if declared.external_name:
        return ""
    if delivery == "isolated" and not any(port.node_port for port in declared.ports):
        return "it has no node port, and pods of an isolated cluster are reached through those only"
    if delivery == "cluster_ip" and not declared.cluster_ips:
        return "it is headless: it has no cluster IP"
    if delivery == "cluster_ip" and declared.only_inside:
        return "its internalTrafficPolicy is Local: its cluster IP leads nowhere from outside"
    return ""


def _at_pods(port: DeclaredPort, slices: Iterable[Slice]) -> tuple[Endpoint, ...]:
    """Slices name ports as the service does, also where the pods' port numbers differ."""
    found = {
        Endpoint(ready.address, number)
        for part in slices
        for name, protocol, number in part.ports
        if (name, protocol) == (port.name, port.protocol)
        for ready in part.endpoints
    }
    return tuple(sorted(found))


def _at_nodes(port: DeclaredPort, addresses: Iterable[str]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(address, port.node_port) for address in addresses) if port.node_port else ()


def _at_cluster_ips(port: DeclaredPort, addresses: Iterable[str]) -> tuple[Endpoint, ...]:
    return tuple(sorted(Endpoint(address, port.port) for address in addresses))


def _hosts(slices: Iterable[Slice]) -> set[str]:
    """Names of nodes with ready endpoints; an endpoint that is on none counts as on one without a name."""
    return {ready.node for part in slices for ready in part.endpoints}


def node_addresses(declared: DeclaredService, slices: tuple[Slice, ...], nodes: Mapping[str, Node]) -> tuple[str, ...]:
    """Nodes that lead to a ready endpoint; none if there is none."""
    hosts = _hosts(slices)
    if not hosts:
        return ()
    usable = [node for node in nodes.values() if node.name in hosts or not declared.only_local]
    addresses = {address for node in usable for address in node.addresses}
    return tuple(sorted(address for address in addresses if ipaddress.ip_address(address).version in declared.families))


def _without_ports(slices: Iterable[Slice]) -> tuple[str, ...]:
    return tuple(sorted({ready.address for part in slices if not part.ports for ready in part.endpoints}))


def _numbered(ports: Iterable[discovery_v1.EndpointPort]) -> Iterator[tuple[str, str, int]]:
    for port in ports:
        if port.port and 0 < port.port < 65_536:
            yield port.name or "", port.protocol or "TCP", port.port


def _usable(endpoint: discovery_v1.Endpoint) -> bool:
    """Missing conditions mean ready. A terminating endpoint is not used, nor one that does not serve but is published all the same."""
    conditions = endpoint.conditions or discovery_v1.EndpointConditions()
    usable = conditions.ready is not False and conditions.serving is not False and not conditions.terminating
    return usable and bool(endpoint.addresses) and _is_address(endpoint.addresses[0])


def _is_address(text: str) -> bool:
    """API servers check this; but one address that is none would make Envoy refuse all of them."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _declared(port: core_v1.ServicePort) -> DeclaredPort:
    target = port.targetPort if isinstance(port.targetPort, int) else None
    return DeclaredPort(port.name or "", port.port, port.protocol or "TCP", target, port.nodePort)


def _labels(labels: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((labels or {}).items())[:MAX_LABELS])
