"""Cases of reading objects that a well-behaved API does not show."""

from lightkube.models.core_v1 import Node, NodeAddress, NodeCondition, NodeStatus
from lightkube.models.discovery_v1 import Endpoint as ApiEndpoint
from lightkube.models.discovery_v1 import EndpointPort, EndpointSlice
from lightkube.models.meta_v1 import ObjectMeta

from agent.discovery.objects import SERVICE_LABEL, Ready, read_node, read_slice


def part(*endpoints: ApiEndpoint, family: str = "IPv4", labels: dict[str, str] | None = None, port: int | None = 80) -> EndpointSlice:
    metadata = ObjectMeta(name="cart-1", namespace="shop", labels=labels if labels is not None else {SERVICE_LABEL: "cart"})
    return EndpointSlice(addressType=family, metadata=metadata, endpoints=list(endpoints), ports=[EndpointPort(port=port)])


def test_only_the_first_address_of_an_endpoint_counts() -> None:
    read = read_slice(part(ApiEndpoint(addresses=["10.0.0.1", "10.0.0.2"])))
    assert read is not None
    assert read.endpoints == (Ready("10.0.0.1", ""),)


def test_an_address_that_is_none_does_not_reach_envoy() -> None:
    read = read_slice(part(ApiEndpoint(addresses=["no address"]), ApiEndpoint(addresses=[])))
    assert read is not None
    assert read.endpoints == ()


def test_a_port_that_is_none_does_not_reach_envoy() -> None:
    for port in (None, 0, 70_000):
        read = read_slice(part(ApiEndpoint(addresses=["10.0.0.1"]), port=port))
        assert read is not None
        assert read.ports == ()


def test_slices_of_names_or_of_no_service_do_not_matter() -> None:
    assert read_slice(part(family="FQDN")) is None
    assert read_slice(part(labels={})) is None


def test_a_node_has_internal_addresses_while_it_is_ready() -> None:
    addresses = [NodeAddress(type="InternalIP", address=text) for text in ("192.0.2.2", "nonsense")]
    addresses.append(NodeAddress(type="ExternalIP", address="198.51.100.1"))

    def node(ready: str) -> Node:
        return Node(
            metadata=ObjectMeta(name="n"), status=NodeStatus(addresses=addresses, conditions=[NodeCondition(type="Ready", status=ready)])
        )

    assert read_node(node("True")).addresses == ("192.0.2.2",)
    assert read_node(node("Unknown")).addresses == ()
    assert read_node(Node()).addresses == ()
