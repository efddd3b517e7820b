"""Public names, and load balancers on regional edges."""

import asyncio
import base64
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import dns.message
import dns.rcode
import dns.rrset
import httpx
import pytest
from fastapi import FastAPI

from agent.errors import Refused
from agent.protocol.items import ItemKind
from controlplane.compile.edge import public_items
from controlplane.pki import create_root, private_key_pem
from controlplane.services import shares
from controlplane.services.public_names import resolver
from lab.wait import until
from tests.api.enrolled import SITES, Node, admitted
from tests.api.test_regional_edges import fresh, items_of, running_edge
from tests.backend import now

NAMES = "/api/config/namespaces/system/public_names"
ALL = "/api/operator/public_names"
POOLS = "/api/config/namespaces/shop/origin_pools"
HTTP = "/api/config/namespaces/shop/http_loadbalancers"
TCP = "/api/config/namespaces/shop/tcp_loadbalancers"
Json = dict[str, Any]


def domain() -> str:
    """Names are the same for all tests."""
    return f"{uuid4().hex[:12]}.test"


async def tenant_of(user: httpx.AsyncClient) -> str:
    return str((await user.get("/api/web/namespaces/shop")).json()["system_metadata"]["tenant"])


async def grant(operator: httpx.AsyncClient, user: httpx.AsyncClient, name: str) -> None:
    answer = await operator.post(ALL, json={"name": name, "tenant": await tenant_of(user)})
    assert answer.status_code == 200, answer.text


def pool(*servers: Json) -> Json:
    served = {"k8s_service": {"service_name": "app.shop", "site_locator": {"site": {"namespace": "system", "name": "berlin"}}}}
    return {"metadata": {"name": "app"}, "spec": {"origin_servers": list(servers) or [served], "port": 8080}}


def public(name: str, *domains: str, **spec: Any) -> Json:
    defaults: Json = {
        "domains": list(domains),
        "http": {"port": 80},
        "advertise_on_public_default_vip": {},
        "default_route_pools": [{"pool": {"name": "app"}}],
    }
    return {"metadata": {"name": name}, "spec": {**defaults, **spec}}


def served_certificate() -> Json:
    root = create_root("fabric.test", now())
    chain, key = (base64.b64encode(text.encode()).decode() for text in (root.certificate_pem, private_key_pem(root.key)))
    return {"certificate_url": f"string:///{chain}", "private_key": {"clear_secret_info": {"url": f"string:///{key}"}}}


@asynccontextmanager
async def edge_and_site(app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient) -> AsyncIterator[tuple[Node, Node]]:
    async with running_edge(app, operator, fresh()) as edge, admitted(app, user, "berlin") as site:
        assert (await user.post(POOLS, json=pool())).status_code == 200
        yield edge, site


async def follows(app: FastAPI, edge: Node, kind: ItemKind, sites: Collection[Node], wanted: Collection[str]) -> dict[str, Json]:
    """Items of a kind at an edge, once those of the tenants of these sites are these, by key without the tenant."""
    await app.state.services.delivery.compare()
    tenants = {made.credentials.tenant_id for made in sites if made.credentials}

    async def told() -> dict[str, Json]:
        return {key: body for key, body in (await items_of(edge, kind)).items() if key.partition("/")[0] in tenants}

    async def there() -> bool:
        return set(await told()) == {f"{tenant}/{key}" for tenant in tenants for key in wanted}

    await until(there, f"the edge to have {wanted}")
    return await told()


