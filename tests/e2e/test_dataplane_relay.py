"""Two sites that reach each other directly, through reverse tunnels, or through regional edges that serve another tenant too."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from lab.forwarder import Forwarder
from tests.e2e.dataplane_sites import LiveSite, export, free_port, listener, pool, tcp, tcp_pod, until
from tests.e2e.relay_sites import Relayed, forwarder, relayed, use
from tests.e2e.test_dataplane_tcp import named

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[Relayed]:
    async with relayed(21) as world:
        await world.leads(world.e.site_id)
        await world.leads(world.f.site_id)
        yield world


async def test_every_worker_of_an_edge_can_have_a_tunnel_and_one_is_left(world: Relayed) -> None:
    for site in (world.a, world.b, world.x):
        for edge in (world.e, world.f):
            assert await world.tunnels(site, edge) >= edge.gateway.workers + 1


@pytest.mark.parametrize("path", ["e", "f", "direct"])
async def test_requests_move_to_the_path_that_is_to_be_used_and_none_is_lost(world: Relayed, path: str) -> None:
    happened = asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened, 10))
    await world.paths(**{other: other == path for other in ("direct", "e", "f")})
    happened.set()
    assert set(await running) == {"served"}
    await world.settles("b" if path == "direct" else path)
    await world.paths()


@pytest.mark.parametrize("path", ["direct", "e", "f"])
async def test_connections_go_by_each_path_and_their_halves_close_on_their_own(world: Relayed, path: str) -> None:
    port = free_port(world.a.host)
    async with tcp_pod(world.b.host, named("b")) as endpoint:
        for site in (world.a, world.b):
            site.knows(pool("shop/db", world.b.site_id))
        world.a.knows(tcp("shop/db", "shop/db"), listener(port, "shop/db", protocol="tcp"))
        world.b.knows(export("shop/db", use(world.a, load_balancer="shop/db", protocol="tcp")))
        world.b.endpoints("shop/db", "pods", [endpoint])
        await world.b.apply()
        await world.paths(**{other: other == path for other in ("direct", "e", "f")})
        reader, writer = await asyncio.open_connection(world.a.host, port)
        sent = bytes(range(256)) * 8192
        writer.write(sent)
        writer.write_eof()
        assert await reader.read(-1) == b"b" + sent + b"bye"
        writer.close()
    await world.paths()


async def test_a_path_is_asked_for_its_health_whether_or_not_it_is_in_use(world: Relayed) -> None:
    assert [await world.probe(path) for path in ("", "direct", world.e.site_id, world.f.site_id, "nowhere")] == [200, 200, 200, 200, 404]
    assert [await world.probe("", edge) for edge in (world.e, world.f)] == [200, 200]


async def _steadily(world: Relayed, trouble: asyncio.Event, after: int = 40) -> list[str]:
    """Outcomes of idempotent requests, several at a time, until enough were sent after the trouble."""
    outcomes: list[str] = []

    async def worker() -> None:
        left = after
        while left:
            reply = await world.call()
            outcomes.append("served" if reply.status_code == 200 else reply.text)
            left -= trouble.is_set()

    await asyncio.gather(*(worker() for _ in range(4)))
    return outcomes


async def _fails(tap: Forwarder, fault: str) -> None:
    if fault == "cut":
        await tap.cut()
    else:
        tap.freeze()


@pytest.mark.parametrize("fault", ["cut", "freeze"])
async def test_when_the_direct_path_fails_requests_go_through_an_edge_and_none_is_lost(world: Relayed, fault: str) -> None:
    await world.uses("b")
    happened = asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened))
    await _fails(world.taps[world.b], fault)
    happened.set()
    try:
        assert set(await running) == {"served"}
        await world.settles("e")
    finally:
        world.taps[world.b].mend()
    await world.leads("direct")


@pytest.mark.parametrize("fault", ["cut", "freeze"])
async def test_when_an_edge_fails_requests_go_through_the_second_and_none_is_lost(world: Relayed, fault: str) -> None:
    await world.uses("e", direct=False)
    happened = asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened))
    await _fails(world.taps[world.e], fault)
    happened.set()
    try:
        assert set(await running) == {"served"}
        await world.settles("f")
    finally:
        world.taps[world.e].mend()
    await world.leads(world.e.site_id)
    await world.paths()


async def test_an_edge_that_drains_is_left_at_once_and_costs_no_request(world: Relayed) -> None:
    world.a.knows(world.peer(world.b, direct=False))
    await world.a.apply()
    await world.settles("e")
    happened = asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened, 10))
    world.a.knows(world.edge(world.e, draining=True))
    await world.a.apply()
    happened.set()
    assert set(await running) == {"served"}
    await world.settles("f")
    world.a.knows(world.edge(world.e), world.peer(world.b))
    await world.a.apply()


async def test_a_connection_stays_on_its_path_while_new_ones_take_another(world: Relayed) -> None:
    port = free_port(world.a.host)
    async with tcp_pod(world.b.host, named("b")) as endpoint:
        for site in (world.a, world.b):
            site.knows(pool("shop/kept", world.b.site_id))
        world.a.knows(tcp("shop/kept", "shop/kept"), listener(port, "shop/kept", protocol="tcp"))
        world.b.knows(export("shop/kept", use(world.a, load_balancer="shop/kept", protocol="tcp")))
        world.b.endpoints("shop/kept", "pods", [endpoint])
        await world.b.apply()
        await world.uses("b")
        reader, writer = await asyncio.open_connection(world.a.host, port)
        assert await reader.readexactly(1) == b"b"
        await world.uses("e", direct=False)
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        writer.close()
    await world.paths()


async def test_an_edge_that_is_killed_costs_no_request_and_gets_its_tunnels_back(world: Relayed) -> None:
    await world.uses("e", direct=False)
    happened = asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened))
    assert world.e.proxy.pid is not None
    os.kill(world.e.proxy.pid, signal.SIGKILL)
    happened.set()
    assert set(await running) == {"served"}
    await world.leads(world.e.site_id)
    await world.paths()


async def test_a_node_that_is_lost_behind_an_edge_costs_no_request(world: Relayed) -> None:
    async with world.node(world.b, 27) as second:
        await world.paths(direct=False, f=False)
        await until(lambda: world.accepted(world.e, second), "tunnels of the second node")
        await world.answers()
        serving = world.b if await _serves(world.b) else second
        happened = asyncio.Event()
        running = asyncio.create_task(_steadily(world, happened))
        assert serving.proxy.pid is not None
        os.kill(serving.proxy.pid, signal.SIGKILL)
        happened.set()
        assert set(await running) == {"served"}
    await world.paths()


async def _serves(site: LiveSite) -> bool:
    text = await site.proxy.admin.get(r"/stats?filter=^http\.exports\.downstream_cx_active$")
    return not text.strip().endswith(" 0")


async def test_a_site_that_cannot_be_dialled_is_called_through_tunnels_of_its_own(world: Relayed) -> None:
    world.a.knows(world.peer(world.b, gateways=(), edges=()))
    world.b.local = replace(world.b.local, dials=frozenset({world.a.site_id}))
    await world.b.apply()
    await world.a.apply()
    await world.leads("reverse")
    assert {(await world.call()).status_code for _ in range(10)} == {200}
    assert await world.tunnels(world.b, world.a) >= world.a.gateway.workers + 1
    world.a.knows(world.peer(world.b))
    world.b.local = replace(world.b.local, dials=frozenset())
    await world.b.apply()
    await world.a.apply()
    await world.leads("direct")


async def test_a_gateway_that_is_known_by_name_is_one_path_of_several(world: Relayed) -> None:
    async with forwarder(world.b, world.threads, "127.0.0.1") as tap:
        host, port = tap.address
        assert host == "127.0.0.1"
        named = world.gateway(world.b).model_copy(update={"host": "localhost", "port": port})
        world.a.knows(world.peer(world.b, gateways=(named,)))
        await world.a.apply()
        await world.leads("direct")
        await world.paths(e=False, f=False)
        assert {(await world.call()).status_code for _ in range(10)} == {200}
        await world.paths(direct=False, e=False)
        assert {(await world.call()).status_code for _ in range(10)} == {200}
        await world.paths()
        happened = asyncio.Event()
        running = asyncio.create_task(_steadily(world, happened))
        await tap.cut()
        happened.set()
        assert set(await running) == {"served"}
    world.a.knows(world.peer(world.b))
    await world.a.apply()
