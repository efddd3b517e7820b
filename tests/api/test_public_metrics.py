"""What public load balancers served at regional edges: seen by the tenant whose they are, and by nobody else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import REGISTRY

from agent.protocol.items import ItemKind
from agent.protocol.report import OriginHealth, PeerHealth
from tests.api.enrolled import Node, admitted
from tests.api.test_observability import edge as counted
from tests.api.test_observability import served, site_id, values
from tests.api.test_public_names import HTTP, POOLS, domain, follows, grant, pool, public
from tests.api.test_regional_edges import fresh, running_edge

GRAPH = "/api/data/namespaces/shop/graph/service"


def whose(made: Node) -> str:
    assert made.credentials
    return made.credentials.tenant_id


@asynccontextmanager
async def two_tenants(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> AsyncIterator[tuple[Node, Node, Node]]:
    """An edge, and a site of each; both have a load balancer `shop/web` on all edges."""
    await stranger.post("/api/web/namespaces", json={"metadata": {"name": "shop"}})
    async with (
        running_edge(app, operator, fresh()) as edge,
        admitted(app, user, "berlin") as one,
        admitted(app, stranger, "berlin") as other,
    ):
        for tenant in (user, stranger):
            name = domain()
            await grant(operator, tenant, name)
            assert (await tenant.post(POOLS, json=pool())).status_code == 200
            assert (await tenant.post(HTTP, json=public("web", name))).status_code == 200
        await follows(app, edge, ItemKind.HTTP_LOADBALANCER, [one, other], ["shop/web"])
        yield edge, one, other


async def graph(user: httpx.AsyncClient) -> dict[tuple[str, str, str], float]:
    """Bytes sent, by source, destination and load balancer."""
    answer = await user.post(GRAPH, json={"group_by": ["VHOST", "SITE"]})
    assert answer.status_code == 200, answer.text
    return {
        (found["src_id"]["site"], found["dst_id"]["site"], found["dst_id"]["vhost"]): values(found["data"]["metric"]["data"])[
            "HTTP_REQUEST_RATE"
        ]
        for found in answer.json()["data"]["edges"]
    }


def dropped() -> float:
    return REGISTRY.get_sample_value("isthmus_metrics_dropped_total") or 0.0


async def test_every_tenant_sees_its_own_at_the_edge_and_nothing_of_others(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    async with two_tenants(app, operator, user, stranger) as (edge, one, other):
        await served(
            edge,
            counted(site_id(one), f"{whose(one)}/shop/web", requests={"2xx": 600}),
            counted(site_id(other), f"{whose(other)}/shop/web", requests={"2xx": 60}),
        )
        mine, theirs = await graph(user), await graph(stranger)
        assert set(mine) == set(theirs) == {(edge.site, "berlin", "ves-io-http-loadbalancer-web")}
        assert sum(mine.values()) > 5 * sum(theirs.values()) > 0
        lines = [line for line in (await operator.get("/metrics")).text.splitlines() if f'source_site="{edge.site}"' in line]
        requests = {line.rpartition(" ")[2] for line in lines if line.startswith("isthmus_loadbalancer_requests_total")}
        assert requests == {"600.0", "60.0"}


async def test_a_repeated_report_of_an_edge_counts_once(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    async with two_tenants(app, operator, user, stranger) as (edge, one, _):
        for _ in range(2):
            await served(edge, counted(site_id(one), f"{whose(one)}/shop/web", requests={"2xx": 7}), sequence=3)
        totals = (await operator.get("/metrics")).text.splitlines()
        (line,) = [line for line in totals if f'source_site="{edge.site}"' in line and 'class="2xx"' in line]
        assert line.endswith(" 7.0")


async def test_what_is_not_advertised_on_the_edge_is_dropped_and_counted(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    async with two_tenants(app, operator, user, stranger) as (edge, one, other):
        before = dropped()
        await served(
            edge,
            counted(site_id(one), f"{whose(one)}/shop/none"),
            counted(site_id(other), f"{whose(one)}/shop/web"),
            counted(site_id(one), "shop/web"),
            counted(site_id(one), "nobody/shop/web"),
            counted("", f"{whose(one)}/shop/web", requests={"5xx": 1}),
        )
        assert dropped() == before + 4
        assert {destination for _, destination, _ in await graph(user)} <= {""}
        assert await graph(stranger) == {}


async def test_a_customer_edge_reports_for_nobody_else(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    async with two_tenants(app, operator, user, stranger) as (_, one, other):
        before = dropped()
        for sequence, whom in enumerate((one, other), start=1):
            await served(one, counted(site_id(one), f"{whose(whom)}/shop/web"), sequence=sequence)
        assert dropped() == before + 2
        assert await graph(user) == await graph(stranger) == {}


async def test_what_an_edge_sees_of_sites_is_shown_to_no_tenant(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient, inside: httpx.AsyncClient
) -> None:
    async with two_tenants(app, operator, user, stranger) as (edge, one, other):
        health: dict[str, Any] = {"state": "DOWN", "since": 1.0, "error": "seen by the edge"}
        await edge.report(
            peers=tuple(PeerHealth(site_id=site_id(made), path=site_id(edge), **health) for made in (one, other)),
            origins=tuple(OriginHealth(pool=f"{whose(made)}/shop/app", healthy=4711, total=4711) for made in (one, other)),
        )
        for tenant in (user, stranger, inside):
            for path in ("/api/config/namespaces/system/sites", f"{POOLS}/app/status", "/api/config/namespaces/system/sites/berlin/status"):
                text = (await tenant.get(path, params={"report_fields": ""} if path.endswith("sites") else {})).text
                assert "seen by the edge" not in text
                assert "4711" not in text
        shown = (await inside.get(f"/api/config/namespaces/system/sites/{edge.site}/status")).text
        assert site_id(one) not in shown
        assert site_id(other) not in shown
