"""What someone gets at a regional edge who has the key of a node, and what an edge gets at a site."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent.envoy import names
from agent.envoy.inputs import NodeIdentity
from agent.protocol.items import ItemKind, Peer, shard
from agent.protocol.peering import PEER_AUTHORITY, PEER_DOCUMENT_PATH, PEER_HEALTH_PATH
from agent.proxy import LISTENER_DRAIN_S
from controlplane import pki
from tests.e2e.dataplane_sites import (
    TRUST_DOMAIN,
    Connection,
    LiveSite,
    Trust,
    ended,
    export,
    forward,
    free_port,
    http,
    http_pod,
    item,
    listener,
    pool,
    serial,
    site_of,
    spoken,
    until,
    upgraded,
)
from tests.e2e.gateway_client import Headers, carried, client_context, connect, dial, get
from tests.e2e.relay_sites import Relayed, relayed, use

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSED = (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)
UNLISTED = "00000099-0000-4000-8000-000000000000"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[Relayed]:
    async with relayed(31) as world:
        await world.leads(world.e.site_id)
        yield world


async def stream(world: Relayed, node: NodeIdentity | None, tenant: Trust, site: str, directory: Path) -> int | None:
    """The status of a CONNECT stream through `e` to a site, asked for under a tenant; None if the edge does not even speak."""
    try:
        async with dial(world.e.gateway, node, directory, server_name=names.relay_server_name(tenant.tenant_id)) as client:
            return (await client.ask(connect(site), ends=False))[1]
    except REFUSED:
        return None


async def test_a_stream_goes_to_a_site_of_the_same_tenant(world: Relayed, tmp_path: Path) -> None:
    assert await stream(world, world.a.local.node, world.a.trust, world.b.site_id, tmp_path) == 200


async def test_a_stream_goes_to_no_other_tenant_and_from_none(world: Relayed, tmp_path: Path) -> None:
    ours, theirs = world.a.trust, world.x.trust
    assert await stream(world, world.x.local.node, theirs, world.x.site_id, tmp_path) == 200
    assert await stream(world, world.x.local.node, theirs, world.b.site_id, tmp_path) == 403
    assert await stream(world, world.x.local.node, ours, world.b.site_id, tmp_path) is None
    assert await stream(world, world.a.local.node, theirs, world.x.site_id, tmp_path) is None
    assert await stream(world, world.a.local.node, ours, world.x.site_id, tmp_path) == 403
    assert await stream(world, None, ours, world.b.site_id, tmp_path) is None


async def test_an_impostor_who_names_another_tenant_in_a_certificate_of_its_own_is_refused(world: Relayed, tmp_path: Path) -> None:
    impostor = Trust(world.a.trust.tenant_id, world.x.trust.authority)
    assert await stream(world, impostor.node(world.a.site_id, "a"), world.a.trust, world.b.site_id, tmp_path) is None


async def test_who_has_no_business_at_the_edge_is_refused(world: Relayed, tmp_path: Path) -> None:
    unlisted = world.a.trust.node(UNLISTED, "c")
    assert await stream(world, unlisted, world.a.trust, world.b.site_id, tmp_path) == 403
    assert await stream(world, world.e.local.node, world.a.trust, world.b.site_id, tmp_path) is None
    assert await stream(world, world.a.local.node, world.a.trust, UNLISTED, tmp_path) == 403


async def test_headers_choose_neither_tenant_nor_site(world: Relayed, tmp_path: Path) -> None:
    forged = [
        ("x-isthmus-peer", f"spiffe://{TRUST_DOMAIN}/tenant/{world.a.trust.tenant_id}/site/{world.a.site_id}/node/n"),
        ("x-envoy-reverse-tunnel-cluster-id", f"CN={world.b.site_id}"),
        ("x-envoy-reverse-tunnel-tenant-id", world.a.trust.tenant_id),
    ]
    async with dial(world.e.gateway, world.x.local.node, tmp_path, server_name=names.relay_server_name(world.x.trust.tenant_id)) as client:
        assert (await client.ask([*connect(world.b.site_id), *forged], ends=False))[1] == 403
    seen = len(world.pod.seen)
    async with dial(world.e.gateway, world.x.local.node, tmp_path, server_name=names.relay_server_name(world.x.trust.tenant_id)) as client:
        identifier, status = await client.ask([*connect(world.x.site_id), *forged], ends=False)
        assert status == 200
        client.connection.send_data(identifier, b"GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n")
        client.flush()
    assert len(world.pod.seen) == seen


async def test_an_edge_says_how_it_is_to_the_sites_that_it_serves(world: Relayed, tmp_path: Path) -> None:
    async def asked(node: NodeIdentity, tenant: Trust, path: str) -> int:
        async with dial(world.e.gateway, node, tmp_path, server_name=names.relay_server_name(tenant.tenant_id)) as client:
            return await client.status(get(PEER_AUTHORITY, path))

    assert await asked(world.a.local.node, world.a.trust, PEER_HEALTH_PATH) == 200
    assert await asked(world.x.local.node, world.x.trust, PEER_HEALTH_PATH) == 200
    for path in (PEER_HEALTH_PATH, PEER_DOCUMENT_PATH):
        assert await asked(world.a.trust.node(UNLISTED, "c"), world.a.trust, path) == 403


async def handshake(world: Relayed, shown: NodeIdentity | None, asked: Trust, directory: Path, **claimed: str) -> int | None:
    """The status of a reverse tunnel's handshake at `e` with this certificate; None if there was no answer."""
    context = client_context(shown, directory)
    claims = {"node": f"node-of-a.{world.a.site_id}.{world.a.trust.tenant_id}.{TRUST_DOMAIN}", "cluster": f"CN={world.a.site_id}"}
    claims |= {"tenant": world.a.trust.tenant_id, **claimed}
    lines = [f"x-envoy-reverse-tunnel-{name}-id: {value}" for name, value in claims.items()]
    request = "\r\n".join(["GET /reverse_connections/request HTTP/1.1", "host: e", *lines, "", ""])
    name = names.tunnels_server_name(asked.tenant_id)
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(world.e.gateway.host, world.e.gateway.port, ssl=context, server_hostname=name)
            try:
                writer.write(request.encode())
                return int((await reader.readline() or b"HTTP/1.1 0").split()[1]) or None
            finally:
                writer.close()
    except REFUSED:
        return None


