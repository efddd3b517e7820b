"""Two sites that reach each other directly, through reverse tunnels, or through regional edges that serve another tenant too."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.relay_sites import Relayed, relayed

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


@pytest.mark.parametrize("path", ["direct", "e", "f"])
async def test_requests_go_by_each_path(world: Relayed, path: str) -> None:
    await world.paths(**{other: other == path for other in ("direct", "e", "f")})
    replies = [await world.call() for _ in range(10)]
    assert {reply.headers["x-pod"] for reply in replies} == {"b1"}
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


@pytest.mark.parametrize("fault", ["cut", "freeze"])
async def test_when_the_direct_path_fails_requests_go_through_an_edge_and_none_is_lost(world: Relayed, fault: str) -> None:
    tap, happened = world.taps[world.b], asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened))
    if fault == "cut":
        await tap.cut()
    else:
        tap.freeze()
    happened.set()
    try:
        assert set(await running) == {"served"}
    finally:
        tap.mend()
    await world.leads("direct")


@pytest.mark.parametrize("fault", ["cut", "freeze"])
async def test_when_an_edge_fails_requests_go_through_the_second_and_none_is_lost(world: Relayed, fault: str) -> None:
    await world.paths(direct=False)
    tap, happened = world.taps[world.e], asyncio.Event()
    running = asyncio.create_task(_steadily(world, happened))
    if fault == "cut":
        await tap.cut()
    else:
        tap.freeze()
    happened.set()
    try:
        assert set(await running) == {"served"}
    finally:
        tap.mend()
    await world.leads(world.e.site_id)
    await world.paths()
