"""Sites that reach each other through regional edges, and keep doing so when links and edges fail."""

import asyncio
import os
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from lab import faults
from lab.fabric import Fabric
from lab.specs import http_loadbalancer
from lab.traffic import Traffic
from lab.wait import until
from tests.e2e.calls import answers
from tests.e2e.hub_and_spokes import EDGES, FAR, HUB, NEAR, comes_by, drain, furnish, hub_and_spokes, path

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    async with hub_and_spokes() as fabric:
        show_logs_of.append(fabric)
        await furnish(fabric)
        yield fabric


async def test_a_spoke_reaches_its_hub_directly(fabric: Fabric) -> None:
    client = await answers(fabric, NEAR, "hub.test")
    assert (await client.get("/")).headers["x-pod"].startswith("in-hub")
    assert await comes_by(fabric, NEAR, HUB, "direct")


async def test_spokes_reach_each_other_through_an_edge(fabric: Fabric) -> None:
    client = await answers(fabric, NEAR, "far.test")
    assert (await client.get("/")).headers["x-pod"].startswith("in-far")
    assert await comes_by(fabric, NEAR, FAR, *EDGES)
    assert (await path(fabric, NEAR, FAR))["to_be_direct"]


async def test_a_site_that_cannot_be_dialled_is_reached_directly_through_tunnels_of_its_own(fabric: Fabric) -> None:
    client = await answers(fabric, HUB, "far.test")
    assert (await client.get("/")).headers["x-pod"].startswith("in-far")
    assert await comes_by(fabric, HUB, FAR, "reverse")


@pytest.mark.parametrize(("source", "port"), [(NEAR, 9001), (NEAR, 9002), (HUB, 9002)])
async def test_bytes_cross_by_every_path_and_half_closing_works(fabric: Fabric, source: str, port: int) -> None:
    reader, writer = await fabric.site(source).connect(port)
    sent = os.urandom(1 << 20)
    writer.write(sent)
    writer.write_eof()
    received = await reader.read(-1)
    writer.close()
    assert received.partition(b"\n")[2] == sent


async def test_when_the_direct_link_is_cut_requests_go_through_an_edge_and_come_back(fabric: Fabric) -> None:
    if not faults.can_filter(fabric.network):
        pytest.skip("needs root, network namespaces and nftables")
    client = await answers(fabric, NEAR, "hub.test")
    await comes_by(fabric, NEAR, HUB, "direct")
    async with Traffic(client, "/") as traffic:
        await traffic.more(20)
        with faults.silent([fabric.site(NEAR).place], [fabric.site(HUB).place]):
            await comes_by(fabric, NEAR, HUB, *EDGES)
            await traffic.more(50)
        await comes_by(fabric, NEAR, HUB, "direct")
        await traffic.more(50)
    assert traffic.failures == []


async def test_a_drained_edge_is_left_without_a_failed_request(fabric: Fabric) -> None:
    client = await answers(fabric, NEAR, "far.test")
    before = await comes_by(fabric, NEAR, FAR, *EDGES)
    other = next(edge for edge in EDGES if edge != before)
    async with Traffic(client, "/") as traffic:
        await traffic.more(20)
        await drain(fabric, before)
        await comes_by(fabric, NEAR, FAR, other)
        await traffic.more(50)
        await drain(fabric, before, drain=False)
        await traffic.more(50)
    assert traffic.failures == []


async def test_a_killed_edge_costs_no_request(fabric: Fabric) -> None:
    client = await answers(fabric, NEAR, "far.test")
    before = await comes_by(fabric, NEAR, FAR, *EDGES)
    edge = fabric.edge(before)
    async with Traffic(client, "/") as traffic:
        await traffic.more(20)
        await faults.kill(edge.nodes)
        await traffic.more(100)
        await edge.agent.start()
        await fabric.online(before)
        await traffic.more(50)
    assert traffic.failures == []


async def test_a_service_in_a_cluster_is_published_on_the_edges(fabric: Fabric) -> None:
    """Also one of a site that nobody can dial."""
    where = [{"site": {"network": "SITE_NETWORK_OUTSIDE", "site": {"namespace": "system", "name": edge}}} for edge in EDGES]
    spec = http_loadbalancer("shop.example", ["in-far"], []) | {"advertise_custom": {"advertise_where": where}}
    for name in ("shop.example", ":8080"):
        await fabric.api.request("POST", "/api/operator/public_names", {"name": name, "tenant": "default"})
    created = await fabric.api.create("http_loadbalancer", "public", spec)
    await fabric.api.applied("http_loadbalancer", "public", revision=created["revision"])
    for name in EDGES:
        edge = fabric.edge(name)
        host, port = await edge.reach(8080, edge.place.underlay)
        client = fabric.client(f"http://{host}:{port}", {"host": "shop.example"})

        async def served(client: httpx.AsyncClient = client) -> bool:
            try:
                return str((await client.get("/")).headers.get("x-pod", "")).startswith("in-far")
            except httpx.TransportError as error:
                raise ConnectionError(str(error)) from error

        await until(served, f"{name} to serve a public name")
        assert (await client.get("/", headers={"host": "other.example"})).status_code == 404


async def test_both_ends_stay_in_touch_while_the_control_plane_is_away(fabric: Fabric) -> None:
    """And the edge that they use goes too."""
    client = await answers(fabric, NEAR, "far.test")
    edge = fabric.edge(await comes_by(fabric, NEAR, FAR, *EDGES))
    async with Traffic(client, "/") as traffic:
        with faults.frozen([fabric.replicas[0].process.pid]):
            await traffic.more(20)
            with faults.frozen(faults.programs(edge.nodes)):
                await traffic.more(100)
            await traffic.more(20)
    assert traffic.failures == []
    await asyncio.gather(*(fabric.online(name) for name in EDGES))
