"""Services that stand for load balancers, their EndpointSlices and ServiceImports, as they should be, held against what there is.

What is ours carries two labels; nothing without them is ever written. Each node has its own EndpointSlice of every Service, and the
Services are kept by whoever leads.
"""

import ipaddress
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightkube.generic_resource import GenericNamespacedResource
from lightkube.models.core_v1 import ServicePort, ServiceSpec
from lightkube.models.discovery_v1 import Endpoint, EndpointConditions, EndpointPort
from lightkube.models.meta_v1 import ObjectMeta, OwnerReference
from lightkube.resources.core_v1 import Service
from lightkube.resources.discovery_v1 import EndpointSlice
from msgspec.structs import replace

from agent.envoy.inputs import AgentSnapshot, ItemId, body
from agent.envoy.resources import LISTENER, ROUTES, Resources
from agent.multicluster import ServiceImport
from agent.protocol.items import LOAD_BALANCERS, ItemKind, Publish, PublishedPort

MANAGED_BY = "app.kubernetes.io/managed-by"
ISTHMUS = "isthmus"
SITE = "isthmus/site"
NODE = "isthmus/node"
_SERVICE = "kubernetes.io/service-name"
_SLICE_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"

Place = tuple[str, str]
"""Namespace and name of a Service."""


@dataclass(frozen=True)
class Publication:
    """A Service that should be there."""

    id: ItemId
    namespace: str
    name: str
    ports: tuple[PublishedPort, ...]
    served: tuple[PublishedPort, ...] = ()
    """Those at which this node's Envoy listens for their load balancers."""
    service_import: str = ""
    """Name of the ServiceImport that it gives its address."""
    clusters: tuple[str, ...] = ()
    """Those that this one is imported from."""

    @property
    def place(self) -> Place:
        return self.namespace, self.name


@dataclass(frozen=True)
class Publisher:
    """One node, as which it writes."""

    site_id: str
    node_id: str
    address: str | None
    """Where its Envoy serves the service network."""

    @property
    def site_labels(self) -> dict[str, str]:
        return {MANAGED_BY: ISTHMUS, SITE: self.site_id}

    @property
    def node_labels(self) -> dict[str, str]:
        return {**self.site_labels, NODE: self.node_id}

    def owns(self, found: Service | GenericNamespacedResource) -> bool:
        """As its site's."""
        return self.site_labels.items() <= _labels(found).items()

    def wrote(self, found: EndpointSlice) -> bool:
        return self.node_labels.items() <= _labels(found).items()


@dataclass(frozen=True)
class Change:
    verb: Literal["post", "put", "delete"]
    object: Service | EndpointSlice | GenericNamespacedResource
    place: Place
    """The Service that it is about."""


def is_published(labels: Mapping[str, str] | None) -> bool:
    """Whether an object with these labels is some site's, and so leads to a load balancer instead of pods."""
    return labels is not None and labels.get(MANAGED_BY) == ISTHMUS and SITE in labels


def publications(snapshot: AgentSnapshot, accepted: Resources | None, who: Publisher) -> tuple[Publication, ...]:
    """Those of a snapshot; `accepted` is what Envoy has."""
    listening = _listening(accepted, who.address) if accepted else {}
    return tuple([_publication(item.id, body(item, Publish), listening) for item in snapshot.by_kind[ItemKind.PUBLISH]])


def _publication(id: ItemId, publish: Publish, listening: Mapping[int, Collection[ItemId]]) -> Publication:
    namespace, _, name = id.key.partition("/")
    served = tuple(
        port for port in publish.ports if ItemId(LOAD_BALANCERS[port.protocol], port.load_balancer) in listening.get(port.target_port, ())
    )
    return Publication(id, namespace, name, publish.ports, served, publish.service_import, publish.clusters)


