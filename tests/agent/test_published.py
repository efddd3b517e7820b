"""What is changed in a cluster, as a function of what is there."""

from collections.abc import Mapping
from dataclasses import replace as replaced
from types import MappingProxyType
from uuid import UUID

from lightkube.models.core_v1 import ServicePort, ServiceSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Service
from lightkube.resources.discovery_v1 import EndpointSlice
from msgspec.structs import replace

from agent.envoy.inputs import Addresses, AgentSnapshot, Item, ItemId, LocalState, NodeIdentity
from agent.envoy.render import render
from agent.protocol.base import Body, content_hash
from agent.protocol.items import (
    HttpLoadBalancer,
    ItemKind,
    Listener,
    Publish,
    PublishedPort,
    ServerTls,
    TcpLoadBalancer,
    TlsCertificate,
    WeightedPool,
)
from agent.published import Change, Place, Publication, Publisher, is_published, publications, services, slices
from tests.agent.wanted import SITE, pool

PLACE = ("shop", "backend")
WHO = Publisher("s1", "n1", "10.9.0.1")
PORT = PublishedPort(name="http-80", port=80, target_port=80, load_balancer="shop/lb", protocol="http")
WANTED = Publication(ItemId(ItemKind.PUBLISH, "shop/backend"), *PLACE, (PORT,), (PORT,))


def made(*wanted: Publication) -> dict[Place, Service]:
    """As the cluster has them after they were created."""
    found = {}
    for number, change in enumerate(services(wanted, {}, (), WHO)):
        assert isinstance(change.object, Service)
        assert change.object.metadata is not None
        metadata = replace(change.object.metadata, uid=f"uid-{number}", resourceVersion="1")
        found[change.place] = replace(change.object, metadata=metadata)
    return found


def written(who: Publisher = WHO, wanted: Publication = WANTED) -> EndpointSlice:
    (change,) = slices([wanted], made(wanted), [], who, None)
    assert isinstance(change.object, EndpointSlice)
    return change.object


def said(changes: list[Change]) -> list[tuple[str, str]]:
    return [(change.verb, change.object.metadata.name or "") for change in changes if change.object.metadata]


def item(kind: ItemKind, key: str, body: Body) -> Item:
    return Item(ItemId(kind, key), content_hash(body.canonical()), body)


def test_a_port_is_served_where_envoy_listens_for_its_load_balancer_at_the_service_address() -> None:
    """The load balancer `shop/lb` by HTTP and TLS, and `shop/lb` by TCP."""
    key = f"secret:{UUID(int=1)}:1"
    http = HttpLoadBalancer(domains=("*",), routes=(), tls=ServerTls(certificates=(TlsCertificate(certificate_pem="x", private_key=key),)))
    listeners = [
        item(ItemKind.LISTENER, f"service/*/{port}", Listener(network="service", port=port, protocol=protocol, load_balancers=("shop/lb",)))
        for port, protocol in ((80, "http"), (443, "https"), (5432, "tcp"))
    ]
    items = [
        item(ItemKind.SITE, "here", SITE),
        item(ItemKind.HTTP_LOADBALANCER, "shop/lb", http),
        item(ItemKind.TCP_LOADBALANCER, "shop/lb", TcpLoadBalancer(pools=(WeightedPool(pool="n/p"),))),
        item(ItemKind.ORIGIN_POOL, "n/p", pool()),
        *listeners,
    ]
    ports = tuple(
        PublishedPort(name=f"p{port}", port=port, target_port=port, load_balancer="shop/lb", protocol=protocol)
        for port, protocol in ((80, "http"), (443, "http"), (5432, "tcp"), (81, "http"))
    )
    wanted = AgentSnapshot.of([Item(WANTED.id, "p", Publish(ports=ports))])

    def served(items: list[Item], address: str = "10.9.0.1", secrets: Mapping[str, bytes] = MappingProxyType({})) -> list[int]:
        node = NodeIdentity("n1", "a-1", "here", "a", "c", "k")
        local = LocalState(node, Addresses("0.0.0.0", 15443, service=address), "/run/x", secrets=secrets)
        (publication,) = publications(wanted, render(AgentSnapshot.of(items), local), WHO)
        assert publication.ports == ports, "the Service is there whatever this node can serve"
        return [port.port for port in publication.served]

    assert served(items, secrets={key: b"k"}) == [80, 443, 5432]
    assert served(items) == [80, 5432], "without its private key there is no TLS"
    assert served(items[:-1]) == [80], "a listener that was refused is not there"
    assert served(items, "10.9.0.2") == []
    assert [each.served for each in publications(wanted, None, WHO)] == [()]