async def test_a_tunnel_leads_to_the_site_of_its_certificate_and_to_no_other(world: Relayed, tmp_path: Path) -> None:
    node, ours, theirs = world.a.local.node, world.a.trust, world.x.trust
    assert await handshake(world, node, ours, tmp_path) == 200
    assert await handshake(world, node, ours, tmp_path, cluster=f"CN={world.b.site_id}") == 403
    assert await handshake(world, node, ours, tmp_path, node=f"node-of-b.{world.b.site_id}.{ours.tenant_id}.{TRUST_DOMAIN}") == 403
    assert await handshake(world, node, ours, tmp_path, tenant=theirs.tenant_id) == 403
    assert await handshake(world, node, ours, tmp_path, cluster="") != 200
    assert await handshake(world, node, theirs, tmp_path, tenant=theirs.tenant_id) is None
    assert await handshake(world, world.x.local.node, ours, tmp_path) is None
    assert await handshake(world, None, ours, tmp_path) is None
    assert await handshake(world, ours.node(UNLISTED, "c"), ours, tmp_path, cluster=f"CN={UNLISTED}") is None


async def test_who_says_nothing_is_not_waited_for(world: Relayed, tmp_path: Path) -> None:
    context, name = client_context(world.a.local.node, tmp_path), names.tunnels_server_name(world.a.trust.tenant_id)
    reader, writer = await asyncio.open_connection(world.e.gateway.host, world.e.gateway.port, ssl=context, server_hostname=name)
    try:
        async with asyncio.timeout(15):
            assert await reader.read() == b""
    finally:
        writer.close()


async def at_b(world: Relayed, node: NodeIdentity, server_name: str, directory: Path, *asked: Headers) -> list[int] | None:
    """Statuses at the gateway of `b` in a session through `e`, whoever it is that got so far; None if the session is refused."""
    name = names.relay_server_name(world.a.trust.tenant_id)
    async with dial(world.e.gateway, world.a.local.node, directory, server_name=name) as outer:
        stream, status = await outer.ask(connect(world.b.site_id), ends=False)
        assert status == 200
        try:
            async with (
                carried(outer, stream) as sock,
                dial(world.b.gateway, node, directory, dialled=sock, server_name=server_name) as client,
            ):
                return [(await client.ask(headers, ends=False))[1] for headers in asked]
        except REFUSED:
            return None


CART = connect("cart.shop.http")
HEALTH = get(PEER_AUTHORITY, PEER_HEALTH_PATH)


async def test_inside_a_stream_the_receiver_decides_by_the_certificate_of_the_sender(world: Relayed, tmp_path: Path) -> None:
    assert await at_b(world, world.a.local.node, "", tmp_path, HEALTH, CART) == [200, 200]
    assert await at_b(world, world.a.trust.node(UNLISTED, "c"), "", tmp_path, HEALTH, CART) == [403, 403]
    assert await at_b(world, world.x.local.node, "", tmp_path, HEALTH) is None