def _listening(accepted: Resources, address: str | None) -> Mapping[int, Collection[ItemId]]:
    """What is served at each port of the address. An HTTP listener's load balancers are in its routes."""
    found: dict[int, Collection[ItemId]] = {}
    for name, listener in accepted.by_type[LISTENER].items():
        host, _, port = name.rpartition("|")
        if host == address:
            routes = accepted.by_type[ROUTES].get(name)
            found[int(port)] = listener.sources | (routes.sources if routes else frozenset())
    return found


def obstacle(address: str | None) -> str:
    """Why nothing can be published at an address; empty if it can."""
    if address is None:
        return "this node has no address on the service network: set AGENT_SERVICE_ADDRESS"
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback or parsed.is_unspecified or parsed.is_link_local or parsed.is_multicast:
        return f"pods cannot be led to {address}, this node's address on the service network: set AGENT_SERVICE_ADDRESS"
    return ""


def imports(
    wanted: Iterable[Publication],
    owned: Mapping[Place, Service],
    found: Mapping[Place, GenericNamespacedResource],
    taken: Collection[Place],
    who: Publisher,
) -> Iterator[Change]:
    """What the leader changes of ServiceImports, which have the address of the Service that stands for them. Their status follows once they are there."""
    should = {
        (each.namespace, each.service_import): (each, spec)
        for each in wanted
        if each.service_import and each.place not in taken and (spec := _import_spec(each, owned.get(each.place)))
    }
    for place, each in found.items():
        if place not in should:
            yield Change("delete", each, place)
            continue
        publication, spec = should[place]
        status = {"clusters": [{"cluster": cluster} for cluster in publication.clusters]}
        if each.get("spec") != spec:
            yield Change("put", ServiceImport.from_dict({**each, "spec": spec}), publication.place)
        elif each.get("status") != status:
            yield Change("put", ServiceImport.Status.from_dict({**each, "status": status}), publication.place)
    for place, (publication, spec) in should.items():
        if place not in found:
            metadata = {"name": place[1], "namespace": place[0], "labels": who.site_labels}
            yield Change("post", ServiceImport.from_dict({"metadata": metadata, "spec": spec}), publication.place)


def _import_spec(publication: Publication, service: Service | None) -> dict[str, Any] | None:
    """None while the Service has no address."""
    address = service.spec.clusterIP if service and service.spec else None
    if not address or address == "None":
        return None
    ports = [{**({"name": port.name} if port.name else {}), "protocol": "TCP", "port": port.port} for port in publication.ports]
    return {"type": "ClusterSetIP", "ips": [address], "ports": ports}


def place_of(found: Service | EndpointSlice | GenericNamespacedResource) -> Place:
    """Of the Service that it is, or belongs to; a ServiceImport's own."""
    metadata = found.metadata or ObjectMeta()
    name = (metadata.labels or {}).get(_SERVICE) if isinstance(found, EndpointSlice) else metadata.name
    return metadata.namespace or "", name or ""


def services(wanted: Iterable[Publication], owned: Mapping[Place, Service], taken: Collection[Place], who: Publisher) -> Iterator[Change]:
    """What the leader changes; `taken` are names that cannot be had."""
    by_place = {each.place: each for each in wanted}
    for place, found in owned.items():
        if place not in by_place:
            yield Change("delete", found, place)
        elif (better := _mended(found, by_place[place])) != found:
            yield Change("put", better, place)
    for place, publication in by_place.items():
        if place not in owned and place not in taken:
            metadata = ObjectMeta(name=publication.name, namespace=publication.namespace, labels=who.site_labels)
            yield Change("post", Service(metadata=metadata, spec=ServiceSpec(type="ClusterIP", ports=_service_ports(publication))), place)