class NameServer(asyncio.DatagramProtocol):
    """Authoritative for what it was told, on loopback over UDP."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.address = ""

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator["NameServer"]:
        transport, server = await asyncio.get_running_loop().create_datagram_endpoint(cls, ("127.0.0.1", 0))
        server.address = "{}:{}".format(*transport.get_extra_info("sockname"))
        try:
            yield server
        finally:
            transport.close()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        query = dns.message.from_wire(data)
        (question,) = query.question
        self.asked.append(question.name.to_text())
        answer = dns.message.make_response(query)
        if texts := self.texts.get(question.name.to_text()):
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "TXT", *(f'"{text}"' for text in texts)))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), addr)


# Whose a name is


async def test_a_name_is_proved_by_its_dns(app: FastAPI, user: httpx.AsyncClient) -> None:
    name = domain()
    texts: list[str] = []

    async def txt(at: str) -> Collection[str]:
        return texts if at == f"_isthmus.{name}" else ()

    app.state.services = replace(app.state.services, txt=txt)
    refused = await user.post(NAMES, json={"name": name})
    assert refused.status_code == 403
    expected = refused.json()["message"].split("with the text ")[1].split(",")[0]
    texts.append("isthmus-tenant=somebody-else")
    assert (await user.post(NAMES, json={"name": name})).status_code == 403
    texts.append(expected)
    assert (await user.post(NAMES, json={"name": name})).json()["granted"] is False
    assert [item["name"] for item in (await user.get(NAMES)).json()["items"]] == [name]
    assert (await user.delete(f"{NAMES}/{name}")).status_code == 200
    assert (await user.delete(f"{NAMES}/{name}")).status_code == 404


async def test_a_name_server_is_asked_for_the_proof(app: FastAPI, user: httpx.AsyncClient) -> None:
    name = domain()
    async with NameServer.serving() as server:
        app.state.services = replace(app.state.services, txt=resolver(server.address))
        refused = await user.post(NAMES, json={"name": name})
        assert refused.status_code == 403
        assert server.asked == [f"_isthmus.{name}."]
        server.texts[f"_isthmus.{name}."] = ["v=spf1 -all", "isthmus-tenant=somebody-else"]
        assert (await user.post(NAMES, json={"name": name})).status_code == 403
        expected = refused.json()["message"].split("with the text ")[1].split(",")[0]
        server.texts[f"_isthmus.{name}."].append(expected)
        assert (await user.post(NAMES, json={"name": name})).json()["granted"] is False
    assert [item["name"] for item in (await user.get(NAMES)).json()["items"]] == [name]


async def test_a_name_belongs_to_one_tenant_with_what_is_under_and_above(
    operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    await stranger.post("/api/web/namespaces", json={"metadata": {"name": "shop"}})
    name = domain()
    await grant(operator, user, f"a.{name}")
    await grant(operator, user, f"a.{name}")
    other = await tenant_of(stranger)
    for taken in (f"a.{name}", f"b.a.{name}", name):
        assert (await operator.post(ALL, json={"name": taken, "tenant": other})).status_code == 409
    await grant(operator, stranger, f"b.{name}")
    assert (await stranger.get(NAMES)).json()["items"][0]["name"] == f"b.{name}"
    assert (await stranger.delete(f"{NAMES}/a.{name}")).status_code == 404
    assert {item["name"] for item in (await operator.get(ALL)).json()["items"]} >= {f"a.{name}", f"b.{name}"}
    assert (await operator.delete(f"{ALL}/a.{name}")).status_code == 200
    await grant(operator, stranger, name)


async def test_only_the_operator_grants(user: httpx.AsyncClient) -> None:
    assert (await user.post(ALL, json={"name": domain(), "tenant": await tenant_of(user)})).status_code == 403
    assert (await user.get(ALL)).status_code == 403
    assert (await user.post(NAMES, json={"name": ":8443"})).status_code == 403


@pytest.mark.parametrize("name", ["*.shop.test", "*", ":80", ":443", ":0", "-", ""])
async def test_what_cannot_belong_to_anybody_is_refused(operator: httpx.AsyncClient, user: httpx.AsyncClient, name: str) -> None:
    assert (await operator.post(ALL, json={"name": name, "tenant": await tenant_of(user)})).status_code == 400


# Load balancers on edges


async def test_a_public_load_balancer_needs_its_name_and_reaches_the_edge(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name = domain()
    async with edge_and_site(app, operator, user) as (edge, site):
        assert edge.credentials
        assert site.credentials
        refused = await user.post(HTTP, json=public("web", f"www.{name}"))
        assert refused.status_code == 403
        assert f"www.{name} does not belong to this tenant" in refused.text
        await grant(operator, user, name)
        assert (await user.post(HTTP, json=public("web", f"www.{name}", f"*.{name}"))).status_code == 200
        key = f"{site.credentials.tenant_id}/shop/web"
        told = await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site], ["shop/web"])
        assert told[key]["domains"] == [f"www.{name}", f"*.{name}"]
        exports = await items_of(site, ItemKind.EXPORT)
        assert edge.credentials.site_id in exports["shop/app"]["uses"][0]["edges"]
        assert edge.credentials.site_id in await site.keys_of(ItemKind.EDGE)

        assert (await operator.delete(f"{ALL}/{name}")).status_code == 200
        await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site], [])
        status = (await user.get(f"{HTTP}/web/status")).text
        assert "NotYours" in status


async def test_load_balancers_name_edges_like_sites(app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient) -> None:
    name = domain()
    async with edge_and_site(app, operator, user) as (edge, _):
        assert edge.credentials
        await grant(operator, user, name)

        def at(**more: Any) -> Json:
            place = {"site": {"namespace": "system", "name": edge.site}, **more}
            choice: Json = {"advertise_custom": {"advertise_where": [{"site": place}]}}
            body = public("web", name)
            del body["spec"]["advertise_on_public_default_vip"]
            return {**body, "spec": {**body["spec"], **choice}}

        inside = await user.post(HTTP, json=at(network="SITE_NETWORK_INSIDE"))
        assert (inside.status_code, inside.json()["details"][0]["field"]) == (400, "spec.advertise_custom.advertise_where[0]")
        assert (await user.post(HTTP, json=at(ip="10.0.0.1"))).status_code == 400
        assert (await user.post(HTTP, json=at(network="SITE_NETWORK_OUTSIDE"))).status_code == 200
        taken = await user.post(HTTP, json={**at(), "metadata": {"name": "another"}})
        assert taken.status_code == 409
        assert edge.site in taken.text
        assert (await user.post(SITES, json={"metadata": {"name": edge.site}, "spec": {}})).status_code == 409


async def test_ports_of_edges_are_granted(app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient) -> None:
    port = 20_000 + uuid4().int % 10_000
    body = {
        "metadata": {"name": "db"},
        "spec": {"listen_port": port, "advertise_on_public_default_vip": {}, "origin_pools_weights": [{"pool": {"name": "app"}}]},
    }
    async with edge_and_site(app, operator, user) as (edge, site):
        assert site.credentials
        assert f":{port}" in (await user.post(TCP, json=body)).text
        await grant(operator, user, f":{port}")
        assert (await user.post(TCP, json=body)).status_code == 200
        await follows(app, edge, ItemKind.LISTENER, [site], [f"outside/*/{port}"])


async def test_an_origin_that_an_edge_would_dial_itself_is_refused(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name = domain()
    async with edge_and_site(app, operator, user):
        await grant(operator, user, name)
        dialled = pool({"public_ip": {"ip": "192.0.2.1"}})
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
        refused = await user.put(f"{POOLS}/app", json=dialled)
        assert (refused.status_code, refused.json()["details"][0]["field"]) == (400, "spec.origin_servers[0]")
        assert (await user.delete(f"{HTTP}/web")).status_code == 200
        assert (await user.put(f"{POOLS}/app", json=dialled)).status_code == 200
        assert "unlike spec.origin_servers[0] of origin_pool shop/app" in (await user.post(HTTP, json=public("web", name))).text


async def test_keys_of_public_load_balancers_are_for_the_edges_that_serve_them(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    name = domain()
    tls = {"tls_certificates": [served_certificate()]}
    async with edge_and_site(app, operator, user) as (edge, site), admitted(app, stranger, "oslo") as other:
        assert site.credentials
        await grant(operator, user, name)
        body = public("web", name, https={"tls_parameters": tls})
        del body["spec"]["http"]
        answer = await user.post(HTTP, json=body)
        assert answer.status_code == 200, answer.text
        lb = f"{site.credentials.tenant_id}/shop/web"
        told = await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site], ["shop/web"])
        ref = told[lb]["tls"]["certificates"][0]["private_key"]
        assert b"PRIVATE KEY" in (await edge.control.secrets([ref]))[ref]
        for stranger_to_it in (site, other):
            with pytest.raises(Refused, match="nothing at this site needs"):
                await stranger_to_it.control.secrets([ref])


async def test_a_tenant_that_cannot_be_compiled_keeps_its_last_good_part_and_holds_up_nobody(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, other = domain(), domain()
    await stranger.post("/api/web/namespaces", json={"metadata": {"name": "shop"}})
    async with edge_and_site(app, operator, user) as (edge, site), admitted(app, stranger, "berlin") as healthy:
        assert site.credentials
        assert healthy.credentials
        await grant(operator, user, name)
        await grant(operator, stranger, other)
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
        mine, theirs = (f"{made.credentials.tenant_id}/shop/web" for made in (site, healthy) if made.credentials)
        await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site], ["shop/web"])
        compiled = public_items

        def broken(intent: Any, observations: Any) -> Any:
            if intent.tenant.id == site.credentials.tenant_id:  # type: ignore[union-attr]  # asserted above
                raise RuntimeError("a bug")
            return compiled(intent, observations)

        monkeypatch.setattr(shares, "public_items", broken)
        assert (await user.put(f"{HTTP}/web", json=public("web", f"new.{name}"))).status_code == 200
        assert (await stranger.post(POOLS, json=pool())).status_code == 200
        assert (await stranger.post(HTTP, json=public("web", other))).status_code == 200
        told = await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [site, healthy], ["shop/web"])
        assert told[mine]["domains"] == [name]
        assert told[theirs]["domains"] == [other]


async def test_a_public_load_balancer_is_applied_when_the_edges_say_so(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name = domain()
    async with edge_and_site(app, operator, user) as (edge, site):
        await grant(operator, user, name)
        revision = (await user.post(HTTP, json=public("web", name))).json()["revision"]

        async def states() -> dict[str, str]:
            await app.state.services.heartbeats.flush(now())
            status = (await user.get(f"{HTTP}/web/status?revision={revision}")).json()
            return {each["site"]: each["state"] for each in status["sites"]}

        assert (await states())[edge.site] == "Pending"
        await site.apply()
        applied = await edge.apply()
        assert {state for at, state in (await states()).items() if at in (edge.site, "berlin")} == {"Applied"}
        await grant(operator, user, domain())
        async with admitted(app, user, "oslo"):
            await app.state.services.delivery.compare()
            changed = await edge.manifest(applied)
            assert changed.hash != applied
            assert (await states())[edge.site] == "Applied"
        revision = (await user.put(f"{HTTP}/web", json=public("web", name, http={"port": 80}, more_option={"idle_timeout": 5}))).json()[
            "revision"
        ]
        assert (await states())[edge.site] == "Pending"
        shown = (await user.get(f"{HTTP}/web/status")).json()["sites"]
        assert next(each["nodes"] for each in shown if each["site"] == edge.site) == []


async def test_what_is_kept_off_the_edges_is_never_applied_there(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    name = domain()
    async with edge_and_site(app, operator, user) as (edge, _):
        await grant(operator, user, name)
        assert (await user.post(HTTP, json=public("web", name))).status_code == 200
        assert (await operator.delete(f"{ALL}/{name}")).status_code == 200
        await edge.apply()
        await app.state.services.heartbeats.flush(now())
        status = (await user.get(f"{HTTP}/web/status")).json()
        assert "NotYours" in {each["type"] for each in status["conditions"]}
        assert next(each for each in status["sites"] if each["site"] == edge.site)["state"] == "Conflicted"
