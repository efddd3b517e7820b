"""Load balancers of two tenants on one regional edge, which lead to sites that nobody can dial."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from agent.envoy import stats
from agent.envoy.inputs import Item
from agent.envoy.render import render
from agent.protocol.items import ItemKind, Origin, OriginPool
from tests.e2e.dataplane_sites import (
    LiveSite,
    export,
    forward,
    free_port,
    http,
    http_pod,
    item,
    listener,
    pool,
    tcp,
    tcp_pod,
    until,
)
from tests.e2e.relay_sites import Relayed, relayed, use
from tests.e2e.test_dataplane_tcp import named

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOSTS = {"ours.test": "b1", "theirs.test": "x1"}


def in_tenant(site: LiveSite, key: str) -> str:
    """The key of an item of the site's tenant at an edge."""
    return f"{site.trust.tenant_id}/{key}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[Relayed]:
    """Both tenants have a `shop/front` for a pool `shop/cart`; ours has `shop/db` too."""
    async with relayed(91) as world:
        e, b, x = world.e, world.b, world.x
        world.ports |= {"http": free_port(e.host), "db": free_port(e.host)}
        fronts = []
        theirs = await world.stack.enter_async_context(http_pod("x1", x.host))
        for site, host, pod in ((b, "ours.test", world.pod), (x, "theirs.test", theirs)):
            cart = in_tenant(site, "shop/cart")
            fronts.append(in_tenant(site, "shop/front"))
            e.knows(world.peer(site, tenant_id=site.trust.tenant_id), pool(cart, site.site_id), http(fronts[-1], host, forward(cart)))
            site.knows(pool("shop/cart", site.site_id), export("shop/cart", use(edges=(e.site_id,))))
            site.endpoints("shop/cart", "pods", [pod.endpoint])
        db = in_tenant(b, "shop/db")
        e.knows(listener(world.ports["http"], *fronts), listener(world.ports["db"], db, protocol="tcp"))
        e.knows(pool(db, b.site_id), tcp(db, db))
        b.knows(pool("shop/db", b.site_id), export("shop/db", use(load_balancer="shop/db", protocol="tcp", edges=(e.site_id,))))
        b.endpoints("shop/db", "pods", [await world.stack.enter_async_context(tcp_pod(b.host, named("b")))])
        await world.apply()
        for host in HOSTS:
            await world.answers(at=e, port=world.ports["http"], host=host)
        yield world


@pytest.mark.parametrize("host", HOSTS)
async def test_each_tenant_gets_its_own_site(world: Relayed, host: str) -> None:
    replies = [await world.call(at=world.e, port=world.ports["http"], host=host) for _ in range(8)]
    assert {reply.headers["x-pod"] for reply in replies} == {HOSTS[host]}
    assert not [name for name in replies[0].json()["headers"] if name.startswith("x-isthmus")]


async def test_connections_cross_too(world: Relayed) -> None:
    async def greeted() -> bytes:
        reader, writer = await asyncio.open_connection(world.e.host, world.ports["db"])
        writer.write(b"query")
        writer.write_eof()
        answer = await reader.read(-1)
        writer.close()
        return answer

    assert await until(greeted, "the database answering") == b"bquerybye"


async def test_what_happened_is_counted_by_tenant_and_site(world: Relayed) -> None:
    edges = stats.parse(await world.e.proxy.admin.get(stats.PATH)).edges
    for site in (world.b, world.x):
        key = stats.EdgeKey("http", in_tenant(site, "shop/front"), site.site_id)
        assert edges[key].requests["2xx"] > 0


async def test_an_edge_that_the_export_does_not_name_gets_nothing(world: Relayed) -> None:
    world.b.knows(export("shop/cart", use(edges=(world.f.site_id,))))
    await world.b.apply()
    assert (await world.call(at=world.e, port=world.ports["http"], host="ours.test")).status_code == 403
    assert (await world.call(at=world.e, port=world.ports["http"], host="theirs.test")).status_code == 200
    world.b.knows(export("shop/cart", use(edges=(world.e.site_id,))))
    await world.b.apply()
    assert (await world.call(at=world.e, port=world.ports["http"], host="ours.test")).status_code == 200


@pytest.mark.parametrize("sites", [None, ("edge",)], ids=["public address", "at the edge"])
async def test_an_origin_that_the_edge_would_dial_is_a_problem_of_its_tenant_alone(world: Relayed, sites: tuple[str, ...] | None) -> None:
    dialled: Item = _dialled(world, sites)
    front = in_tenant(world.b, "shop/outside")
    known = [in_tenant(site, "shop/front") for site in (world.b, world.x)]
    snapshot = world.e.snapshot.with_items(
        [dialled, http(front, "outside.test", forward(dialled.id.key)), listener(world.ports["http"], *known, front)]
    )
    resources = render(snapshot, world.e.local)
    assert {problem.item.key for problem in resources.problems} == {dialled.id.key, front}
    assert (await world.e.xds.apply(resources)).accepted
    assert (await world.call(at=world.e, port=world.ports["http"], host="outside.test")).status_code == 503
    assert (await world.call(at=world.e, port=world.ports["http"], host="theirs.test")).status_code == 200


def _dialled(world: Relayed, sites: tuple[str, ...] | None) -> Item:
    where = None if sites is None else (world.e.site_id,)
    origin = Origin(key="out", type="ip", address="203.0.113.7", port=80, sites=where)
    return item(ItemKind.ORIGIN_POOL, in_tenant(world.b, "shop/outside"), OriginPool(origins=(origin,)))
