"""Ports, names, addresses and the like."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from controlplane.resources import scalars

GOOD: list[tuple[Any, str, str]] = [
    (scalars.Domain, "Shop.Example.COM", "shop.example.com"),
    (scalars.Domain, "shop.example.com.", "shop.example.com"),
    (scalars.Domain, "*.Example.com", "*.example.com"),
    (scalars.Domain, "*", "*"),
    (scalars.Domain, "f5-httpd-demo", "f5-httpd-demo"),
    (scalars.HostHeader, "Shop.example.com:8080", "shop.example.com:8080"),
    (scalars.Ip, "2001:DB8::1", "2001:db8::1"),
    (scalars.Ipv4, "192.0.2.1", "192.0.2.1"),
    (scalars.Cidr, "10.0.0.1/8", "10.0.0.1/8"),
    (scalars.Cidr, "2001:db8::/32", "2001:db8::/32"),
    (scalars.EditableHeaderName, "X-Forwarded-Proto", "X-Forwarded-Proto"),
    (scalars.HeaderText, "100% of it", "100% of it"),
    (scalars.Path, "/a/%20b;c=d", "/a/%20b;c=d"),
    (scalars.Hexadecimal, "00Ff", "00Ff"),
    (scalars.StatusRange, "200-299", "200-299"),
    (scalars.PortRanges, "80, 443,8080-8191", "80, 443,8080-8191"),
    (scalars.PortMatches, "1-65535", "1-65535"),
    (scalars.ServiceName, "cart.shop", "cart.shop"),
    (scalars.ServiceName, "cart.shop:east-1", "cart.shop:east-1"),
]

BAD: list[tuple[Any, object]] = [
    (scalars.Domain, ""),
    (scalars.Domain, "."),
    (scalars.Domain, "*.*"),
    (scalars.Domain, "*."),
    (scalars.Domain, "*shop.example.com"),
    (scalars.Domain, "a..b"),
    (scalars.Domain, "-a.b"),
    (scalars.Domain, "a b"),
    (scalars.Domain, "x" * 64),
    (scalars.Domain, ".".join(["x" * 60] * 5)),
    (scalars.Domain, "a\n"),
    (scalars.HostHeader, "a:"),
    (scalars.HostHeader, "a:0"),
    (scalars.HostHeader, "a:١"),
    (scalars.Ip, "10.0.0"),
    (scalars.Ipv4, "::1"),
    (scalars.Cidr, "10.0.0.0"),
    (scalars.Cidr, "10.0.0.0/33"),
    (scalars.Cidr, "10.0.0.0/255.0.0.0"),
    (scalars.Cidr, "10.0.0.0/0.0.0.255"),
    (scalars.Cidr, "fe80::1%eth0/64"),
    (scalars.HeaderName, "a b"),
    (scalars.HeaderName, ":path"),
    (scalars.HeaderName, "a\n"),
    (scalars.EditableHeaderName, "Content-Length"),
    (scalars.EditableHeaderName, "x-isthmus-lb"),
    (scalars.HeaderText, "a\tb"),
    (scalars.HeaderText, "a\x00"),
    (scalars.HeaderText, "\ud800"),
    (scalars.Path, "a"),
    (scalars.Path, "/a?b"),
    (scalars.Path, "/a b"),
    (scalars.Path, "/" + "a" * 256),
    (scalars.Hexadecimal, "0"),
    (scalars.Hexadecimal, "0g"),
    (scalars.StatusRange, "600"),
    (scalars.StatusRange, "299-200"),
    (scalars.StatusRange, "2xx"),
    (scalars.PortRanges, "0"),
    (scalars.PortRanges, "80,"),
    (scalars.PortRanges, "90-80"),
    (scalars.PortRanges, "80,80"),
    (scalars.PortRanges, "1-1000"),
    (scalars.ServiceName, "cart"),
    (scalars.ServiceName, "cart.shop.svc"),
    (scalars.ServiceName, "cart.shop:"),
    (scalars.Port, 0),
    (scalars.Port, 65536),
    (scalars.Port, True),
    (scalars.Port, 1.5),
    (scalars.RefreshInterval, 9),
]


@pytest.mark.parametrize(("scalar", "text", "normalised"), GOOD)
def test_a_good_value_is_accepted(scalar: Any, text: str, normalised: str) -> None:
    assert TypeAdapter(scalar).validate_python(text) == normalised


@pytest.mark.parametrize(("scalar", "value"), BAD)
def test_a_bad_value_is_refused(scalar: Any, value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(scalar).validate_python(value)


def test_port_ranges_are_sorted_inclusive_pairs() -> None:
    assert scalars.port_ranges("443,80-82") == ((80, 82), (443, 443))


def test_a_service_name_has_three_parts() -> None:
    assert scalars.service_name("cart.shop:east") == ("cart", "shop", "east")
    assert scalars.service_name("cart.shop") == ("cart", "shop", "")
