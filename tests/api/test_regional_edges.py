"""Regional edges: the operator's sites, and how nodes become part of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from cryptography import x509
from fastapi import FastAPI
from sqlalchemy import text

from agent.errors import Refused
from agent.protocol.enrolment import Passport, RenewRequest
from agent.protocol.items import Gateway, ItemKind, shard
from agent.protocol.report import EdgeHealth
from controlplane.services.authorities import announce
from controlplane.services.homes import Seen, assign
from controlplane.store.changes import raise_revision
from controlplane.store.session import Database
from lab.wait import until
from tests.api.enrolled import REGISTRATIONS, SITES, TOKENS, Node, admitted, caught_up, csr, node, token_for
from tests.backend import now

APPROVE = "/api/register/namespaces/system/registration/{}/approve"
STATE = "/api/register/namespaces/system/site/{}/state"
DECOMMISSIONING = {"state": "DECOMMISSIONING"}


def edge(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"site_type": "REGIONAL_EDGE", **spec}}


def fresh() -> str:
    """The operator's tenant is that of all tests."""
    return f"edge-{uuid4().hex[:8]}"


async def create_edge(operator: httpx.AsyncClient, name: str, **spec: Any) -> str:
    answer = await operator.post(SITES, json=edge(name, **spec))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["system_metadata"]["uid"])


async def test_the_certificate_of_an_edge_comes_from_the_authority_of_edges(app: FastAPI, operator: httpx.AsyncClient) -> None:
    name = fresh()
    site_id = await create_edge(operator, name)
    async with node(app, await token_for(operator, name), name) as made:
        assert await made.bootstrap(passport=Passport(cluster_name=name, cluster_type="re")) == "APPROVED"
        credentials = await made.fetch_credentials()
        assert (credentials.kind, credentials.peer_anchor_pem, credentials.site_id) == ("regional_edge", "", site_id)
        certificate = x509.load_pem_x509_certificate(credentials.certificate_pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        trust_domain, node_id = credentials.trust_domain, credentials.node_id
        assert names.get_values_for_type(x509.DNSName) == [f"{node_id}.{site_id}.edges.{trust_domain}"]
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
            f"spiffe://{trust_domain}/tenant/edges/site/{site_id}/node/{node_id}"
        ]
        anchors = x509.load_pem_x509_certificates(credentials.edge_anchor_pem.encode())
        certificate.verify_directly_issued_by(anchors[0])
        renewed = await made.control.renew(RenewRequest(csr_pem=csr(made.key)))
        assert renewed.kind == "regional_edge"
        x509.load_pem_x509_certificate(renewed.certificate_pem.encode()).verify_directly_issued_by(anchors[0])
        registration = (await operator.get(f"{REGISTRATIONS}/{made.registration}")).json()
        assert registration["spec"]["passport"]["cluster_type"] == "re"


async def test_customer_edges_know_the_anchor_of_edges(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "berlin") as made:
        assert made.credentials
        assert made.credentials.kind == "customer_edge"
        anchors = x509.load_pem_x509_certificates(made.credentials.edge_anchor_pem.encode())
        assert "edges" in anchors[0].subject.rfc4514_string()
        assert made.credentials.peer_anchor_pem != made.credentials.edge_anchor_pem


