"""Hubs and spokes as users write them: what is refused, and what a label may bring about."""

import asyncio
from typing import Any

import httpx
from fastapi import FastAPI

from agent.protocol.items import ItemKind, Peer
from tests.api.enrolled import SITES, admitted, caught_up, live
from tests.api.test_delivery import publish, tenant_of
from tests.api.test_objects import BALANCERS, POOLS, pool
from tests.api.test_status import status

__all__ = ["live"]

Json = dict[str, Any]
GROUPS = "/api/config/namespaces/system/site_mesh_groups"
VIRTUAL_SITES = "/api/config/namespaces/shared/virtual_sites"


def group(name: str, virtual_site: str, **spec: Any) -> Json:
    return {"metadata": {"name": name}, "spec": {"virtual_site": [{"namespace": "shared", "name": virtual_site}], **spec}}


def spokes(name: str, virtual_site: str, hubs: str) -> Json:
    return group(name, virtual_site, spoke_mesh={"hub_mesh_group": {"name": hubs}})


async def select(user: httpx.AsyncClient, **selectors: str) -> None:
    for name, selector in selectors.items():
        spec = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": [selector]}}
        assert (await user.post(VIRTUAL_SITES, json={"metadata": {"name": name}, "spec": spec})).status_code == 200


async def site(user: httpx.AsyncClient, name: str, **labels: str) -> None:
    assert (await user.post(SITES, json={"metadata": {"name": name, "labels": labels}, "spec": {}})).status_code == 200


async def created(user: httpx.AsyncClient, *bodies: Json) -> None:
    for body in bodies:
        answer = await user.post(GROUPS, json=body)
        assert answer.status_code == 200, answer.text


async def test_a_group_that_would_make_a_site_hub_and_spoke_is_refused(user: httpx.AsyncClient) -> None:
    await select(user, hubs="hub", both="hub", spokes="spoke")
    await site(user, "a", hub="1")
    await site(user, "b", spoke="1")
    await created(user, group("h", "hubs", hub_mesh={}))
    refused = await user.post(GROUPS, json=spokes("s", "both", "h"))
    assert refused.status_code == 409
    assert refused.json()["message"] == "site a would be a spoke in site_mesh_group system/s and one of its hubs in system/h"
    await created(user, spokes("s", "spokes", "h"))
    turned = await user.put(f"{GROUPS}/h", json=group("h", "spokes", hub_mesh={}))
    assert (turned.status_code, "site b would be a spoke" in turned.json()["message"]) == (409, True)


async def test_hubs_have_to_be_a_group_of_hubs_and_stay_one(user: httpx.AsyncClient) -> None:
    await select(user, hubs="hub", spokes="spoke")
    await created(user, group("full", "hubs", full_mesh={}), group("h", "hubs", hub_mesh={}))
    refused = await user.post(GROUPS, json=spokes("s", "spokes", "full"))
    assert (refused.status_code, refused.json()["details"][0]["field"]) == (400, "spec.spoke_mesh.hub_mesh_group")
    assert (await user.post(GROUPS, json=spokes("s", "spokes", "none"))).status_code == 400
    assert (await user.post(GROUPS, json=spokes("s", "spokes", "s"))).status_code == 400
    await created(user, spokes("s", "spokes", "h"))
    assert (await user.put(f"{GROUPS}/h", json=group("h", "hubs", full_mesh={}))).status_code == 409
    assert (await user.delete(f"{GROUPS}/h")).status_code == 409
    assert (await user.put(f"{GROUPS}/s", json=group("s", "spokes", full_mesh={}))).status_code == 200
    assert (await user.delete(f"{GROUPS}/h")).status_code == 200


async def test_a_group_shows_its_members_and_whom_it_joins_them_to(user: httpx.AsyncClient) -> None:
    await select(user, hubs="hub", spokes="spoke")
    for name, label in (("a", "hub"), ("b", "spoke"), ("c", "spoke")):
        await site(user, name, **{label: "1"})
    await created(user, group("h", "hubs", hub_mesh={}), spokes("s", "spokes", "h"))

    async def told(name: str) -> tuple[list[str], set[str], list[str]]:
        read = (await user.get(f"{GROUPS}/{name}", params={"response_format": "GET_RSP_FORMAT_STATUS"})).json()["status"]
        (found,) = (item["site_mesh_group_status"] for item in read if "site_mesh_group_status" in item)
        assert found == (await status(user, f"{GROUPS}/{name}/status"))["site_mesh_group_status"]
        infos = found["site_info"]
        return [info["site"][0]["name"] for info in infos], {info["annotations"][0] for info in infos}, found["other_connected_sites"]

    assert await told("s") == (["b", "c"], {"spoke"}, ["a"])
    assert await told("h") == (["a"], {"hub"}, ["b", "c"])
    assert (await user.put(f"{SITES}/c", json={"metadata": {"name": "c", "labels": {"hub": "1"}}, "spec": {}})).status_code == 200
    assert await told("s") == (["b"], {"spoke"}, ["a", "c"])


