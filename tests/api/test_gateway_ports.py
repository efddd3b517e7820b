"""Where a node's own gateway listens, no load balancer can."""

from typing import Any

import httpx
from fastapi import FastAPI

from agent.protocol.report import GatewayListener
from tests.api.enrolled import Node, admitted, caught_up
from tests.api.test_delivery import tenant_of
from tests.api.test_objects import BALANCERS, POOLS, SITES, VIRTUAL_SITES, balancer, pool, put

Json = dict[str, Any]
INSIDE = GatewayListener(address="0.0.0.0", port=15443, networks=("inside",))


async def listens(app: FastAPI, node: Node, listener: GatewayListener) -> None:
    await node.report(gateway_listener=listener)
    await caught_up(app, tenant_of(node))


def at(site: str, network: str = "INSIDE", **more: str) -> Json:
    return {"site": {"site": {"name": site}, "network": f"SITE_NETWORK_{network}", **more}}


async def test_the_port_of_a_gateway_is_refused_when_a_load_balancer_asks_for_it(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a:
        await listens(app, a, INSIDE)
        await put(user, POOLS, pool())
        answer = await user.post(BALANCERS, json=balancer(port=15443))
        assert answer.status_code == 409
        expected = "at site a inside port 15443 belongs to the gateway of node node-1"
        assert [detail["description"] for detail in answer.json()["details"]] == [expected]
        assert (await user.post(BALANCERS, json=balancer(port=15443, where=at("a", ip="10.0.0.9")))).status_code == 409
        await put(user, BALANCERS, balancer("outside", port=15443, where=at("a", "OUTSIDE")))
        await put(user, BALANCERS, balancer("beside", port=15444))
        await listens(app, a, INSIDE.model_copy(update={"address": "10.0.0.1"}))
        await put(user, BALANCERS, balancer("vip", port=15443, where=at("a", ip="10.0.0.9")))
        await listens(app, a, INSIDE.model_copy(update={"port": 15000}))
        await put(user, BALANCERS, balancer("free", port=15443))


async def test_a_load_balancer_that_comes_to_a_gateways_port_by_a_label_is_conflicted(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a:
        await listens(app, a, INSIDE)
        await put(user, POOLS, pool())
        selector = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["tier in (gold)"]}}
        await put(user, VIRTUAL_SITES, {"metadata": {"name": "gold"}, "spec": selector})
        where = {"virtual_site": {"virtual_site": {"name": "gold", "namespace": "shared"}, "network": "SITE_NETWORK_INSIDE"}}
        await put(user, BALANCERS, balancer(port=15443, where=where))
        answer = await user.put(f"{SITES}/a", json={"metadata": {"name": "a", "labels": {"tier": "gold"}}, "spec": {}})
        assert answer.status_code == 200, answer.text
        await caught_up(app, tenant_of(a))
        found = (await user.get(f"{BALANCERS}/cart/status")).json()
        message = "at site a inside port 15443 belongs to the gateway of node node-1"
        assert [(site["state"], site["reason"]) for site in found["sites"]] == [("Conflicted", message)]
        assert [(each["type"], each["message"]) for each in found["conditions"]] == [("Conflicted", message)]
        await listens(app, a, INSIDE.model_copy(update={"port": 15000}))
        assert (await user.get(f"{BALANCERS}/cart/status")).json()["conditions"] == []
