"""What someone gets who has the key of a node and speaks to a gateway by hand."""

import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from agent.envoy.inputs import NodeIdentity
from agent.protocol.items import ExportUse, Gateway
from agent.protocol.peering import PEER_AUTHORITY, PEER_DOCUMENT_PATH, PEER_HEALTH_PATH
from controlplane import pki
from tests.e2e.dataplane_sites import TENANT, TRUST_DOMAIN, Trust, World, export, pool, three_sites
from tests.e2e.gateway_client import Headers, connect, dial, get, through

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """`c` may use `shop/open` of `b` through `shop/door`, and nothing else there."""
    async with three_sites() as world:
        world.shared(pool("shop/open", world.b.site_id))
        world.b.knows(export("shop/open", ExportUse(load_balancer="shop/door", protocol="http", peers=(world.c.site_id,))))
        world.b.endpoints("shop/open", "pods", [world.pods["b2"].endpoint])
        await world.apply()
        yield world


async def refused(gateway: Gateway, node: NodeIdentity | None, directory: Path, *, newest: bool = True) -> bool:
    """Whether not even a health check is answered."""
    try:
        async with dial(gateway, node, directory, newest=newest) as client:
            await client.status(get(PEER_AUTHORITY, PEER_HEALTH_PATH))
    except (ConnectionError, ssl.SSLError):
        return True
    return False


async def test_only_nodes_of_the_tenant_are_spoken_to(world: World, tmp_path: Path) -> None:
    other_tenant = Trust.create("0b000000-0000-4000-8000-000000000002")
    impostor = Trust(TENANT, other_tenant.authority)
    for stranger in (None, other_tenant.node(world.a.site_id, "x"), impostor.node(world.a.site_id, "x")):
        assert await refused(world.b.gateway, stranger, tmp_path)
    assert not await refused(world.b.gateway, world.a.local.node, tmp_path)


async def test_another_tenant_under_the_same_root_is_a_stranger(tmp_path: Path) -> None:
    root = pki.create_root(TRUST_DOMAIN, Trust.now())
    ours, theirs = Trust.create(root=root), Trust.create("0b000000-0000-4000-8000-000000000002", root)
    async with three_sites(ours) as world:
        node = theirs.node(world.a.site_id, "x")
        chained = replace(node, certificate_pem=node.certificate_pem + theirs.authority.certificate_pem + root.certificate_pem)
        assert await refused(world.b.gateway, chained, tmp_path)


async def test_nothing_older_than_tls_1_3_is_spoken(world: World, tmp_path: Path) -> None:
    assert await refused(world.b.gateway, world.a.local.node, tmp_path, newest=False)


async def test_a_site_reaches_only_the_exports_that_are_for_it(world: World, tmp_path: Path) -> None:
    async with dial(world.b.gateway, world.c.local.node, tmp_path) as client:
        assert await client.status(connect("cart.shop.http")) == 403
        assert await client.status(connect("cart.shop.tcp")) in {403, 404}
        assert await client.status(connect("unknown.shop.http")) in {403, 404}
        assert await client.status(get("cart.shop.http", "/")) in {403, 404}
        assert await client.status(get(PEER_AUTHORITY, PEER_HEALTH_PATH)) == 200
        assert (await client.ask(connect("open.shop.http"), ends=False))[1] == 200


async def test_a_site_that_is_no_peer_gets_nothing(world: World, tmp_path: Path) -> None:
    stranger = world.b.trust.node("00000009-0000-4000-8000-000000000000", "stranger")
    async with dial(world.b.gateway, stranger, tmp_path) as client:
        for path in (PEER_HEALTH_PATH, PEER_DOCUMENT_PATH):
            assert await client.status(get(PEER_AUTHORITY, path)) == 403
        assert await client.status(connect("open.shop.http")) == 403


async def inside(world: World, directory: Path, authority: str, headers: Headers) -> int:
    """The status of a request in a CONNECT stream of `c` to an export of `b`."""
    async with dial(world.b.gateway, world.c.local.node, directory) as client:
        return await through(client, authority, headers)


async def test_headers_do_not_change_which_export_was_opened_or_who_opened_it(world: World, tmp_path: Path) -> None:
    lb = ("x-isthmus-lb", "shop/door")
    uri = f"spiffe://{TRUST_DOMAIN}/tenant/{TENANT}/site/{world.a.site_id}/node/n"
    seen = len(world.pods["b1"].seen)
    assert await inside(world, tmp_path, "open.shop.http", get("open.test", "/", lb)) == 200
    forgeries: list[Headers] = [
        get("cart.shop.http", "/", ("x-isthmus-lb", "shop/front")),
        get("cart.shop.http", "/", ("x-isthmus-lb", "shop/front"), ("x-isthmus-export", "cart.shop.http")),
        get("shop.test", "/", ("x-isthmus-lb", "shop/front"), ("x-isthmus-export", "cart.shop.http"), ("x-isthmus-peer", uri)),
        get("open.test", "/"),
    ]
    for forged in forgeries:
        assert await inside(world, tmp_path, "open.shop.http", forged) in {403, 404}
    assert len(world.pods["b1"].seen) == seen


async def test_a_header_does_not_open_another_export_beside_the_one_that_was_opened(world: World, tmp_path: Path) -> None:
    headers = get("open.test", "/", ("x-isthmus-lb", "shop/door"), ("x-isthmus-export", "cart.shop.http"))
    before = {name: len(pod.seen) for name, pod in world.pods.items()}
    assert await inside(world, tmp_path, "open.shop.http", headers) == 200
    assert {name for name, pod in world.pods.items() if len(pod.seen) > before[name]} == {"b2"}