def slices(
    wanted: Iterable[Publication],
    owned: Mapping[Place, Service],
    found: Iterable[EndpointSlice],
    who: Publisher,
    is_gone: Callable[[str], bool] | None,
) -> Iterator[Change]:
    """What this node changes of its own ones; the leader, who knows which nodes are gone, also clears up behind others.

    A slice is there only together with a Service of ours: beside somebody else's it would draw traffic that is not ours.
    """
    ours = {each.place: each for each in wanted if each.place in owned}
    should = {place: _slice(each, owned[place], who) for place, each in ours.items() if each.served}
    kept: set[Place] = set()
    for each in found:
        place, node = place_of(each), _labels(each).get(NODE, "")
        if not who.wrote(each):
            if is_gone and (place not in ours or is_gone(node)):
                yield Change("delete", each, place)
        elif place not in should or not _is_of(each, should[place]):
            yield Change("delete", each, place)
        else:
            kept.add(place)
            if not _says(each, should[place]):
                yield Change("put", _instead(each, should[place]), place)
    for place, slice in should.items():
        if place not in kept:
            yield Change("post", slice, place)


def _mended(found: Service, publication: Publication) -> Service:
    """As it is, but for what makes it lead to us."""
    spec = replace(found.spec or ServiceSpec(), selector=None)
    if spec.type != "ClusterIP":
        spec = replace(spec, type="ClusterIP", externalName=None, externalTrafficPolicy=None)
    if _ports(spec) != _ports(ServiceSpec(ports=_service_ports(publication))):
        spec = replace(spec, ports=_service_ports(publication))
    return replace(found, spec=spec)


def _service_ports(publication: Publication) -> list[ServicePort]:
    return [ServicePort(name=port.name or None, port=port.port, protocol="TCP", targetPort=port.target_port) for port in publication.ports]


def _ports(spec: ServiceSpec) -> set[tuple[str, int, str | None, int | str | None]]:
    return {(port.name or "", port.port, port.protocol, port.targetPort) for port in spec.ports or ()}


def _slice(publication: Publication, service: Service, who: Publisher) -> EndpointSlice:
    """Goes with its Service, as the cluster's own garbage collector sees it, too."""
    assert service.metadata is not None
    assert who.address is not None
    owner = OwnerReference(apiVersion="v1", kind="Service", name=publication.name, uid=service.metadata.uid or "")
    labels = {**who.node_labels, _SERVICE: publication.name, _SLICE_MANAGED_BY: ISTHMUS}
    name = f"{publication.name}-{who.node_id}"
    return EndpointSlice(
        metadata=ObjectMeta(name=name, namespace=publication.namespace, labels=labels, ownerReferences=[owner]),
        addressType=f"IPv{ipaddress.ip_address(who.address).version}",
        endpoints=[Endpoint(addresses=[who.address], conditions=EndpointConditions(ready=True, serving=True, terminating=False))],
        ports=[EndpointPort(name=port.name, port=port.target_port, protocol="TCP") for port in publication.served],
    )


def _instead(found: EndpointSlice, should: EndpointSlice) -> EndpointSlice:
    """To be written only if nobody else has written meanwhile."""
    assert found.metadata is not None
    assert should.metadata is not None
    return replace(should, metadata=replace(should.metadata, resourceVersion=found.metadata.resourceVersion))


def _is_of(found: EndpointSlice, should: EndpointSlice) -> bool:
    """Whether it may become the other; the name and the family of addresses stay for ever, and another Service's is not ours to change."""
    assert found.metadata is not None
    assert should.metadata is not None
    return (found.metadata.name, found.addressType) == (should.metadata.name, should.addressType)


def _says(found: EndpointSlice, should: EndpointSlice) -> bool:
    assert found.metadata is not None
    assert should.metadata is not None
    owners = [(owner.kind, owner.uid) for owner in found.metadata.ownerReferences or ()]
    return (
        _labels(found).items() >= _labels(should).items()
        and owners == [(owner.kind, owner.uid) for owner in should.metadata.ownerReferences or ()]
        and [(one.addresses, bool(one.conditions and one.conditions.ready)) for one in found.endpoints or ()]
        == [(one.addresses, True) for one in should.endpoints or ()]
        and {(port.name or "", port.port, port.protocol) for port in found.ports or ()}
        == {(port.name or "", port.port, port.protocol) for port in should.ports or ()}
    )


def _labels(found: Service | EndpointSlice | GenericNamespacedResource) -> Mapping[str, str]:
    return (found.metadata.labels if found.metadata else None) or {}
