"""What is changed in a cluster, as a function of what is there."""

from lightkube.models.core_v1 import ServicePort, ServiceSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Service
from lightkube.resources.discovery_v1 import EndpointSlice
from msgspec.structs import replace

from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.protocol.items import HttpLoadBalancer, ItemKind, Publish, PublishedPort
from agent.published import Change, Place, Publication, Publisher, is_published, publications, services, slices

PLACE = ("shop", "backend")
WHO = Publisher("s1", "n1", "10.9.0.1")
PORT = PublishedPort(name="http-80", port=80, target_port=80, load_balancer="shop/lb", protocol="http")
WANTED = Publication(ItemId(ItemKind.PUBLISH, "shop/backend"), *PLACE, (PORT,))


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


def test_only_what_leads_to_a_load_balancer_in_force_is_published() -> None:
    publish = Item(WANTED.id, "p", Publish(ports=(PORT,)))
    balancer = Item(ItemId(ItemKind.HTTP_LOADBALANCER, "shop/lb"), "lb", HttpLoadBalancer(domains=("*",), routes=()))
    assert publications(AgentSnapshot.of([publish])) == ()
    assert publications(AgentSnapshot.of([publish, balancer])) == (WANTED,)


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
    more = Publication(WANTED.id, *PLACE, (PORT, PORT.model_copy(update={"name": "http-443", "port": 443, "target_port": 443})))
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