async def test_only_the_operator_makes_edges_and_only_in_the_operators_tenant(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    assert (await user.post(SITES, json=edge(fresh()))).status_code == 403
    tenant = (await user.get("/api/web/namespaces/shop")).json()["system_metadata"]["tenant"]
    elsewhere = await operator.post(SITES, json=edge(fresh()), headers={"x-volterra-apigw-tenant": tenant})
    assert elsewhere.status_code == 403
    assert elsewhere.json()["details"][0]["field"] == "spec.site_type"


async def test_an_administrator_of_the_operators_tenant_cannot_touch_edges(
    app: FastAPI, operator: httpx.AsyncClient, inside: httpx.AsyncClient
) -> None:
    name = fresh()
    await create_edge(operator, name)
    assert (await inside.get(f"{SITES}/{name}")).status_code == 200
    assert (await inside.put(f"{SITES}/{name}", json=edge(name, drain=True))).status_code == 403
    assert (await inside.delete(f"{SITES}/{name}")).status_code == 403
    assert (await inside.post(STATE.format(name), json=DECOMMISSIONING)).status_code == 403
    token = await inside.post(TOKENS, json={"metadata": {"name": f"t-{name}"}, "spec": {"type": "JWT", "site_name": name}})
    assert token.status_code == 403
    assert (await operator.delete(f"{SITES}/{name}")).status_code == 200


async def test_a_token_from_before_the_edge_admits_nobody_to_it(
    app: FastAPI, operator: httpx.AsyncClient, inside: httpx.AsyncClient
) -> None:
    name = fresh()
    token = await token_for(inside, name)
    await create_edge(operator, name)
    async with node(app, token, name) as made:
        with pytest.raises(Refused, match="is a regional edge"):
            await made.bootstrap()


async def test_a_token_for_a_customer_edge_does_not_admit_an_edge(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with node(app, await token_for(user, "berlin"), "berlin") as made:
        with pytest.raises(Refused, match="is for a customer edge"):
            await made.bootstrap(passport=Passport(cluster_name="berlin", cluster_type="re"))


async def test_a_site_stays_of_the_kind_that_it_is(operator: httpx.AsyncClient) -> None:
    name = fresh()
    await create_edge(operator, name)
    answer = await operator.put(f"{SITES}/{name}", json={"metadata": {"name": name}, "spec": {}})
    assert answer.status_code == 400
    assert "cannot become CUSTOMER_EDGE" in answer.json()["message"]


async def test_an_edge_is_not_connected_to_edges(operator: httpx.AsyncClient) -> None:
    answer = await operator.post(SITES, json=edge(fresh(), re_select={"geo_proximity": {}}))
    assert answer.status_code == 400
    assert "re_select is for customer edges" in answer.json()["message"]


async def test_retiring_a_node_of_an_edge_waits_for_tenants_and_lets_none_wait(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, database: Database
) -> None:
    """A tenant, in the middle of withdrawing a node of its own, needs the operator's row, too."""

    async def blocked() -> bool:
        async with database.definer() as definer:
            return bool((await definer.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one())

    async with running_edge(app, operator, fresh()) as made, admitted(app, user, "berlin") as other:
        assert other.credentials
        tenant_id = UUID(other.credentials.tenant_id)
        async with database.sessions(tenant_id) as session:
            await raise_revision(session, tenant_id)
            path = APPROVE.format(made.registration)
            retiring = asyncio.create_task(operator.post(path, json={"state": "RETIRED"}))
            await until(blocked, "the operator to wait for the tenant")
            await announce(session, tenant_id, "tenant")
        assert (await retiring).status_code == 200


# Which edges a site is connected to


@asynccontextmanager
async def running_edge(app: FastAPI, operator: httpx.AsyncClient, name: str, **spec: Any) -> AsyncIterator[Node]:
    """With a gateway, and heard of just now."""
    await create_edge(operator, name, **spec)
    async with admitted(app, operator, name) as made:
        await made.report(gateways=(Gateway(node_id="", host=f"{name}.test", port=15443),))
        await made.beat()
        await app.state.services.heartbeats.flush(now())
        try:
            yield made
        finally:
            assert (await operator.delete(f"{SITES}/{name}")).status_code == 200


async def assigned(app: FastAPI, user: httpx.AsyncClient, site: str) -> list[str]:
    """The edges that a site should be connected to, after they were chosen."""
    services = app.state.services
    await assign(services.database, services.heartbeats, Seen(), now())
    spec = (await user.get(f"{SITES}/{site}")).json()["spec"]
    return [ref["name"] for ref in spec["connected_re_for_config"]]


async def items_of(made: Node, kind: ItemKind) -> dict[str, dict[str, Any]]:
    entries = {entry.hash: entry.key for entry in (await made.manifest()).entries if entry.kind == kind}
    if not entries:
        return {}
    found = await made.control.items(tuple(entries))
    return {entries[item.hash]: json.loads(item.body) for item in found}


async def test_a_site_is_connected_to_the_two_nearest_edges_and_told_of_them(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    near, nearer, far = (fresh() for _ in range(3))
    places = {near: 10.0, nearer: 2.0, far: 90.0}
    async with AsyncExitStack() as stack:
        for name, longitude in places.items():
            await stack.enter_async_context(running_edge(app, operator, name, coordinates={"latitude": 0, "longitude": longitude}))
        await user.post(SITES, json={"metadata": {"name": "berlin"}, "spec": {"coordinates": {"latitude": 0, "longitude": 0}}})
        made = await stack.enter_async_context(admitted(app, user, "berlin"))
        assert await assigned(app, user, "berlin") == [nearer, near]
        await caught_up(app, made.credentials.tenant_id if made.credentials else "")
        await app.state.services.delivery.compare()

        async def told() -> bool:
            found = (await items_of(made, ItemKind.EDGE)).values()
            dialled = {(edge["name"], edge["home"], gateway["host"]) for edge in found for gateway in edge["gateways"]}
            return dialled == {(nearer, True, f"{nearer}.test"), (near, True, f"{near}.test")}

        await until(told, "the site to be told where its edges are")
        edges = await items_of(made, ItemKind.EDGE)
        await made.beat()
        await app.state.services.heartbeats.flush(now())
        up = next(site_id for site_id, edge in edges.items() if edge["name"] == near)
        await made.report(edges=(EdgeHealth(site_id=up, state="UP", since=1.0, tunnels=3),))
        spec = (await user.get(f"{SITES}/berlin")).json()["spec"]
        assert [ref["name"] for ref in spec["connected_re"]] == [near]

        drained = {
            "metadata": {"name": nearer},
            "spec": {"site_type": "REGIONAL_EDGE", "drain": True, "coordinates": {"latitude": 0, "longitude": 2}},
        }
        assert (await operator.put(f"{SITES}/{nearer}", json=drained)).status_code == 200
        assert await assigned(app, user, "berlin") == [near, far, nearer]
        other = (await operator.get(f"{SITES}/{far}")).json()["system_metadata"]["uid"]
        await made.report(edges=tuple(EdgeHealth(site_id=site_id, state="UP", since=1.0, tunnels=3) for site_id in (up, other)))
        assert await assigned(app, user, "berlin") == [near, far]


# What an edge knows of tenants


async def test_an_edge_relays_for_every_tenant_with_live_sites_and_follows_them(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    async with AsyncExitStack() as stack:
        edge_node = await stack.enter_async_context(running_edge(app, operator, fresh()))
        berlin = await stack.enter_async_context(admitted(app, user, "berlin"))
        oslo = await stack.enter_async_context(admitted(app, stranger, "oslo"))
        assert berlin.credentials
        assert oslo.credentials
        tenants = {made.credentials.tenant_id: made.credentials for made in (berlin, oslo) if made.credentials}
        await app.state.services.delivery.compare()

        async def relayed() -> dict[str, dict[str, Any]] | None:
            found = await items_of(edge_node, ItemKind.RELAY)
            return found if tenants.keys() <= found.keys() else None

        relays = await until(relayed, "the edge to relay for both")
        for tenant_id, credentials in tenants.items():
            assert relays[tenant_id]["sites"] == [credentials.site_id]
            assert relays[tenant_id]["anchor_pem"] == credentials.peer_anchor_pem
        before = await edge_node.manifest()
        waiting = asyncio.create_task(edge_node.manifest(before.hash))
        assert (await user.delete(f"{SITES}/berlin")).status_code == 200
        await app.state.services.delivery.compare()
        after = await waiting
        assert ("relay", berlin.credentials.tenant_id) in after.removed


async def test_an_edge_hears_of_revocations_tenant_by_tenant(app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient) -> None:
    async with running_edge(app, operator, fresh()) as edge_node, admitted(app, user, "berlin") as gone, admitted(app, user, "oslo"):
        assert gone.credentials
        of_shard = f"{gone.credentials.tenant_id}/{shard(gone.credentials.site_id)}"

        async def revoked_at() -> int:
            await app.state.services.delivery.compare()
            (site,) = (await items_of(edge_node, ItemKind.SITE)).values()
            return int(site["revocations"].get(of_shard, 0))

        before = await revoked_at()
        assert (await user.delete(f"{SITES}/berlin")).status_code == 200

        async def heard() -> bool:
            return await revoked_at() > before

        await until(heard, "the edge to hear of it")


async def test_tenants_learn_nothing_of_each_other_from_edges(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    async with running_edge(app, operator, fresh()), admitted(app, user, "berlin") as made, admitted(app, stranger, "oslo") as other:
        assert other.credentials
        await assigned(app, user, "berlin")
        told = str([await items_of(made, kind) for kind in ItemKind])
        assert other.credentials.tenant_id not in told
        assert other.credentials.site_id not in told
        assert await items_of(made, ItemKind.RELAY) == {}
