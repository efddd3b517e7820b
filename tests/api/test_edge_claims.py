"""Conflicts that come to be when an edge is added or relabelled: the same for everybody who looks, within a tenant and between two."""

from typing import Any

import httpx
from fastapi import FastAPI

from agent.protocol.items import ItemKind
from tests.api.enrolled import SITES, admitted
from tests.api.test_public_names import HTTP, POOLS, domain, edge_and_site, follows, grant, pool, public
from tests.api.test_regional_edges import create_edge, fresh, running_edge

VIRTUAL_SITES = "/api/config/namespaces/shop/virtual_sites"
Json = dict[str, Any]


async def selecting(user: httpx.AsyncClient, name: str, expression: str, site_type: str) -> None:
    spec = {"site_type": site_type, "site_selector": {"expressions": [expression]}}
    answer = await user.post(VIRTUAL_SITES, json={"metadata": {"name": name}, "spec": spec})
    assert answer.status_code == 200, answer.text


def at_virtual(name: str, virtual_site: str, wanted: str, **spec: Any) -> Json:
    where = {"virtual_site": {"network": "SITE_NETWORK_OUTSIDE", "virtual_site": {"namespace": "shop", "name": virtual_site}}}
    body = public(name, wanted, advertise_custom={"advertise_where": [where]}, **spec)
    del body["spec"]["advertise_on_public_default_vip"]
    return body


async def relabel(operator: httpx.AsyncClient, name: str, **labels: str) -> None:
    body = {"metadata": {"name": name, "labels": labels}, "spec": {"site_type": "REGIONAL_EDGE"}}
    assert (await operator.put(f"{SITES}/{name}", json=body)).status_code == 200


async def conditions(user: httpx.AsyncClient, name: str) -> set[str]:
    return {each["type"] for each in (await user.get(f"{HTTP}/{name}/status")).json()["conditions"]}


async def test_whoever_is_there_by_a_new_edge_is_in_the_way_of_who_comes_later(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name, mark = domain(), fresh()
    async with edge_and_site(app, operator, user):
        await grant(operator, user, name)
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
    await selecting(user, "marked", f"mark == {mark}", "REGIONAL_EDGE")
    async with running_edge(app, operator, fresh()) as edge:
        await relabel(operator, edge.site, mark=mark)
        taken = await user.post(HTTP, json=at_virtual("late", "marked", name))
        assert taken.status_code == 409
        assert f"site {edge.site} belongs to http_loadbalancer shop/web" in taken.text
        assert (await user.put(HTTP + "/web", json=public("web", name))).status_code == 200
        assert "Conflicted" not in await conditions(user, "web")


async def test_tenants_are_told_nothing_of_the_nodes_of_an_edge(app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient) -> None:
    name = domain()
    async with edge_and_site(app, operator, user) as (edge, _):
        await grant(operator, user, name)
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
        (site,) = [each for each in (await user.get(f"{HTTP}/web/status")).json()["sites"] if each["site"] == edge.site]
        assert (site["state"], site["reason"], site["nodes"]) == ("Pending", "waiting for this regional edge", [])


async def test_two_that_meet_on_a_relabelled_edge_are_told_apart_by_age(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name, mark = domain(), fresh()
    async with edge_and_site(app, operator, user) as (edge, site):
        await grant(operator, user, name)
        for each in ("older", "younger", "third"):
            await selecting(user, each, f"{each} == {mark}", "REGIONAL_EDGE")
        for each in ("older", "younger"):
            assert (await user.post(HTTP, json=at_virtual(each, each, name))).status_code == 200
        await relabel(operator, edge.site, older=mark, younger=mark, third=mark)
        await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site], ["shop/older"])
        assert "Conflicted" not in await conditions(user, "older")
        assert "Conflicted" in await conditions(user, "younger")
        taken = await user.post(HTTP, json=at_virtual("third", "third", name))
        assert (taken.status_code, "http_loadbalancer shop/older" in taken.text) == (409, True)
        assert (await user.put(f"{HTTP}/younger", json=at_virtual("younger", "younger", name, http={"port": 80}))).status_code == 200
        assert "http_loadbalancer shop/older" in (await user.post(HTTP, json=at_virtual("third", "third", name))).text


async def test_what_an_edge_serves_is_known_also_if_it_came_later(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name = domain()
    await user.post(SITES, json={"metadata": {"name": "berlin"}, "spec": {}})
    await grant(operator, user, name)
    assert (await user.post(POOLS, json=pool())).status_code == 200
    assert (await user.post(HTTP, json=public("web", name))).status_code == 200
    edge = fresh()
    await create_edge(operator, edge)
    refused = await user.put(f"{POOLS}/app", json=pool({"public_ip": {"ip": "192.0.2.1"}}))
    assert (refused.status_code, "shop/web is advertised on them" in refused.text) == (400, True)
    assert (await operator.delete(f"{SITES}/{edge}")).status_code == 200


async def test_a_tenant_that_meets_the_owner_of_a_name_on_an_edge_gives_way(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    name, mark = domain(), fresh()
    await stranger.post("/api/web/namespaces", json={"metadata": {"name": "shop"}})
    async with edge_and_site(app, operator, user) as (edge, site), admitted(app, stranger, "berlin") as other:
        assert (await stranger.post(POOLS, json=pool())).status_code == 200
        await selecting(stranger, "marked", f"mark == {mark}", "REGIONAL_EDGE")
        older = at_virtual("older", "marked", name, http={"port": 443})
        assert (await stranger.post(HTTP, json=older)).status_code == 200
        await grant(operator, user, name)
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
        await relabel(operator, edge.site, mark=mark)
        await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site], ["shop/web"])
        assert await conditions(stranger, "older") == {"NotYours"}
        assert not {"NotYours", "Conflicted"} & await conditions(user, "web")
        assert other.credentials
        assert not any(other.credentials.tenant_id in entry.key for entry in (await edge.manifest()).entries if entry.kind != "relay")
        again = await stranger.put(f"{HTTP}/older", json=at_virtual("older", "marked", name))
        assert (again.status_code, name in again.text) == (403, True)
        own = domain()
        await grant(operator, stranger, own)
        assert (await stranger.post(HTTP, json=at_virtual("own", "marked", own))).status_code == 200
        await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [other], ["shop/own"])


async def test_a_name_that_a_tenant_gets_back_belongs_to_the_load_balancer_that_had_it(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name, other = domain(), domain()
    async with edge_and_site(app, operator, user) as (edge, _):
        for each in (name, other):
            await grant(operator, user, each)
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
        assert (await operator.delete(f"/api/operator/public_names/{name}")).status_code == 200
        await relabel(operator, edge.site, mark=fresh())
        assert (await user.post(HTTP, json=public("other", other))).status_code == 200
        await grant(operator, user, name)
        taken = await user.post(HTTP, json=public("late", name))
        assert (taken.status_code, "http_loadbalancer shop/web" in taken.text) == (409, True)
