"""TLS to the origins of a TCP load balancer: without a Host header, something else has to say what their certificates must be for."""

from typing import Any

import httpx
import pytest

from tests.api.test_objects import BALANCERS, POOLS, TCP_BALANCERS, balancer, pool, put, shop

__all__ = ["shop"]

Json = dict[str, Any]

UNNAMED: Json = {"use_tls": {"tls_config": {"default_security": {}}, "use_host_header_as_sni": {}}}
NAMED: Json = {"use_tls": {**UNNAMED["use_tls"], "use_host_header_as_sni": None, "sni": "cart.internal"}}
UNVERIFIED: Json = {"use_tls": {**UNNAMED["use_tls"], "skip_server_verification": {}}}
BY_NAME: Json = {"origin_servers": [{"public_name": {"dns_name": "cart.example"}}]}
BY_ADDRESS: Json = {"origin_servers": [{"public_name": {"dns_name": "cart.example"}}, {"public_ip": {"ip": "192.0.2.1"}}]}


def tcp(weight: int = 1) -> Json:
    place = {"site": {"site": {"name": "a"}, "network": "SITE_NETWORK_INSIDE"}}
    spec = {
        "listen_port": 5432,
        "advertise_custom": {"advertise_where": [place]},
        "origin_pools_weights": [{"pool": {"name": "cart"}, "weight": weight}],
    }
    return {"metadata": {"name": "db"}, "spec": spec}


def refused(answer: httpx.Response) -> tuple[str, str]:
    """The field and what is wrong with it."""
    assert answer.status_code == 400, answer.text
    (detail,) = answer.json()["details"]
    return detail["field"], detail["description"]


@pytest.mark.parametrize("spec", [UNNAMED, UNNAMED | BY_ADDRESS], ids=["service", "one by address"])
async def test_a_tcp_load_balancer_needs_to_know_whose_certificates_it_verifies(shop: httpx.AsyncClient, spec: Json) -> None:
    await shop.put(f"{POOLS}/cart", json=pool(**spec))
    field, description = refused(await shop.post(TCP_BALANCERS, json=tcp()))
    assert field == "spec.origin_pools_weights[0].pool"
    assert "origin_pool shop/cart verifies certificates" in description
    await put(shop, BALANCERS, balancer())


@pytest.mark.parametrize("spec", [{}, NAMED, UNVERIFIED, UNNAMED | BY_NAME], ids=["no TLS", "sni", "not verified", "by name"])
async def test_a_tcp_load_balancer_may_have_pools_that_say_it(shop: httpx.AsyncClient, spec: Json) -> None:
    assert (await shop.put(f"{POOLS}/cart", json=pool(**spec))).status_code == 200
    await put(shop, TCP_BALANCERS, tcp())


async def test_a_pool_goes_on_saying_it_while_tcp_load_balancers_use_it(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer())
    assert (await shop.put(f"{POOLS}/cart", json=pool(**UNNAMED))).status_code == 200
    assert (await shop.put(f"{POOLS}/cart", json=pool(**NAMED))).status_code == 200
    await put(shop, TCP_BALANCERS, tcp())
    field, description = refused(await shop.put(f"{POOLS}/cart", json=pool(**UNNAMED)))
    assert field == "spec.use_tls"
    assert "tcp_loadbalancer shop/db" in description
    assert (await shop.put(f"{TCP_BALANCERS}/db", json=tcp(weight=0))).status_code == 200
    assert (await shop.put(f"{POOLS}/cart", json=pool(**UNNAMED))).status_code == 200
    assert refused(await shop.put(f"{TCP_BALANCERS}/db", json=tcp()))[0] == "spec.origin_pools_weights[0].pool"
