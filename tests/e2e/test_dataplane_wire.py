"""Everything that crosses between sites and regional edges, recorded; and what can be read in it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from tests.e2e.dataplane_sites import export, free_port, listener, pool, tcp, tcp_pod
from tests.e2e.relay_sites import Relayed, relayed, use

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED = b"card-number-4929-2043-8571"
ANSWERED = b"balance-of-the-account-1734"
PADDING = bytes(200_000)
LEAST = 2_000
"""Bytes of a few handshakes."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[Relayed]:
    """Besides `shop/cart` there is `shop/ledger`, by TCP."""
    async with relayed(81) as world:
        port = free_port(world.a.host)
        world.ports["ledger"] = port
        endpoint = await world.stack.enter_async_context(tcp_pod(world.b.host, _ledger))
        for site in (world.a, world.b):
            site.knows(pool("shop/ledger", world.b.site_id))
        world.a.knows(tcp("shop/ledger", "shop/ledger"), listener(port, "shop/ledger", protocol="tcp"))
        world.b.knows(export("shop/ledger", use(world.a, load_balancer="shop/ledger", protocol="tcp")))
        world.b.endpoints("shop/ledger", "pods", [endpoint])
        world.b.local = replace(world.b.local, dials=frozenset({world.a.site_id}))
        await world.apply()
        for path in ("direct", "reverse", world.e.site_id, world.f.site_id):
            await world.leads(path)
        yield world


async def _ledger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)
    writer.write(ANSWERED)
    writer.close()


async def _converse(world: Relayed) -> None:
    """The pod repeats what it was asked for."""
    path = f"/{ASKED.decode()}/{ANSWERED.decode()}"
    reply = await world.call(path, method="POST", content=ASKED + PADDING)
    assert (reply.status_code, reply.json()["path"]) == (200, path)
    reader, writer = await asyncio.open_connection(world.a.host, world.ports["ledger"])
    writer.write(ASKED)
    writer.write_eof()
    assert await reader.read(-1) == ANSWERED
    writer.close()


@pytest.mark.parametrize(
    ("path", "hop"), [("direct", "b"), ("reverse", "a"), ("e", "e"), ("f", "f")], ids=["direct", "reverse", "first edge", "second edge"]
)
async def test_the_wire_shows_neither_payload_nor_names_of_exports(world: Relayed, path: str, hop: str) -> None:
    paths = ("direct", "reverse", "e", "f")
    await world.paths(**{other: other == path for other in paths})
    recorded = {site.name: tap.record() for site, tap in world.taps.items()}
    for _ in range(3):
        await _converse(world)
    names = [
        b"cart",
        b"ledger",
        b"shop",
        b"isthmus-lb",
        b"x-pod",
        b"HTTP/1.1",
        b"CONNECT",
        world.a.site_id.encode(),
        world.b.site_id.encode(),
    ]
    shown = [(name, found) for name, seen in recorded.items() for found in (ASKED, ANSWERED, *names) if found in bytes(seen)]
    assert shown == []
    assert {name for name, seen in recorded.items() if len(seen) > len(PADDING)} == {hop}
    await world.paths()


async def test_the_wire_shows_no_name_while_tunnels_are_dialled(world: Relayed) -> None:
    """Handshakes say which site dials; all of it in TLS, and on the same connections TLS follows again."""
    recorded = world.taps[world.e].record()
    await world.taps[world.e].cut()
    world.taps[world.e].mend()
    await world.leads(world.e.site_id)
    names = [b"reverse_connections", b"x-envoy", b"node-of", world.a.site_id.encode(), world.b.site_id.encode()]
    assert [name for name in names if name in bytes(recorded)] == []
    assert len(recorded) > LEAST
