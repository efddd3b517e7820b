"""Services that clusters export: told by nodes, compiled for the others, shown at the mesh group."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from agent.errors import AgentError
from agent.protocol.items import ItemKind
from agent.protocol.report import ExportedPort, MultiClusterServices, ServiceExport
from tests.api.enrolled import Node, admitted, caught_up, live
from tests.api.test_delivery import tenant_of

__all__ = ["live"]

GROUPS = "/api/config/namespaces/system/site_mesh_groups"
ALLOWED: dict[str, Any] = {
    "full_mesh": {},
    "virtual_site": [{"namespace": "shared", "name": "all"}],
    "enable_multi_cluster_services": {},
}
FORBIDDEN = {**ALLOWED, "enable_multi_cluster_services": None}


async def mesh(user: httpx.AsyncClient, spec: dict[str, Any]) -> None:
    everywhere = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["ves.io/siteName"]}}
    await user.post("/api/config/namespaces/shared/virtual_sites", json={"metadata": {"name": "all"}, "spec": everywhere})
    answer = await user.post(GROUPS, json={"metadata": {"name": "mesh"}, "spec": spec})
    assert answer.status_code == 200, answer.text


def exporting(*names: str, port: int = 80, at: float = 100) -> MultiClusterServices:
    ports = (ExportedPort(name="http", port=port),)
    exports = tuple(ServiceExport(namespace="shop", name=name, created_at=at, ports=ports) for name in names)
    return MultiClusterServices(offered=True, exports=exports)


async def published(app: FastAPI, node: Node) -> set[str]:
    await caught_up(app, tenant_of(node))
    return await node.keys_of(ItemKind.PUBLISH)


async def shown(user: httpx.AsyncClient) -> dict[str, Any]:
    status = (await user.get(f"{GROUPS}/mesh/status")).json()
    found: dict[str, Any] = status["multi_cluster_services"]
    return found


async def test_what_one_cluster_exports_the_others_of_the_mesh_group_import(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as a, admitted(live, user, "b") as b:
        await mesh(user, ALLOWED)
        await a.report(multi_cluster_services=exporting("cart"))
        assert await published(live, a) == {"shop/cart-clusterset"}
        assert await published(live, b) == set(), "it has not said that it takes part"
        await b.report(multi_cluster_services=MultiClusterServices(offered=True))
        assert await published(live, b) == {"shop/cart"}
        assert await a.keys_of(ItemKind.SERVICE_EXPORT) == {"shop/cart"}
        assert await a.keys_of(ItemKind.EXPORT) == {"system/mesh.shop.cart.80"}
        await a.report(multi_cluster_services=exporting())
        assert await published(live, b) == set()


async def test_nothing_is_imported_where_no_mesh_group_allows_it(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as a, admitted(live, user, "b") as b:
        await mesh(user, FORBIDDEN)
        await a.report(multi_cluster_services=exporting("cart"))
        await b.report(multi_cluster_services=exporting())
        assert await published(live, b) == set()
        assert "multi_cluster_services" not in (await user.get(f"{GROUPS}/mesh/status")).json()


async def test_the_mesh_group_shows_who_takes_part_and_what_is_exported_where(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as a, admitted(live, user, "b") as b, admitted(live, user, "c") as c, admitted(live, user, "d"):
        await mesh(user, ALLOWED)
        await a.report(multi_cluster_services=exporting("cart", at=100))
        await b.report(multi_cluster_services=exporting("cart", port=81, at=200))
        await c.report(multi_cluster_services=MultiClusterServices(offered=False, reason="publishing is off"))
        assert await shown(user) == {
            "clusters": [
                {"site": "a", "offered": True, "reason": ""},
                {"site": "b", "offered": True, "reason": ""},
                {"site": "c", "offered": False, "reason": "publishing is off"},
                {"site": "d", "offered": False, "reason": "nothing was heard of it yet"},
            ],
            "services": [
                {
                    "namespace": "shop",
                    "name": "cart",
                    "ports": [{"name": "http", "port": 80, "exported_by": ["a"]}],
                    "exported_by": ["a", "b"],
                    "imported_by": ["a", "b"],
                    "conflicts": [{"site": "b", "message": "an older export has the port http 80, and not http 81"}],
                }
            ],
        }


async def test_the_node_of_a_site_that_spoke_last_is_right(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as one, admitted(live, user, "a", "node-2") as two:
        await mesh(user, ALLOWED)
        await one.report(multi_cluster_services=exporting("cart"))
        await two.report(multi_cluster_services=exporting("till"))
        assert await published(live, one) == {"shop/till-clusterset"}
        await one.report(multi_cluster_services=exporting("cart"))
        assert await published(live, one) == {"shop/cart-clusterset"}, "the same words as before, but they are the latest"


@pytest.mark.parametrize("name", ["a/b", "Cart", "a.b", "", "x" * 64])
async def test_names_that_no_cluster_has_are_refused(live: FastAPI, user: httpx.AsyncClient, name: str) -> None:
    async with admitted(live, user, "a") as a:
        services = MultiClusterServices.model_construct(
            offered=True,
            reason="",
            exports=(ServiceExport.model_construct(namespace="shop", name=name, created_at=1, ports=(ExportedPort(port=80),)),),
        )
        with pytest.raises(AgentError, match="multi_cluster_services"):
            await a.report(multi_cluster_services=services)
