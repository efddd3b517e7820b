"""Where a node's Envoy listens."""

import pytest

from agent.envoy.inputs import Addresses


@pytest.mark.parametrize(
    ("gateway", "address", "port", "takes"),
    [
        ("0.0.0.0", "10.0.0.1", 15443, True),
        ("0.0.0.0", "0.0.0.0", 15443, True),
        ("::", "fd00::1", 15443, True),
        ("10.0.0.1", "10.0.0.1", 15443, True),
        ("10.0.0.1", "10.0.0.2", 15443, False),
        ("10.0.0.1", "0.0.0.0", 15443, False),
        ("0.0.0.0", "10.0.0.1", 15444, False),
    ],
)
def test_a_listener_takes_from_the_gateway_where_its_address_is_the_same_or_a_part_of_the_gateways(
    gateway: str, address: str, port: int, takes: bool
) -> None:
    assert Addresses(gateway, 15443).takes_from_gateway(address, port) is takes


def test_a_node_tells_on_which_of_its_networks_the_gateway_has_its_port() -> None:
    assert Addresses("0.0.0.0", 15443, inside="10.0.0.1", service="10.0.0.2").gateway_networks == ("inside", "service")
    assert Addresses("10.0.0.1", 15443, inside="10.0.0.1", outside="192.0.2.1").gateway_networks == ("inside",)