async def test_who_waits_hears_at_once_when_a_label_joins_it_to_a_hub(live: FastAPI, user: httpx.AsyncClient) -> None:
    await select(user, hubs="ves.io/siteName = b", spokes="spoke")
    await created(user, group("h", "hubs", hub_mesh={}), spokes("s", "spokes", "h"))
    async with admitted(live, user, "a") as made, admitted(live, user, "b"):
        assert (await user.post(POOLS, json=pool("cart", "b"))).status_code == 200
        await publish(user, "a", "till", "till.test")
        body = (await user.get(f"{BALANCERS}/till")).json()
        body["spec"]["default_route_pools"] = [{"pool": {"name": "cart"}}]
        answer = await user.put(f"{BALANCERS}/till", json={"metadata": {"name": "till"}, "spec": body["spec"]})
        assert answer.status_code == 200, answer.text
        await caught_up(live, tenant_of(made))

        async def is_direct() -> bool:
            (entry,) = (entry for entry in (await made.manifest()).entries if entry.kind == ItemKind.PEER)
            (found,) = await made.control.items([entry.hash])
            return Peer.read(found.body.encode()).direct

        assert not await is_direct()
        waiting = asyncio.create_task(made.manifest((await made.manifest()).hash))
        labelled = {"metadata": {"name": "a", "labels": {"spoke": "1"}}, "spec": {}}
        assert (await user.put(f"{SITES}/a", json=labelled)).status_code == 200
        changed = await asyncio.wait_for(waiting, 30)
        assert ItemKind.PEER in {entry.kind for entry in changed.entries}
        assert await is_direct()


async def test_a_label_that_makes_a_site_hub_and_spoke_is_accepted_and_told(user: httpx.AsyncClient) -> None:
    await select(user, hubs="hub", spokes="spoke")
    await created(user, group("h", "hubs", hub_mesh={}), spokes("s", "spokes", "h"))
    await site(user, "x", hub="1", spoke="1")
    told = await status(user, f"{GROUPS}/s/status", wait="applied", timeout="10s")
    (condition,) = told["conditions"]
    assert (condition["type"], told["reason"], told["sites"][0]["state"]) == ("Conflicted", "Conflicted", "Conflicted")
    assert condition["message"] == "site x is a hub of site_mesh_group system/h, which is older, and so no spoke of this one"
    assert (await status(user, f"{GROUPS}/h/status"))["conditions"] == []
    label = await user.put(f"{GROUPS}/s", json={**spokes("s", "spokes", "h"), "metadata": {"name": "s", "labels": {"k": "v"}}})
    assert label.status_code == 200, "what it had in common before is no reason to refuse"


async def test_a_load_balancer_that_lost_its_listener_by_a_label_is_not_applied(live: FastAPI, user: httpx.AsyncClient) -> None:
    await select(user, chosen="chosen")
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        late = {"virtual_site": {"virtual_site": {"namespace": "shared", "name": "chosen"}, "network": "SITE_NETWORK_INSIDE"}}
        spec = {
            "domains": ["cart.test"],
            "http": {"port": 80},
            "default_route_pools": [{"pool": {"name": "cart"}}],
            "advertise_custom": {"advertise_where": [late]},
        }
        balancers = "/api/config/namespaces/shop/http_loadbalancers"
        assert (await user.post(balancers, json={"metadata": {"name": "late"}, "spec": spec})).status_code == 200
        labelled = await user.get(f"{SITES}/a")
        body = {"metadata": {**labelled.json()["metadata"], "labels": {"chosen": "1"}}, "spec": {}}
        answer = await user.put(f"{SITES}/a", json=body)
        assert answer.status_code == 200, answer.text
        await caught_up(live, tenant_of(made))
        await made.apply()
        told = await status(user, f"{balancers}/late/status", wait="applied", timeout="60s")
        assert (told["applied"], told["reason"]) == (False, "Conflicted")
        (where,) = told["sites"]
        assert (where["state"], "http_loadbalancer shop/cart is older" in where["reason"]) == ("Conflicted", True)
        assert [condition["type"] for condition in told["conditions"]] == ["Conflicted"]
        assert (await status(user, wait="applied", timeout="10s"))["applied"]