async def test_a_regional_edge_opens_only_exports_that_name_it(world: Relayed, tmp_path: Path) -> None:
    edge, other = world.e.local.node, world.f.local.node
    assert await at_b(world, edge, names.INGRESS_SERVER_NAME, tmp_path, CART) == [403]
    world.b.knows(export("shop/cart", use(world.a), use(load_balancer="shop/public", edges=(world.e.site_id,))))
    await world.b.apply()
    assert await at_b(world, edge, names.INGRESS_SERVER_NAME, tmp_path, CART, HEALTH) == [200, 200]
    assert await at_b(world, other, names.INGRESS_SERVER_NAME, tmp_path, CART, HEALTH) == [403, 403]
    assert await at_b(world, edge, "", tmp_path, CART) is None
    assert await at_b(world, world.a.local.node, names.INGRESS_SERVER_NAME, tmp_path, CART) is None
    world.b.knows(export("shop/cart", use(world.a)))
    await world.b.apply()
    assert await at_b(world, edge, names.INGRESS_SERVER_NAME, tmp_path, CART) == [403]


async def test_a_regional_edge_cannot_dial_a_site(world: Relayed, tmp_path: Path) -> None:
    for server_name in ("", names.INGRESS_SERVER_NAME, names.tunnels_server_name(world.a.trust.tenant_id)):
        with pytest.raises(REFUSED):
            async with dial(world.b.gateway, world.e.local.node, tmp_path, server_name=server_name) as client:
                await client.status(HEALTH)


async def public_socket(world: Relayed, site: LiveSite) -> Connection:
    """A WebSocket to the site, through a load balancer of its tenant's on `e`."""
    host, port = f"{site.name}.example", free_port(world.e.host)
    key = f"{site.trust.tenant_id}/shop/public"
    pod = await world.stack.enter_async_context(http_pod(f"{site.name}-public", site.host))
    site.knows(pool("shop/public", site.site_id), export("shop/public", use(load_balancer="shop/public", edges=(world.e.site_id,))))
    site.endpoints("shop/public", "pods", [pod.endpoint])
    await site.apply()
    peer = Peer(site_id=site.site_id, name=site.name, tenant_id=site.trust.tenant_id, direct=False)
    world.e.knows(pool(key, site.site_id), http(key, host, forward(key, web_socket=True)), listener(port, key))
    world.e.knows(item(ItemKind.PEER, site.site_id, peer))
    await world.e.apply()
    await world.answers(at=world.e, port=port, host=host)
    return await upgraded(world.e.host, port, host)


async def test_streams_of_the_public_end_with_the_revocation_and_those_of_other_tenants_go_on(world: Relayed) -> None:
    gone, stays = await public_socket(world, world.b), await public_socket(world, world.x)
    assert shard(world.b.site_id) == shard(world.x.site_id)
    assert [await spoken(stream) for stream in (gone, stays)] == [b"?", b"?"]
    world.e.knows(site_of(world.e, revocations={f"{world.b.trust.tenant_id}/{shard(world.b.site_id)}": 1}))
    await world.e.apply()
    await ended(gone)
    assert await spoken(stays) == b"?"
    for _, writer in (gone, stays):
        writer.close()


async def test_who_was_revoked_is_not_called_through_the_tunnels_that_it_keeps(world: Relayed) -> None:
    await world.uses("e", direct=False, reverse=False, f=False)
    crl_pem = pki.revocations(world.a.trust.authority, [serial(world.b.local.node)], Trust.now())
    world.a.knows(site_of(world.a, peer_crl_pem=crl_pem, revocations={shard(world.b.site_id): 1}))
    await world.a.apply()

    async def refused() -> bool:
        return (await world.call()).status_code == 503

    await until(refused, "b not to be called", within_s=LISTENER_DRAIN_S + 20)
    assert await world.accepted(world.e, world.b)
    world.a.knows(site_of(world.a, peer_crl_pem="", revocations={}))
    await world.a.apply()
    await world.answers()
    await world.paths()


async def test_a_site_that_is_revoked_is_refused_on_its_open_connections(world: Relayed, tmp_path: Path) -> None:
    name = names.relay_server_name(world.a.trust.tenant_id)
    await world.paths(direct=False, f=False)
    await world.answers()
    async with dial(world.e.gateway, world.a.local.node, tmp_path, server_name=name) as client:
        assert (await client.ask(connect(world.b.site_id), ends=False))[1] == 200
        world.relays(world.b, world.x)
        await world.e.apply()
        assert (await client.ask(connect(world.b.site_id), ends=False))[1] == 403
    assert await handshake(world, world.a.local.node, world.a.trust, tmp_path) is None
    world.relays(world.a, world.x)
    await world.e.apply()
    assert await stream(world, world.a.local.node, world.a.trust, world.b.site_id, tmp_path) == 403
    world.relays(world.a, world.b, world.x)
    await world.e.apply()
    assert await stream(world, world.a.local.node, world.a.trust, world.b.site_id, tmp_path) == 200
    await world.paths()
