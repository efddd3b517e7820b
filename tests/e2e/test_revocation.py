"""What is left to a site, or to one node of it, once it was revoked: nothing, on real Envoys."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from agent.envoy import names
from agent.envoy.inputs import NodeIdentity
from agent.protocol.items import ExportUse, shard
from agent.protocol.peering import PEER_AUTHORITY, PEER_HEALTH_PATH
from agent.proxy import LISTENER_DRAIN_S
from controlplane import pki
from tests.e2e.dataplane_sites import (
    TENANT,
    TRUST_DOMAIN,
    Connection,
    LiveSite,
    Trust,
    World,
    ended,
    export,
    forward,
    free_port,
    http,
    listener,
    pool,
    serial,
    site_of,
    spoken,
    tcp,
    tcp_pod,
    three_sites,
    until,
    upgraded,
)
from tests.e2e.gateway_client import Http2, connect, dial, get

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """`a` and `c` may use the TCP export `shop/raw` of `b`."""

    async def listens_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with three_sites() as world:
        endpoint = await world.stack.enter_async_context(tcp_pod(world.b.host, listens_for_ever))
        world.shared(pool("shop/raw", world.b.site_id))
        world.b.knows(export("shop/raw", ExportUse(load_balancer="shop/raw", protocol="tcp", peers=(world.a.site_id, world.c.site_id))))
        world.b.endpoints("shop/raw", "pods", [endpoint])
        await world.apply()
        yield world


async def is_spoken_to(world: World, node: NodeIdentity, directory: Path, server_name: str = "") -> bool:
    try:
        async with dial(world.b.gateway, node, directory, server_name=server_name) as client:
            return await client.status(get(PEER_AUTHORITY, PEER_HEALTH_PATH)) == 200
    except (ConnectionError, ssl.SSLError):
        return False


async def test_idle_streams_of_the_shard_end_with_the_revocation_and_others_go_on(world: World, tmp_path: Path) -> None:
    a, c = world.a.local.node, world.c.local.node
    within_s = LISTENER_DRAIN_S + 10
    async with (
        dial(world.b.gateway, c, tmp_path, within_s=within_s) as revoked,
        dial(world.b.gateway, a, tmp_path, within_s=within_s) as other,
    ):
        for client in (revoked, other):
            _, status = await client.ask([*connect("raw.shop.tcp"), ("x-isthmus-lb", "shop/raw")], ends=False)
            assert status == 200
        world.b.knows(site_of(world.b, revocations={shard(c.site_id): 1}))
        await world.b.apply()
        kept = asyncio.create_task(_until_it_ends(other))
        await _until_it_ends(revoked)
        assert not kept.done()
        kept.cancel()
    assert await is_spoken_to(world, c, tmp_path)


async def tcp_streams(world: World) -> dict[str, Connection]:
    """To `b` and to `c`, by their names, through one load balancer of `a`."""

    def named(name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(name.encode())
            while data := await reader.read(1024):
                writer.write(data)
            writer.close()

        return serve

    key, port = "shop/kept-open", free_port(world.a.host)
    world.shared(pool(key, world.b.site_id, world.c.site_id))
    for site in (world.b, world.c):
        site.endpoints(key, "pods", [await world.stack.enter_async_context(tcp_pod(site.host, named(site.name)))])
        site.knows(export(key, world.use(key, "tcp")))
    world.a.knows(tcp(key, key), listener(port, key, protocol="tcp"))
    await world.apply()
    found: dict[str, Connection] = {}

    async def both() -> bool:
        reader, writer = await asyncio.open_connection(world.a.host, port)
        name = (await reader.read(1)).decode()
        if name in {"", *found}:
            writer.close()
        else:
            found[name] = reader, writer
        return len(found) == 2

    await until(both, "connections to both sites")
    return found


async def web_socket(world: World, site: LiveSite) -> Connection:
    """To a site, through a load balancer of `a`."""
    key = f"shop/sockets-{site.name}"
    host = await world.single_pool(f"sockets-{site.name}", site)
    world.listens(http(key, host, forward(key, web_socket=True)))
    site.endpoints(key, "pods", [world.pods[f"{site.name}1"].endpoint])
    await world.apply()
    await world.answers(host)
    return await upgraded(world.a.host, world.http_port, host)


async def test_idle_streams_to_the_shard_end_with_the_revocation_and_others_go_on(world: World) -> None:
    """On the side that opened them, whatever the other end does about it."""
    opened = await tcp_streams(world)
    gone, stay = [[opened[site.name], await web_socket(world, site)] for site in (world.b, world.c)]
    assert [await spoken(stream) for stream in (*gone, *stay)] == [b"?"] * 4
    world.a.knows(site_of(world.a, revocations={shard(world.b.site_id): 1}))
    await world.a.apply()
    for stream in gone:
        await ended(stream)
    assert [await spoken(stream) for stream in stay] == [b"?", b"?"]
    for _, writer in (*gone, *stay):
        writer.close()


async def test_nobody_chooses_another_shard_than_the_own(world: World, tmp_path: Path) -> None:
    elsewhere = names.peers_server_name(shard(world.a.site_id))
    assert not await is_spoken_to(world, world.c.local.node, tmp_path, elsewhere)
    assert await is_spoken_to(world, world.a.local.node, tmp_path, elsewhere)


async def _until_it_ends(client: Http2) -> None:
    """Answering its pings."""
    with suppress(ConnectionError):
        while True:
            await client.events()


async def test_one_node_of_a_site_is_revoked_and_the_others_are_not(world: World, tmp_path: Path) -> None:
    now = Trust.now()
    gone, stays = (world.c.trust.node(world.c.site_id, "c") for _ in range(2))
    assert [await is_spoken_to(world, node, tmp_path) for node in (gone, stays)] == [True, True]
    world.b.knows(site_of(world.b, peer_crl_pem=pki.revocations(world.b.trust.authority, [serial(gone)], now)))
    await world.b.apply()
    assert [await is_spoken_to(world, node, tmp_path) for node in (gone, stays)] == [False, True]


async def test_it_stays_revoked_while_the_authority_is_replaced(world: World, tmp_path: Path) -> None:
    now = Trust.now()
    old = world.b.trust
    root = pki.create_root(TRUST_DOMAIN, now)
    new = Trust(TENANT, pki.create_tenant_authority(root, TENANT, TRUST_DOMAIN, now, 2))
    gone, stays, fresh, fresh_gone = (trust.node(world.c.site_id, "c") for trust in (old, old, new, new))
    both = new.authority.certificate_pem + old.authority.certificate_pem
    lists = [pki.revocations(trust.authority, [serial(gone), serial(fresh_gone)], now) for trust in (new, old)]
    world.b.knows(site_of(world.b, peer_anchor_pem=both, peer_crl_pem="".join(lists)))
    await world.b.apply()
    found = [await is_spoken_to(world, node, tmp_path) for node in (gone, stays, fresh, fresh_gone)]
    assert found == [False, True, True, False]
    world.b.knows(site_of(world.b, peer_anchor_pem=new.authority.certificate_pem, peer_crl_pem=lists[0]))
    await world.b.apply()
    assert [await is_spoken_to(world, node, tmp_path) for node in (stays, fresh, fresh_gone)] == [False, True, False]


async def test_who_was_revoked_is_not_dialled_either(world: World) -> None:
    async with three_sites() as other:
        await other.apply()
        await other.answers("shop.test")
        crl_pem = pki.revocations(other.a.trust.authority, [serial(site.local.node) for site in (other.b, other.c)], Trust.now())
        other.a.knows(site_of(other.a, peer_crl_pem=crl_pem))
        await other.a.apply()
        for site in (other.b, other.c):
            site.knows(site_of(site, revocations={shard(other.a.site_id): 1}))
            await site.apply()

        async def refused() -> bool:
            return (await other.call("shop.test")).status_code == 503

        await until(refused, "nobody to be called", within_s=LISTENER_DRAIN_S + 20)