def test_what_is_not_served_here_has_a_service_and_no_slice() -> None:
    idle = replaced(WANTED, served=())
    other = written(Publisher("s1", "n2", "10.9.0.2"))
    assert said([*services([idle], {}, (), WHO)]) == [("post", "backend")]
    assert said([*slices([idle], made(WANTED), [written(), other], WHO, lambda _: False)]) == [("delete", "backend-n1")]


def test_what_is_as_it_should_be_is_left_alone() -> None:
    assert said([*services([WANTED], made(WANTED), (), WHO)]) == []
    assert said([*slices([WANTED], made(WANTED), [written()], WHO, lambda _: False)]) == []


def test_names_that_others_have_are_not_created_nor_given_endpoints() -> None:
    assert said([*services([WANTED], {}, {PLACE}, WHO)]) == []
    assert said([*slices([WANTED], {}, [], WHO, None)]) == []


def test_a_service_that_was_bent_is_bent_back_and_keeps_its_address() -> None:
    owned = made(WANTED)
    bent = ServiceSpec(
        type="ExternalName", externalName="evil.test", clusterIP="10.96.0.9", selector={"app": "x"}, ports=[ServicePort(port=1)]
    )
    (change,) = services([WANTED], {PLACE: replace(owned[PLACE], spec=bent)}, (), WHO)
    assert isinstance(change.object, Service)
    spec = change.object.spec
    assert spec is not None
    assert (spec.type, spec.externalName, spec.selector, spec.clusterIP) == ("ClusterIP", None, None, "10.96.0.9")
    assert [port.port for port in spec.ports or ()] == [80]


def test_a_slice_follows_the_ports_and_the_service_that_was_made_anew() -> None:
    both = (PORT, PORT.model_copy(update={"name": "http-443", "port": 443, "target_port": 443}))
    more = Publication(WANTED.id, *PLACE, both, both)
    assert said([*slices([more], made(more), [written()], WHO, None)]) == [("put", "backend-n1")]
    anew = made(WANTED)
    anew[PLACE] = replace(anew[PLACE], metadata=ObjectMeta(name="backend", namespace="shop", uid="another"))
    assert said([*slices([WANTED], anew, [written()], WHO, None)]) == [("put", "backend-n1")]


def test_a_slice_of_another_address_family_has_to_go_first() -> None:
    """The family of a slice cannot be changed."""
    old = written(Publisher("s1", "n1", "fd00::1"))
    assert said([*slices([WANTED], made(WANTED), [old], WHO, None)])[0] == ("delete", "backend-n1")


def test_slices_of_other_nodes_are_cleared_up_by_the_leader_alone_when_they_are_gone() -> None:
    others = [written(Publisher("s1", name, "10.9.0.2")) for name in ("n2", "n3")]
    assert said([*slices([WANTED], made(WANTED), [written(), *others], WHO, None)]) == []
    assert said([*slices([WANTED], made(WANTED), [written(), *others], WHO, lambda node: node == "n3")]) == [("delete", "backend-n3")]


def test_what_nobody_wants_goes_with_its_slices() -> None:
    other = written(Publisher("s1", "n2", "10.9.0.2"))
    assert said([*services([], made(WANTED), (), WHO)]) == [("delete", "backend")]
    assert said([*slices([], made(WANTED), [written(), other], WHO, None)]) == [("delete", "backend-n1")]
    assert said([*slices([], made(WANTED), [written(), other], WHO, lambda _: False)]) == [
        ("delete", "backend-n1"),
        ("delete", "backend-n2"),
    ]


def test_what_a_user_calls_managed_by_isthmus_is_not_a_published_service_by_that() -> None:
    assert is_published(WHO.site_labels)
    assert not is_published({"app.kubernetes.io/managed-by": "isthmus"})
    assert not is_published(None)
